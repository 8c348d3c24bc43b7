"""Waiting for an answer for a time, of which what this process could not run does not count."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final, TypeVar

from agent360.mesh.ratelimit.sharing import AWAY, Away

T = TypeVar("T")

_SLICES: Final = 8


async def in_slices(asking: Awaitable[T], patience_s: float) -> T | Away:
    """Awaits an answer, or cancels the asking and gives up.

    The time passes in slices: a process that is held up for long has let one of them pass.

    Args:
        asking: awaited by the caller's own task; one of its own would cost turns of the loop.
        patience_s: how long it is waited for.
    """
    try:
        async with asyncio.timeout(None) as timeout:
            slices = _Slices(timeout, patience_s / _SLICES)
            try:
                return await asking
            finally:
                slices.end()
    except TimeoutError:
        if not timeout.expired():
            raise
        return AWAY


class _Slices:
    """Ends a timeout after so many slices of time."""

    __slots__ = ("_left", "_loop", "_slice_s", "_timeout", "_timer")

    def __init__(self, timeout: asyncio.Timeout, slice_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._slice_s = slice_s
        self._left = _SLICES
        self._timer = self._loop.call_later(slice_s, self._pass)

    def end(self) -> None:
        """Lets no more of them pass."""
        self._timer.cancel()

    def _pass(self) -> None:
        self._left -= 1
        if self._left:
            self._timer = self._loop.call_later(self._slice_s, self._pass)
        else:
            self._timeout.reschedule(self._loop.time())
