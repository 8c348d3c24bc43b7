"""The event loop: nothing blocks it, and nothing is left on it after close."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.servers import running

from agent360.client import AuditEvent, Entry, Mesh, MeshError
from agent360.mesh import embedded
from agent360.mesh.simulator import Simulator, SimulatorSettings
from agent360.metrics.v1 import metrics_pb2

SLOW_S = 0.5
LEFT_BEHIND = ("was destroyed but it is pending", "was never retrieved", "was never awaited")


class Complaints(logging.Handler):
    """What asyncio says in its log, and what reaches the loop's exception handler."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.said.append(f"{context['message']}: {context.get('exception')!r}")

    def slow(self) -> list[str]:
        return [each for each in self.said if each.startswith("Executing ")]

    def left_behind(self) -> list[str]:
        return [each for each in self.said if any(part in each for part in LEFT_BEHIND)]


@pytest.fixture
async def complaints() -> AsyncIterator[Complaints]:
    """Complaints of the test's loop, in debug mode with slow-callback detection."""
    loop = asyncio.get_running_loop()
    logger = logging.getLogger("asyncio")
    found = Complaints()
    logger.addHandler(found)
    before = loop.slow_callback_duration
    loop.slow_callback_duration = SLOW_S
    loop.set_exception_handler(found.note)
    loop.set_debug(True)
    yield found
    loop.set_debug(False)
    loop.set_exception_handler(None)
    loop.slow_callback_duration = before
    logger.removeHandler(found)


@asynccontextmanager
async def everything(directory: Path) -> AsyncIterator[Mesh]:
    """All four services with a model server and a store on disk."""
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.0, inter_token_s=0.0)) as simulator,
        embedded(
            tenant="acme",
            settings={
                "inference": {"backends": [{"url": simulator.url}]},
                "metrics": {"store": f"sqlite:///{directory}/metrics.db"},
            },
        ) as mesh,
    ):
        yield mesh


async def mixed_load(mesh: Mesh, tasks: int = 12, rounds: int = 4) -> int:
    """Calls of every service by many tasks at a time; returns how many tasks finished."""

    async def caller(number: int) -> None:
        for turn in range(rounds):
            key = f"{number}/{turn}"
            await mesh.cache.set(key, b"x" * 2_000, tags=["load"])
            assert (await mesh.cache.get(key)).hit
            assert (await mesh.ratelimit.check("search", descriptor={"user": key})).allowed
            answer = await mesh.inference.generate(f"Name river {key}", model="sim-small")
            assert answer.text
            pieces = mesh.inference.stream(f"Name lake {key}", model="sim-small")
            assert [delta async for delta in pieces]
            mesh.metrics.count("turns", labels={"task": str(number)})
            mesh.metrics.observe("turn_size", float(turn), unit="1")
            await mesh.audit.record(AuditEvent("plans.approve", f"plans/{key}"))

    async def crowd() -> None:
        entries = [Entry(f"many{n}", b"y" * 100) for n in range(2_000)]
        assert all(await mesh.cache.set_many(entries))
        found = await mesh.cache.get_many([entry.key for entry in entries])
        assert all(lookup.hit for lookup in found)
        await mesh.cache.invalidate(tags=["nobody"])

    await asyncio.gather(crowd(), *(caller(number) for number in range(tasks)))
    await mesh.metrics.flush()
    query = metrics_pb2.QueryRequest(name="turns", aggregation=metrics_pb2.AGGREGATION_SUM)
    groups = [group async for group in mesh.metrics.query(query)]
    assert sum(point.value for group in groups for point in group.points) == tasks * rounds
    return tasks


async def calls_that_end_badly(mesh: Mesh) -> None:
    """Refused, late, withdrawn and abandoned calls."""
    with suppress(MeshError):
        await mesh.cache.get("")
    await mesh.cache.claim("taken", fill_timeout=60)
    with pytest.raises(MeshError, match="DEADLINE_EXCEEDED"):
        await mesh.cache.claim("taken", timeout=0.05)
    withdrawn = [asyncio.create_task(mesh.cache.claim("taken")) for _ in range(20)]
    await mesh.cache.get("taken")
    for task in withdrawn:
        task.cancel()
    ends = await asyncio.gather(*withdrawn, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends)
    pieces = aiter(mesh.inference.stream("[[sim:tokens=5000]] go on", model="sim-small"))
    assert await anext(pieces)
    with pytest.raises(MeshError):
        await mesh.inference.generate("Name a river", model="no-such-model")


def test_the_detection_itself_sees_a_blocked_loop_and_a_forgotten_failure() -> None:
    """Else the tests below could pass for having looked at nothing."""
    found = Complaints()
    logging.getLogger("asyncio").addHandler(found)

    async def block() -> None:
        loop = asyncio.get_running_loop()
        loop.slow_callback_duration = 0.01
        loop.set_exception_handler(found.note)
        loop.call_soon(spin, loop.time() + 0.05, loop)
        loop.create_future().set_exception(ValueError("nobody asks"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        gc.collect()

    def spin(until: float, loop: asyncio.AbstractEventLoop) -> None:
        while loop.time() < until:
            pass

    try:
        asyncio.run(block(), debug=True)
    finally:
        logging.getLogger("asyncio").removeHandler(found)
    assert found.slow()
    assert found.left_behind()


async def test_no_callback_blocks_the_loop_under_a_mixed_load_of_all_services(
    complaints: Complaints, tmp_path: Path
) -> None:
    async with everything(tmp_path) as mesh:
        assert await mixed_load(mesh) == 12
        await calls_that_end_badly(mesh)
    assert complaints.slow() == []


async def closed_in_order(directory: Path) -> None:
    async with everything(directory) as mesh:
        await mixed_load(mesh, tasks=3, rounds=2)
        await calls_that_end_badly(mesh)


async def closed_amid_calls(directory: Path) -> None:
    """Closes while calls wait and a streamed answer is under way."""
    waiting: list[asyncio.Task[Any]] = []
    async with everything(directory) as mesh:
        await mesh.cache.claim("taken", fill_timeout=60)
        waiting += [asyncio.create_task(mesh.cache.claim("taken", timeout=60)) for _ in range(20)]
        pieces = aiter(mesh.inference.stream("[[sim:tokens=5000]] go on", model="sim-small"))
        await anext(pieces)
        mesh.metrics.count("turns")
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(end, MeshError) for end in ends), ends


async def closed_by_a_failure(directory: Path) -> None:
    with suppress(ZeroDivisionError):
        async with everything(directory) as mesh:
            await mixed_load(mesh, tasks=2, rounds=1)
            raise ZeroDivisionError


@pytest.mark.parametrize("scenario", [closed_in_order, closed_amid_calls, closed_by_a_failure])
async def test_no_task_and_no_unheard_failure_is_left_after_close(
    scenario: Any, complaints: Complaints, tmp_path: Path
) -> None:
    before = asyncio.all_tasks()
    await scenario(tmp_path)
    assert await left_since(before) == []
    gc.collect()
    await asyncio.sleep(0)
    assert complaints.left_behind() == []


async def test_a_reporter_leaves_no_call_behind_where_the_metrics_service_restarts(
    complaints: Complaints,
) -> None:
    before = asyncio.all_tasks()
    memory = {"store": "sqlite:///:memory:"}
    async with running("metrics", **memory) as first:
        port = first.port
        mesh = Mesh.connect(metrics=first.address, tenant="acme", api_key="")
        mesh.metrics.count("turns")
        await mesh.metrics.flush()
    for _ in range(3):
        async with running("metrics", port=port, **memory):
            mesh.metrics.count("turns")
            async with asyncio.timeout(10):
                await mesh.metrics.flush()
    await mesh.close()
    assert await left_since(before) == []
    assert complaints.left_behind() == []


async def left_since(before: set[asyncio.Task[Any]]) -> list[str]:
    """Tasks that were begun since and are not ending."""
    begun = asyncio.all_tasks() - before
    if begun:  # what the close cancelled may need a step to end
        await asyncio.wait(begun, timeout=1.0)
    return [repr(task) for task in begun if not task.done()]
