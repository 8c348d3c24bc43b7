"""Callers that read slowly, never, or vanish: bounded, cut, and nobody else notices."""

import asyncio
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import vanishing_caller
from support.polling import eventually
from support.raw_streams import ACME, INFERENCE, RawStream, Reading
from support.servers import running

from agent360.client import Mesh
from agent360.client.channel import open_channel
from agent360.mesh.runtime.pipeline import PipelineStream
from agent360.mesh.runtime.policies.shedding import SheddingPolicy
from agent360.mesh.runtime.server import Server
from agent360.mesh.simulator import Simulator, SimulatorSettings

NOBODY = "127.0.0.1:9"
ALONE = {
    "cache": {"enabled": False},
    "limits": {"enabled": False},
    "mesh": {"cache": NOBODY, "ratelimit": NOBODY, "metrics": NOBODY},
    "models": [{"name": "small", "upstream_model": "sim-small"}],
}
MIB = 2**20


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(
        SimulatorSettings(port=0, first_token_s=0.01, inter_token_s=0.0)
    ) as started:
        yield started


@asynccontextmanager
async def inference(simulator: Simulator, **settings: Any) -> AsyncIterator[Server]:
    values = {"backends": [{"url": simulator.url}], **ALONE, **settings}
    async with running("inference", **values) as server:
        yield server


def open_streams(server: Server) -> set[PipelineStream]:
    return server._handlers.open_streams.streams


def in_progress(server: Server) -> int:
    """Calls that the service counts as worked on."""
    (shedding,) = (
        policy
        for policy in server._handlers._policies._policies
        if isinstance(policy, SheddingPolicy)
    )
    return shedding.in_flight


def unsent_bytes(stream: PipelineStream) -> int:
    return stream._queued_bytes + stream._frame_bytes


def held_items(stream: PipelineStream) -> int:
    return len(stream._open) + stream._unsent_items()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def generate(item_id: int, text: str, credit: int = 0) -> dict[str, Any]:
    message = {"role": "ROLE_USER", "content": text}
    asked = {"request": {"model": "small", "messages": [message]}}
    return {"id": item_id, "stream_generate": asked, "credits": credit}


def get(item_id: int, key: str) -> dict[str, Any]:
    return {"id": item_id, "get": {"namespace": "default", "key": key}}


def put(item_id: int, key: str, value: bytes) -> dict[str, Any]:
    entry = {"namespace": "default", "key": key, "value": value}
    return {"id": item_id, "set": {"entry": entry}}


def claim(item_id: int, key: str) -> dict[str, Any]:
    return {"id": item_id, "claim": {"namespace": "default", "key": key}}


async def served(mesh: Mesh, calls: int) -> None:
    """Makes calls one after the other: each must be answered although somebody does not read."""
    for n in range(calls):
        await mesh.cache.get(f"k{n}", timeout=5)


async def is_serving(channel: grpc.aio.Channel) -> bool:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest())
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


# ---------------------------------------------------------------- credits


async def test_a_streamed_answer_stops_at_its_credits_and_its_neighbour_is_answered_whole(
    simulator: Simulator,
) -> None:
    async with inference(simulator) as server, open_channel(server.address) as channel:
        items = [
            generate(1, "[[sim:itl=0.002]][[sim:tokens=300]] go on", credit=3),
            generate(2, "[[sim:itl=0.002]][[sim:tokens=300]] as well", credit=100_000),
        ]
        stream = await RawStream.opened(channel, INFERENCE, items=items, context=ACME)
        await stream.read_until_answered(2)
        assert stream.chunks(1) == 3
        assert stream.chunks(2) > 3
        assert stream.final(1) is None
        assert stream.final(2).stream_generate.final.usage.output_tokens == 300
        (served_stream,) = open_streams(server)
        waiting = served_stream._open[1]
        await eventually(lambda: waiting.room is not None and waiting.credits == 0)
        await stream.send(items=[generate(3, "Name a river")], context=ACME)
        await stream.read_until_answered(3)
        assert stream.chunks(1) == 3
        await stream.send(credits=[{"id": 1, "chunks": 1}])
        await stream.read_until_answered(1)
        assert 4 <= stream.chunks(1) <= 5
        texts = [result.stream_generate.delta.content for result in stream.results[1]]
        assert len("".join(texts).split()) == 300
        assert stream.answers() == {1: 1, 2: 1, 3: 1}


async def test_the_service_gives_its_own_credits_where_the_item_names_none(
    simulator: Simulator,
) -> None:
    async with (
        inference(simulator, stream={"initial_credits": 2}) as server,
        open_channel(server.address) as channel,
    ):
        items = [generate(1, "[[sim:itl=0.002]][[sim:tokens=200]] go on")]
        stream = await RawStream.opened(channel, INFERENCE, items=items, context=ACME)
        while stream.chunks(1) < 2:
            assert await stream.read()
        (served_stream,) = open_streams(server)
        await eventually(lambda: simulator.load.running == 0)
        await stream.send(items=[generate(2, "Name a river")], context=ACME)
        await eventually(lambda: 2 not in served_stream._open or served_stream._open[2].room)
        assert stream.chunks(1) == 2
        await stream.send(credits=[{"id": 1, "chunks": 10}, {"id": 2, "chunks": 1_000}])
        await stream.read_until_answered(1, 2)


# ---------------------------------------------------------------- callers that do not read


async def test_a_caller_that_never_reads_is_cut_after_a_while_and_all_others_are_served() -> None:
    bounds = {"stalled_s": 0.5, "max_unsent_bytes": 4 * MIB, "max_in_flight": 1_000}
    async with (
        running("cache", stream=bounds) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
        open_channel(server.address) as channel,
    ):
        await mesh.cache.set("large", b"x" * MIB)
        await served(mesh, 1)
        known = set(open_streams(server))
        before = resident_bytes()
        items = [get(item_id, "large") for item_id in range(1, 401)]
        stream = await RawStream.opened(channel, items=items, context=ACME)
        await eventually(lambda: open_streams(server) - known)
        (stalled,) = open_streams(server) - known
        await eventually(lambda: in_progress(server) > 300)
        most = grown = 0
        async with asyncio.timeout(5):
            while in_progress(server):
                await served(mesh, 20)
                most = max(most, unsent_bytes(stalled))
                grown = max(grown, resident_bytes() - before)
        assert MIB <= most <= 6 * MIB
        assert grown < 100 * MIB
        error = await stream.read_to_the_end()
        assert error is not None
        assert (error.code, error.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "READER_STALLED",
        )
        assert len(stream.results) < 400
        await eventually(lambda: open_streams(server) == known)
        await served(mesh, 20)


async def test_a_stalled_stream_is_gone_soon_although_its_caller_still_does_not_read() -> None:
    async with (
        running("cache", stream={"stalled_s": 0.5, "max_unsent_bytes": MIB}) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
        open_channel(server.address) as channel,
    ):
        await mesh.cache.set("large", b"x" * MIB)
        await served(mesh, 1)
        known = set(open_streams(server))
        items = [get(item_id, "large") for item_id in range(1, 101)]
        started = time.monotonic()
        await RawStream.opened(channel, items=items, context=ACME)
        await eventually(lambda: open_streams(server) - known)
        await eventually(lambda: open_streams(server) == known)
        assert 0.5 <= time.monotonic() - started < 3.0


async def test_a_caller_that_reads_slowly_but_steadily_is_never_cut_and_loses_nothing() -> None:
    async with (
        running("cache", stream={"stalled_s": 1.0, "max_unsent_bytes": MIB}) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
        open_channel(server.address) as channel,
    ):
        await mesh.cache.set("large", b"x" * MIB)
        await served(mesh, 1)
        items = [get(item_id, "large") for item_id in range(1, 41)]
        stream = await RawStream.opened(channel, items=items, context=ACME)
        while len(stream.results) < 40:
            await served(mesh, 50)
            assert await stream.read()
        assert stream.answers() == dict.fromkeys(range(1, 41), 1)


async def test_many_callers_that_never_read_keep_memory_bounded_and_nobody_waits() -> None:
    bounds = {"stalled_s": 30.0, "max_unsent_bytes": 2 * MIB}
    async with (
        running("cache", stream=bounds) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
        open_channel(server.address) as channel,
    ):
        await mesh.cache.set("large", b"x" * MIB)
        await served(mesh, 1)
        known = set(open_streams(server))
        before = resident_bytes()
        items = [get(item_id, "large") for item_id in range(1, 101)]
        streams = [await RawStream.opened(channel, items=items, context=ACME) for _ in range(10)]
        await eventually(lambda: len(open_streams(server) - known) == 10)
        silent = open_streams(server) - known
        await eventually(lambda: all(unsent_bytes(each) > MIB for each in silent))
        await served(mesh, 200)
        assert max(map(unsent_bytes, silent)) <= 4 * MIB
        assert resident_bytes() - before < 400 * MIB, "of the 1,000 MiB they asked for"
        for stream in streams:
            stream.call.cancel()
        await eventually(lambda: open_streams(server) == known)
        await eventually(lambda: in_progress(server) == 0)


# ---------------------------------------------------------------- the bound of open items


async def test_reading_stops_at_the_bound_and_goes_on_when_items_are_answered() -> None:
    """What is sent beyond the bound stays with the caller, whose writes wait."""
    async with (
        running("cache", stream={"max_in_flight": 16}) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
        open_channel(server.address) as channel,
    ):
        token = (await mesh.cache.claim("taken")).fill_token
        known = set(open_streams(server))
        claims = [claim(item_id, "taken") for item_id in range(1, 17)]
        stream = await RawStream.opened(channel, items=claims, context=ACME)
        await eventually(lambda: open_streams(server) - known)
        (full,) = open_streams(server) - known
        await eventually(lambda: held_items(full) == 16)
        written = 0

        async def write_much() -> None:
            nonlocal written
            value = b"x" * MIB
            for item_id in range(17, 81):
                await stream.send(items=[put(item_id, f"s{item_id}", value)], context=ACME)
                written += 1

        async with Reading(stream):
            writing = asyncio.create_task(write_much())
            await served(mesh, 300)
            assert written < 64
            assert held_items(full) == 16
            assert not (await mesh.cache.get("s17")).hit
            await mesh.cache.fill(token, "taken", b"v")
            await writing
            await eventually(lambda: len(stream.answers()) == 80)
        assert stream.answers() == dict.fromkeys(range(1, 81), 1)
        assert all(not stream.final(each).HasField("error") for each in range(1, 81))
        assert (await mesh.cache.get("s80")).hit


async def test_a_caller_that_sends_without_reading_is_held_back_then_answered_once_each() -> None:
    bounds = {"max_in_flight": 50, "stalled_s": 60.0}
    async with (
        running("cache", stream=bounds) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
        open_channel(server.address) as channel,
    ):
        await mesh.cache.set("large", b"x" * 16_384)
        known = set(open_streams(server))
        stream = RawStream(channel)
        written = 0

        async def write_much() -> None:
            nonlocal written
            value = b"x" * 65_536
            for item_id in range(1, 2_001, 2):
                pair = [get(item_id, "large"), put(item_id + 1, f"s{item_id}", value)]
                await stream.send(items=pair, context=ACME)
                written += 2

        writing = asyncio.create_task(write_much())
        await eventually(lambda: open_streams(server) - known)
        (full,) = open_streams(server) - known
        await eventually(lambda: held_items(full) >= 50)
        most = 0
        for _ in range(30):
            await served(mesh, 10)
            most = max(most, held_items(full))
        assert most <= 50 + 1
        assert written < 2_000
        async with Reading(stream):
            await writing
            await eventually(lambda: len(stream.answers()) == 2_000, 20)
        assert stream.answers() == dict.fromkeys(range(1, 2_001), 1)
        assert all(
            len(stream.final(each).get.lookup.value) == 16_384 for each in range(1, 2_000, 2)
        )
        assert all(stream.final(each).set.stored for each in range(2, 2_001, 2))


# ---------------------------------------------------------------- callers that vanish


async def test_what_a_killed_caller_asked_for_is_stopped_and_forgotten(
    simulator: Simulator,
) -> None:
    async with (
        inference(simulator) as model,
        running("cache") as cache,
        Mesh.connect(
            inference=model.address, cache=cache.address, tenant="acme", api_key=""
        ) as mesh,
        open_channel(model.address) as channel,
    ):
        token = (await mesh.cache.claim("taken")).fill_token
        await mesh.inference.generate("Name a river", model="small")
        known = [set(open_streams(server)) for server in (model, cache)]
        arguments = [vanishing_caller.__file__, model.address, cache.address, "taken"]
        caller = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdout=asyncio.subprocess.PIPE
        )
        assert caller.stdout is not None
        assert await asyncio.wait_for(caller.stdout.readline(), 20) == b"answered\n"
        await eventually(lambda: (in_progress(model), in_progress(cache)) == (3, 20))
        await eventually(lambda: simulator.load.running == 3)
        caller.send_signal(signal.SIGKILL)
        assert await caller.wait() == -signal.SIGKILL
        await eventually(lambda: (in_progress(model), in_progress(cache)) == (0, 0))
        await eventually(lambda: simulator.load.running == 0)
        assert simulator.load.cancelled == 3
        await eventually(lambda: [open_streams(model), open_streams(cache)] == known)
        assert await is_serving(channel)
        assert (await mesh.cache.fill(token, "taken", b"v")).stored
        assert (await mesh.inference.generate("Name two rivers", model="small")).text


async def test_callers_that_come_ask_and_vanish_leave_nothing_behind() -> None:
    async with (
        running("cache") as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
        open_channel(server.address) as watched,
    ):
        await mesh.cache.claim("taken", fill_timeout=60)
        known = set(open_streams(server))
        tasks = len(asyncio.all_tasks())
        for _ in range(30):
            async with open_channel(server.address) as channel:
                claims = [claim(item_id, "taken") for item_id in range(1, 101)]
                await RawStream.opened(channel, items=claims, context=ACME)
                await eventually(lambda: in_progress(server) == 100)
            await eventually(lambda: in_progress(server) == 0)
        await eventually(lambda: open_streams(server) == known)
        await eventually(lambda: len(asyncio.all_tasks()) <= tasks + 5)
        assert await is_serving(watched)
