"""One time to answer for a call, though it asks the store twice: for its quota, and for its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextvars import ContextVar
from typing import Any, Final, TypeVar

from agent360.mesh.ratelimit.sharing import AWAY, Away

T = TypeVar("T")

_SLICES: Final = 8
_LEAST: Final = 1 / 8
"""The part of the time that is left to a call at least."""

waited_s: ContextVar[float] = ContextVar("agent360_ratelimit_waited_s", default=0.0)
"""How long the call that is handled has waited for its quota, in seconds."""


class Deadline:
    """The time that the store is waited for.

    The store itself waits no longer for any one answer; a call that has waited for its quota has
    only the rest, or an eighth.
    """

    def __init__(self, answer_s: float) -> None:
        """Makes one.

        Args:
            answer_s: for the whole call, in seconds.
        """
        self._answer_s = answer_s
        self._running: set[asyncio.Future[Any]] = set()

    async def keep(self, asking: Awaitable[T]) -> T | Away:
        """Awaits an answer of the store, or gives up; what was asked goes on by itself."""
        waited = waited_s.get()
        if not waited:
            return await asking
        task = asyncio.ensure_future(asking)
        self._running.add(task)
        task.add_done_callback(self._ended)
        left_s = max(self._answer_s * _LEAST, self._answer_s - waited)
        # In slices: a process that could not run for a while has not waited.
        for _ in range(_SLICES):
            done, _ = await asyncio.wait((task,), timeout=left_s / _SLICES)
            if done:
                return task.result()
        return AWAY

    def _ended(self, task: asyncio.Future[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits has it
