"""Compression: large answers are, small ones are not, and only where it was asked for."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support.cutting_proxy import CuttingProxy
from support.raw_streams import ACME, RawStream
from support.servers import running

from agent360.cache.v1 import cache_pb2 as pb
from agent360.client import Mesh
from agent360.client.channel import open_channel

VALUE = b"all work and no play " * 5_000
GZIP: dict[str, Any] = {"compression": "gzip", "compression_min_bytes": 16_384}


@asynccontextmanager
async def watched(value: bytes, **settings: Any) -> AsyncIterator[CuttingProxy]:
    """A cache that holds a value, behind a proxy that counts bytes."""
    async with running("cache", **settings) as server, CuttingProxy(server.address) as proxy:
        async with Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh:
            await mesh.cache.set("k", value)
        yield proxy


async def over_the_stream(proxy: CuttingProxy) -> bytes:
    async with open_channel(proxy.address) as channel:
        get = {"namespace": "default", "key": "k"}
        stream = await RawStream.opened(channel, items=[{"id": 1, "get": get}], context=ACME)
        await stream.read_until_answered(1)
        return bytes(stream.final(1).get.lookup.value)


async def by_unary(proxy: CuttingProxy) -> bytes:
    async with open_channel(proxy.address) as channel:
        rpc = channel.unary_unary(
            "/agent360.cache.v1.CacheService/Get",
            request_serializer=pb.GetRequest.SerializeToString,
            response_deserializer=pb.GetResponse.FromString,
        )
        request = pb.GetRequest(namespace="default", key="k")
        answer = await rpc(request, metadata=(("x-agent360-tenant", "acme"),))
        return bytes(answer.lookup.value)


WAYS = pytest.mark.parametrize("ask", [over_the_stream, by_unary])


@WAYS
async def test_a_large_answer_is_compressed(ask: Any) -> None:
    async with watched(VALUE, **GZIP) as proxy:
        assert await ask(proxy) == VALUE
        assert proxy.bytes_to_client < len(VALUE) / 10


@WAYS
async def test_an_answer_below_the_threshold_is_sent_as_it_is(ask: Any) -> None:
    value = VALUE[:12_000]
    async with watched(value, **GZIP) as proxy:
        assert await ask(proxy) == value
        assert proxy.bytes_to_client > len(value)


@WAYS
async def test_without_the_setting_nothing_is_compressed(ask: Any) -> None:
    async with watched(VALUE) as proxy:
        assert await ask(proxy) == VALUE
        assert proxy.bytes_to_client > len(VALUE)


async def test_the_client_reads_compressed_answers_as_any_other() -> None:
    async with (
        watched(VALUE, **GZIP) as proxy,
        Mesh.connect(cache=proxy.address, tenant="acme", api_key="") as mesh,
    ):
        found = await mesh.cache.get_many(["k"] * 50)
        assert [each.value for each in found] == [VALUE] * 50
        assert proxy.bytes_to_client < 50 * len(VALUE) / 10
