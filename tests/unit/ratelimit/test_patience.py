"""Waiting for an answer for a time."""

import asyncio
import time

import pytest

from agent360.mesh.ratelimit.patience import in_slices
from agent360.mesh.ratelimit.sharing import AWAY


async def answer_of(future: asyncio.Future[str]) -> str:
    return await future


async def test_what_is_not_answered_in_time_is_given_up_and_no_longer_awaited() -> None:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    assert await in_slices(answer_of(future), 0.02) is AWAY
    assert future.cancelled()
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_a_process_that_is_held_up_has_not_waited() -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[str] = loop.create_future()
    loop.call_soon(time.sleep, 0.2)
    loop.call_later(0.15, lambda: loop.call_soon(future.set_result, "late"))
    assert await in_slices(answer_of(future), 0.1) == "late"


async def test_an_error_and_a_cancellation_of_the_caller_pass_through() -> None:
    async def fail() -> str:
        raise TimeoutError("of another")

    with pytest.raises(TimeoutError, match="of another"):
        await in_slices(fail(), 5.0)
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    asking = asyncio.create_task(in_slices(answer_of(future), 5.0))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
