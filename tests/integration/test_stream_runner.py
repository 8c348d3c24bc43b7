"""The stream runner's promises, on a real server and a raw stream."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from support.servers import running

from agent360.cache.v1 import cache_pb2 as pb
from agent360.client.channel import open_channel
from agent360.mesh.runtime.policies.authentication import hash_key

PIPELINE = "/agent360.cache.v1.CacheService/Pipeline"


class RawStream:
    """A Pipeline stream as a stranger drives it."""

    def __init__(self, channel: grpc.aio.Channel, *metadata: tuple[str, str]) -> None:
        rpc: Any = channel.stream_stream(
            PIPELINE,
            request_serializer=pb.PipelineRequest.SerializeToString,
            response_deserializer=pb.PipelineResponse.FromString,
        )
        self.call = rpc(metadata=metadata)
        self.results: dict[int, Any] = {}

    async def send(self, text: dict[str, Any]) -> None:
        await self.call.write(pb.PipelineRequest(**text))

    async def until(self, *ids: int) -> dict[int, Any]:
        while not all(each in self.results for each in ids):
            message = await self.call.read()
            assert message is not grpc.aio.EOF
            for result in message.results:
                self.results[result.id] = result
        return self.results


@asynccontextmanager
async def raw(*metadata: tuple[str, str], **settings: Any) -> AsyncIterator[RawStream]:
    async with (
        running("cache", **settings) as server,
        open_channel(server.address) as channel,
    ):
        yield RawStream(channel, *metadata)


ACME = {"tenant": "acme"}


def get(item_id: int, key: str, **more: Any) -> dict[str, Any]:
    return {"id": item_id, "get": {"namespace": "n", "key": key}, **more}


def claim(item_id: int, key: str, **more: Any) -> dict[str, Any]:
    return {"id": item_id, "claim": {"namespace": "n", "key": key}, **more}


async def test_a_slow_a_failing_and_a_cancelled_item_delay_or_fail_no_neighbour() -> None:
    async with raw() as stream:
        await stream.send({"context": ACME, "items": [claim(1, "taken")]})
        await stream.until(1)
        slow = claim(2, "taken", context={"tenant": "acme", "timeout": {"seconds": 5}})
        started = time.monotonic()
        await stream.send(
            {
                "context": ACME,
                "items": [slow, get(3, ""), claim(4, "taken"), get(5, "a"), get(6, "b")],
                "cancels": [],
            }
        )
        await stream.send({"cancels": [4]})
        results = await stream.until(3, 4, 5, 6)
        assert time.monotonic() - started < 2
        assert 2 not in results
        assert results[3].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert results[4].error.code == grpc.StatusCode.CANCELLED.value[0]
        assert results[5].get.lookup.outcome == pb.OUTCOME_MISS
        assert results[6].get.lookup.outcome == pb.OUTCOME_MISS


async def test_an_item_is_answered_at_its_own_deadline() -> None:
    async with raw() as stream:
        await stream.send({"context": ACME, "items": [claim(1, "taken")]})
        await stream.until(1)
        short = {"tenant": "acme", "timeout": {"nanos": 200_000_000}}
        started = time.monotonic()
        await stream.send({"items": [claim(2, "taken", context=short)]})
        results = await stream.until(2)
        assert 0.15 < time.monotonic() - started < 1.5
        assert results[2].error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


async def test_an_item_that_has_expired_on_arrival_is_not_worked_on() -> None:
    async with raw() as stream:
        past = {"tenant": "acme", "timeout": {"seconds": -1}}
        await stream.send({"items": [get(1, "k", context=past), get(2, "k", context=ACME)]})
        results = await stream.until(1, 2)
        assert results[1].error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert results[2].HasField("get")


async def test_malformed_ids_and_operations_get_errors_and_the_stream_lives() -> None:
    async with raw() as stream:
        await stream.send({"context": ACME, "items": [claim(1, "taken")]})
        await stream.until(1)
        await stream.send({"context": ACME, "items": [claim(7, "taken"), get(7, "k")]})
        assert "open on this stream" in (await stream.until(7))[7].error.message
        await stream.send({"context": ACME, "items": [get(0, "k"), {"id": 8}, get(9, "k")]})
        results = await stream.until(0, 8, 9)
        assert "must be positive" in results[0].error.message
        assert "operation" in results[8].error.message
        assert results[9].HasField("get")


@pytest.mark.parametrize("tenant", ["", "Acme", "a" * 64, "-x"])
async def test_a_missing_or_malformed_tenant_fails_its_items_alone(tenant: str) -> None:
    async with raw() as stream:
        items = [get(1, "k", context={"tenant": tenant}), get(2, "k", context=ACME)]
        await stream.send({"items": items})
        results = await stream.until(1, 2)
        assert "context.tenant" in results[1].error.message
        assert results[2].HasField("get")


async def test_an_item_for_another_tenant_is_refused_and_its_neighbour_served() -> None:
    keys = [{"name": "acme-key", "sha256": hash_key("secret"), "tenants": ["acme"]}]
    settings = {"authentication": {"keys": keys}}
    async with raw(("authorization", "Bearer secret"), **settings) as stream:
        other = get(1, "k", context={"tenant": "globex"})
        await stream.send({"items": [other, get(2, "k")]})
        results = await stream.until(1, 2)
        assert results[1].error.code == grpc.StatusCode.PERMISSION_DENIED.value[0]
        assert results[2].HasField("get")


async def test_a_stream_without_a_known_key_is_refused() -> None:
    keys = [{"name": "acme-key", "sha256": hash_key("secret"), "tenants": ["acme"]}]
    async with raw(authentication={"keys": keys}) as stream:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.until(1)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
