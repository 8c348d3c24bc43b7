"""Thousands of prompts on one Pipeline stream: a reader that stops, leaves items, or is slow."""

import asyncio
import resource
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.polling import eventually
from support.raw_streams import ACME, INFERENCE, RawStream, Reading
from support.servers import running

from agent360.client.channel import open_channel
from agent360.mesh.runtime.pipeline import PipelineStream
from agent360.mesh.runtime.server import Server
from agent360.mesh.simulator import Simulator, SimulatorSettings
from agent360.mesh.simulator.faults import Behaviour
from agent360.mesh.simulator.script import write_script

NOBODY = "127.0.0.1:9"
MIB = 2**20
SIMULATED = SimulatorSettings(port=0, first_token_s=0.0, inter_token_s=0.0)


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SIMULATED) as started:
        yield started


@asynccontextmanager
async def inference(
    simulator: Simulator, backend: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[Server]:
    values = {
        "cache": {"enabled": False},
        "limits": {"enabled": False},
        "mesh": {"cache": NOBODY, "ratelimit": NOBODY, "metrics": NOBODY},
        "models": [{"name": "small", "upstream_model": "sim-small", "queue": {"timeout_s": None}}],
        "backends": [{"url": simulator.url, **(backend or {})}],
        **settings,
    }
    async with running("inference", **values) as server:
        yield server


def the_stream(server: Server) -> PipelineStream:
    (stream,) = server._handlers.open_streams.streams
    return stream


def unsent_bytes(stream: PipelineStream) -> int:
    return stream._queued_bytes + stream._frame_bytes


def open_items(stream: PipelineStream) -> int:
    return len(stream._open)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def item(item_id: int, text: str, kind: str = "stream_generate", **more: Any) -> dict[str, Any]:
    message = {"role": "ROLE_USER", "content": text}
    asked = {"model": "small", "messages": [message]}
    request = {"request": asked} if kind == "stream_generate" else asked
    return {"id": item_id, kind: request, **more}


def expected(text: str, tokens: int) -> str:
    """What the simulator says to a prompt, whole."""
    body = {"model": "sim-small", "messages": [{"role": "user", "content": text}]}
    return "".join(write_script(body, SIMULATED, Behaviour(tokens=tokens)).pieces)


def said(stream: RawStream, item_id: int) -> str:
    return "".join(
        result.stream_generate.delta.content for result in stream.results[item_id] if result.more
    )


async def test_10_000_prompts_on_one_stream_survive_a_reader_that_stops_for_5_seconds(
    simulator: Simulator,
) -> None:
    count, message, tokens = 10_000, 500, 8
    texts = [f"[[sim:itl=0.001]][[sim:tokens={tokens}]] plan {n}" for n in range(count)]
    bounds = {"max_in_flight": 2_000, "max_unsent_bytes": 2 * MIB}
    async with (
        inference(simulator, stream=bounds) as server,
        open_channel(server.address) as channel,
    ):
        stream = RawStream(channel, INFERENCE)

        async def ask() -> None:
            for first in range(0, count, message):
                items = [item(n + 1, texts[n]) for n in range(first, first + message)]
                await stream.send(items=items, context=ACME)
            await stream.call.done_writing()

        asking = asyncio.create_task(ask())
        while len(stream.results) < 1_000:
            assert await stream.read()
        held = unsent = grown = 0
        before, served = resident_bytes(), the_stream(server)
        stop = asyncio.get_running_loop().time() + 5
        while asyncio.get_running_loop().time() < stop:
            held = max(held, open_items(served))
            unsent = max(unsent, unsent_bytes(served))
            grown = max(grown, resident_bytes() - before)
            await asyncio.sleep(0.01)
        assert held <= bounds["max_in_flight"] + message
        assert unsent <= bounds["max_unsent_bytes"] + MIB
        assert grown < 100 * MIB
        async with asyncio.timeout(200):
            assert await stream.read_to_the_end() is None
        await asking
        assert stream.answers() == {n + 1: 1 for n in range(count)}
        wrong = [n for n in range(count) if said(stream, n + 1) != expected(texts[n], tokens)]
        assert not wrong, "chunks of one id come whole and in order"
        assert sum(stream.chunks(n + 1) > 1 for n in range(count)) > count / 2
        usage = stream.final(count).stream_generate.final.usage
        assert usage.output_tokens == tokens


async def test_items_are_withdrawn_one_by_one_and_the_others_are_answered(
    simulator: Simulator,
) -> None:
    count = 200
    async with inference(simulator) as server, open_channel(server.address) as channel:
        texts = {
            n: f"[[sim:ttft={30 if n % 2 else 0.1}]][[sim:tokens=8]] plan {n}"
            for n in range(1, count + 1)
        }
        stream = await RawStream.opened(
            channel, INFERENCE, items=[item(n, text) for n, text in texts.items()], context=ACME
        )
        async with Reading(stream):
            await eventually(lambda: simulator.load.by_path["/v1/chat/completions"] == count, 20)
            withdrawn = list(range(1, count + 1, 2))
            await stream.send(cancels=withdrawn)
            await eventually(lambda: len(stream.answers()) == count, 20)
        codes = Counter(
            stream.final(n).error.code for n in withdrawn if stream.final(n).HasField("error")
        )
        assert codes == {grpc.StatusCode.CANCELLED.value[0]: len(withdrawn)}
        assert all(said(stream, n) == expected(texts[n], 8) for n in texts if n % 2 == 0)
        await eventually(lambda: simulator.load.cancelled == len(withdrawn))
        assert stream.answers() == dict.fromkeys(texts, 1)


async def test_one_answer_that_is_read_slowly_stops_none_of_500_others(
    simulator: Simulator,
) -> None:
    async with inference(simulator) as server, open_channel(server.address) as channel:
        slow = item(1, "[[sim:itl=0.001]][[sim:tokens=400]] slow", credits=1)
        others = [
            item(n, f"[[sim:itl=0.001]][[sim:tokens=8]] plan {n}", credits=100)
            for n in range(2, 502)
        ]
        stream = await RawStream.opened(channel, INFERENCE, items=[slow, *others], context=ACME)
        async with asyncio.timeout(60):
            await stream.read_until_answered(*range(2, 502))
        assert stream.final(1) is None
        assert stream.chunks(1) <= 1
        await stream.send(credits=[{"id": 1, "chunks": 1_000}])
        await stream.read_until_answered(1)
        assert len(said(stream, 1).split()) == 400
        assert stream.final(1).stream_generate.final.usage.output_tokens == 400


async def test_the_urgent_items_of_a_stream_are_answered_first(simulator: Simulator) -> None:
    one_at_a_time = {"concurrency": {"mode": "fixed", "maximum": 1}}
    async with (
        inference(simulator, backend=one_at_a_time) as server,
        open_channel(server.address) as channel,
    ):
        order: list[int] = []
        stream = await RawStream.opened(
            channel, INFERENCE, items=[item(1, "[[sim:ttft=0.5]] first", "generate")], context=ACME
        )
        await eventually(lambda: simulator.load.running == 1)
        for first, priority in (
            (100, "PRIORITY_LOW"),
            (200, "PRIORITY_NORMAL"),
            (300, "PRIORITY_HIGH"),
        ):
            await stream.send(
                items=[item(first + n, f"plan {first + n}", "generate") for n in range(10)],
                context={**ACME, "priority": priority},
            )
        while len(stream.results) < 31:
            before = set(stream.results)
            assert await stream.read()
            order += [n for n in stream.results if n not in before]
        assert all(stream.final(n).HasField("generate") for n in order)
        assert order[0] == 1
        assert [n // 100 for n in order[1:]] == [3] * 10 + [2] * 10 + [1] * 10
