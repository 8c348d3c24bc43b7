"""Puts entries in place before they are asked for, at a bounded rate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from agent360.mesh.cache.ports import Clock

T = TypeVar("T")

_SLICE: Final = 100
_SLICES_PER_S: Final = 10


@dataclass(slots=True)
class Progress:
    """How far warming is."""

    total: int
    """Entries in all, as far as known."""
    warmed: int = 0
    """Entries put in place."""
    failed: int = 0
    """Entries that were refused, or could not be had."""


async def warm(
    batches: AsyncIterator[Sequence[T]],
    put: Callable[[Sequence[T]], Awaitable[int]],
    clock: Clock,
    *,
    total: int,
    per_second: int,
) -> AsyncIterator[Progress]:
    """Puts entries in place, a slice at a time, and tells how far it is after each.

    Args:
        batches: the entries, some at a time.
        put: puts a slice in place; returns how many of it are.
        clock: paces it.
        total: how many there are; 0: it will show.
        per_second: at most so many entries a second; 0: as fast as possible.
    """
    progress = Progress(total)
    size = _SLICE if not per_second else max(1, min(_SLICE, per_second // _SLICES_PER_S))
    began = clock.now()
    async for batch in batches:
        for first in range(0, len(batch), size):
            part = batch[first : first + size]
            done = progress.warmed + progress.failed
            if per_second:
                await asyncio.sleep(max(0.0, began + done / per_second - clock.now()))
            warmed = await put(part)
            progress.warmed += warmed
            progress.failed += len(part) - warmed
            progress.total = max(progress.total, progress.warmed + progress.failed)
            yield progress
    if not progress.total:
        yield progress


async def at_once(items: Sequence[T]) -> AsyncIterator[Sequence[T]]:
    """A batch that is all there is."""
    yield items
