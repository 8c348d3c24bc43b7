"""The stream runner's promises, on a real server and a raw stream."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from support.raw_streams import ACME, RawStream
from support.servers import running

from agent360.cache.v1 import cache_pb2 as pb
from agent360.client.channel import open_channel
from agent360.client.errors import from_status


@asynccontextmanager
async def raw() -> AsyncIterator[RawStream]:
    """A stream of a cache service on which a key is already being filled."""
    async with running("cache") as server, open_channel(server.address) as channel:
        stream = await RawStream.opened(channel, items=[claim(1, "taken")], context=ACME)
        await stream.read_until_answered(1)
        yield stream


def get(item_id: int, key: str, **more: Any) -> dict[str, Any]:
    return {"id": item_id, "get": {"namespace": "n", "key": key}, **more}


def claim(item_id: int, key: str, **more: Any) -> dict[str, Any]:
    return {"id": item_id, "claim": {"namespace": "n", "key": key}, **more}


def code(stream: RawStream, item_id: int) -> grpc.StatusCode:
    return from_status(stream.final(item_id).error).code


async def test_a_slow_a_failing_and_a_cancelled_item_delay_or_fail_no_neighbour() -> None:
    async with raw() as stream:
        slow = claim(2, "taken", context={"tenant": "acme", "timeout": {"seconds": 5}})
        started = time.monotonic()
        items = [slow, get(3, ""), claim(4, "taken"), get(5, "a"), get(6, "b")]
        await stream.send(items=items, context=ACME)
        await stream.send(cancels=[4])
        await stream.read_until_answered(3, 4, 5, 6)
        assert time.monotonic() - started < 2
        assert stream.final(2) is None
        assert code(stream, 3) is grpc.StatusCode.INVALID_ARGUMENT
        assert code(stream, 4) is grpc.StatusCode.CANCELLED
        assert stream.final(5).get.lookup.outcome == pb.OUTCOME_MISS
        assert stream.final(6).get.lookup.outcome == pb.OUTCOME_MISS
        await stream.read_until_answered(2)
        assert code(stream, 2) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 5 <= time.monotonic() - started < 6
        assert stream.answers() == dict.fromkeys(range(1, 7), 1)


async def test_malformed_ids_and_operations_get_errors_and_the_stream_lives() -> None:
    async with raw() as stream:
        await stream.send(items=[claim(7, "taken"), get(7, "k")], context=ACME)
        await stream.read_until_answered(7)
        assert "open on this stream" in stream.final(7).error.message
        await stream.send(items=[get(0, "k"), {"id": 8}, get(9, "k")], context=ACME)
        await stream.read_until_answered(0, 8, 9)
        assert "must be positive" in stream.final(0).error.message
        assert "operation" in stream.final(8).error.message
        assert stream.final(9).HasField("get")


async def test_withdrawing_or_crediting_what_is_not_open_does_nothing() -> None:
    async with raw() as stream:
        await stream.send(cancels=[1, 99], credits=[{"id": 98, "chunks": 5}])
        await stream.send(items=[get(2, "k")], context=ACME)
        await stream.read_until_answered(2)
        assert stream.answers() == {1: 1, 2: 1}


async def test_answers_that_are_ready_together_come_in_one_message() -> None:
    async with raw() as stream:
        await stream.send(items=[get(n, "k") for n in range(2, 102)], context=ACME)
        assert await stream.read()
        assert len(stream.answers()) == 101
