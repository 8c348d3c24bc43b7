"""Processes that compute for the event loop: in order of priority, whatever becomes of them."""

import asyncio
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import structlog
from prometheus_client import CollectorRegistry
from support.polling import eventually

from agent360.client.errors import MeshError
from agent360.mesh.runtime.call import Priority
from agent360.mesh.runtime.workers import Workers


def made(processes: int = 1, **more) -> Workers:
    return Workers(processes, structlog.get_logger(), CollectorRegistry(), **more)


@pytest.fixture
async def workers():
    found = made()
    yield found
    await found.close()


async def test_a_worker_computes_in_another_process(workers):
    assert await workers.run(math.factorial, 20) == math.factorial(20)
    assert await workers.run(os.getpid) not in (os.getpid(), None)


async def test_what_a_function_raises_reaches_the_caller(workers):
    with pytest.raises(ValueError, match="factorial"):
        await workers.run(math.factorial, -1)


async def test_the_event_loop_goes_on_while_a_worker_computes(workers):
    await workers.run(os.getpid)
    task = asyncio.create_task(workers.run(time.sleep, 0.3))
    turns = 0
    while not task.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns > 10


async def test_what_is_urgent_goes_before_what_waits(workers, tmp_path):
    order = tmp_path / "order"
    gate = asyncio.create_task(workers.run(time.sleep, 0.2))
    await asyncio.sleep(0)
    tasks = [
        asyncio.create_task(workers.run(append, str(order), str(priority), priority=priority))
        for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.LOW)
    ]
    await asyncio.gather(gate, *tasks)
    assert order.read_text().split() == ["3", "2", "1", "1"]


async def test_a_caller_that_leaves_takes_its_waiting_task_along(workers, tmp_path):
    gate = asyncio.create_task(workers.run(time.sleep, 0.2))
    await asyncio.sleep(0)
    left = asyncio.create_task(workers.run(append, str(tmp_path / "left"), "x"))
    await asyncio.sleep(0)
    left.cancel()
    await gate
    await workers.run(os.getpid)
    assert not (tmp_path / "left").exists()


async def test_a_killed_worker_is_replaced_and_its_task_begun_again(workers):
    await workers.run(os.getpid)
    task = asyncio.create_task(workers.run(time.sleep, 0.3))
    await asyncio.sleep(0.1)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    await task
    assert await workers.run(math.factorial, 5) == 120


async def test_a_task_that_kills_its_workers_is_given_up_and_others_go_on(workers):
    with pytest.raises(MeshError) as caught:
        await workers.run(die)
    assert caught.value.reason == "WORKER_DIED"
    assert await workers.run(math.factorial, 5) == 120


async def test_more_than_may_wait_is_refused():
    workers = made(max_waiting=2)
    try:
        tasks = [asyncio.create_task(workers.run(time.sleep, 0.2)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(MeshError) as caught:
            await workers.run(os.getpid)
        assert caught.value.reason == "WORKERS_BUSY"
        await asyncio.gather(*tasks)
    finally:
        await workers.close()


async def test_closing_leaves_no_process_behind():
    workers = made(2)
    await asyncio.gather(workers.run(time.sleep, 0.1), workers.run(time.sleep, 0.1))
    assert len(multiprocessing.active_children()) == 2
    await workers.close()
    await eventually(lambda: not multiprocessing.active_children())


def append(path: str, text: str) -> None:
    with Path(path).open("a") as file:
        file.write(text + "\n")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
