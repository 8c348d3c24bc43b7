"""Waits for a state instead of sleeping for a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


async def eventually(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Returns when the condition holds; fails if it does not within the time."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event to wait on
            await asyncio.sleep(0.005)


async def eventually_async(
    condition: Callable[[], Awaitable[object]], timeout_s: float = 5.0
) -> None:
    """The same for a condition that has to be asked for."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - what is waited for has no event to wait on
            await asyncio.sleep(0.005)
