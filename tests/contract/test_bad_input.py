"""Bad input, as a stranger sends it: every fault is named, nobody else is harmed."""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from support.raw_streams import ACME, CACHE, INFERENCE, RawStream
from support.servers import running

from agent360.cache.v1 import cache_pb2 as pb
from agent360.client import InvalidRequestError, Mesh, MeshError
from agent360.client.channel import MAX_MESSAGE_BYTES, open_channel
from agent360.client.errors import from_rpc_error, from_status
from agent360.mesh.runtime.server import Server
from agent360.mesh.simulator import Simulator, SimulatorSettings
from agent360.ratelimit.v1 import ratelimit_pb2

RATELIMIT = ("agent360.ratelimit.v1.RateLimitService", ratelimit_pb2)
METADATA = (("x-agent360-tenant", "acme"),)
LONG = "k" * 1_025
ENTRY = {"namespace": "n", "key": "k", "value": b"v"}
NEGATIVE = {"seconds": -1}
USER = {"role": "ROLE_USER", "content": "Hello"}

CASES: dict[str, list[tuple[str, dict[str, Any], set[str]]]] = {
    "cache": [
        ("Get", {}, {"namespace", "key"}),
        ("Get", {"namespace": "n", "key": LONG}, {"key"}),
        ("Get", {"namespace": "n" * 129, "key": "k"}, {"namespace"}),
        ("Set", {}, {"entry.namespace", "entry.key"}),
        ("Set", {"entry": {**ENTRY, "key": ""}}, {"entry.key"}),
        ("Set", {"entry": {**ENTRY, "ttl": NEGATIVE}}, {"entry.ttl"}),
        ("Set", {"entry": {**ENTRY, "ttl": {}}}, {"entry.ttl"}),
        ("Set", {"entry": {**ENTRY, "stale_ttl": NEGATIVE}}, {"entry.stale_ttl"}),
        ("Set", {"entry": {**ENTRY, "tags": [""]}}, {"entry.tags[0]"}),
        ("Set", {"entry": {**ENTRY, "tags": ["t" * 300]}}, {"entry.tags[0]"}),
        ("Set", {"entry": {**ENTRY, "value": bytes(9 * 2**20)}}, {"entry.value"}),
        ("Delete", {"namespace": "n"}, {"key"}),
        ("Claim", {"namespace": "n", "key": "k", "fill_timeout": NEGATIVE}, {"fill_timeout"}),
        ("BatchGet", {"namespace": "n"}, {"keys"}),
        ("BatchGet", {"namespace": "n", "keys": ["", "k", LONG]}, {"keys[0]", "keys[2]"}),
        ("Invalidate", {"namespace": "n"}, {"scope"}),
        ("GetStats", {"page_size": -1}, {"page_size"}),
        ("GetStats", {"page_token": "nonsense"}, {"page_token"}),
    ],
    "ratelimit": [
        ("Check", {}, {"name"}),
        ("Check", {"name": "n" * 129}, {"name"}),
        ("Check", {"name": "n", "descriptor": {"A b": "x"}}, {"descriptor[A b]"}),
        ("Check", {"name": "n", "descriptor": {"tenant": "x"}}, {"descriptor[tenant]"}),
        ("Check", {"name": "n", "descriptor": {"k": "v" * 300}}, {"descriptor[k]"}),
        ("Check", {"name": "", "descriptor": {"tenant": "x"}}, {"name", "descriptor[tenant]"}),
        ("Reserve", {"name": "n"}, {"tokens"}),
        ("Reserve", {"name": "n", "tokens": 5, "ttl": NEGATIVE}, {"ttl"}),
        ("BatchCheck", {}, {"requests"}),
        ("BatchCheck", {"requests": [{"name": "a"}, {}]}, {"requests[1].name"}),
        ("ListLimits", {"page_size": -1}, {"page_size"}),
        ("ListLimits", {"page_token": "x"}, {"page_token"}),
        ("ListLimits", {"read_mask": {"paths": ["no_such"]}}, {"read_mask"}),
    ],
    "metrics": [
        ("Query", {}, {"name", "aggregation"}),
        ("ListSeries", {"page_size": -5}, {"page_size"}),
        ("ListSeries", {"read_mask": {"paths": ["no_such"]}}, {"read_mask"}),
    ],
    "inference": [
        ("Generate", {}, {"messages", "model"}),
        ("Generate", {"model": "m", "messages": [{"content": "x"}]}, {"messages[0].role"}),
        (
            "Generate",
            {"model": "m", "messages": [USER], "sampling": {"temperature": -1}},
            {"sampling.temperature"},
        ),
        ("ListModels", {"page_size": -1}, {"page_size"}),
    ],
}
FLAT = [(name, *case) for name, cases in CASES.items() for case in cases]


async def served(name: str) -> AsyncIterator[Server]:
    settings = {"backends": ()} if name == "inference" else {}
    async with running(name, **settings) as server:
        yield server


def case_id(value: object) -> str:
    shown = sorted(value) if isinstance(value, set) else value
    return re.sub(r"\W+", "-", str(shown))[:40] if not isinstance(shown, str) else shown


@pytest.mark.parametrize(("name", "method", "request_", "fields"), FLAT, ids=case_id)
async def test_every_fault_of_a_request_is_named_by_its_field(
    name: str, method: str, request_: dict[str, Any], fields: set[str]
) -> None:
    async for server in served(name):
        service = next(
            each.descriptor
            for each in server._servicer.definitions
            if method in each.descriptor.methods_by_name
        )
        described = service.methods_by_name[method]
        request_class = GetMessageClass(described.input_type)
        async with open_channel(server.address) as channel:
            rpc = channel.unary_unary(
                f"/{service.full_name}/{method}",
                request_serializer=request_class.SerializeToString,
                response_deserializer=GetMessageClass(described.output_type).FromString,
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rpc(request_class(**request_), metadata=METADATA, timeout=10)
        error = from_rpc_error(caught.value)
        assert isinstance(error, InvalidRequestError), error
        assert error.reason == "INVALID_REQUEST"
        named = {each.field for each in error.violations}
        assert all(any(field in each for each in named) for field in fields), named
        assert len(named) == len(fields), named
        assert all(each.description for each in error.violations)


@pytest.mark.parametrize(
    ("name", "service", "bad", "good"),
    [
        ("cache", CACHE, {"get": {}}, {"get": {"namespace": "n", "key": "k"}}),
        ("cache", CACHE, {"set": {}}, {"set": {"entry": ENTRY}}),
        ("ratelimit", RATELIMIT, {"check": {}}, {"check": {"name": "n"}}),
        (
            "inference",
            INFERENCE,
            {"generate": {}},
            {"count_tokens": {"request": {"messages": [USER], "model": "none"}}},
        ),
    ],
)
async def test_a_bad_item_harms_no_neighbour(
    name: str, service: Any, bad: dict[str, Any], good: dict[str, Any]
) -> None:
    async for server in served(name):
        async with open_channel(server.address) as channel:
            items = [{"id": 1, **good}, {"id": 2, **bad}, {"id": 3, **good}]
            stream = await RawStream.opened(channel, service, items=items, context=ACME)
            await stream.read_until_answered(1, 2, 3)
            error = from_status(stream.final(2).error)
            assert isinstance(error, InvalidRequestError)
            for each in (1, 3):
                result = stream.final(each)
                if result.HasField("error"):  # the inference service has no model here
                    assert from_status(result.error).reason in {"NO_MODELS", "MODEL_UNKNOWN"}


async def test_a_page_token_is_good_for_its_own_tenant_alone() -> None:
    async with (
        running("cache") as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
        open_channel(server.address) as channel,
    ):
        for tenant in ("acme", "globex"):
            for namespace in ("a", "b", "c"):
                await mesh.cache.set("k", b"v", namespace=namespace, tenant=tenant)
        rpc = channel.unary_unary(
            "/agent360.cache.v1.CacheService/GetStats",
            request_serializer=pb.GetStatsRequest.SerializeToString,
            response_deserializer=pb.GetStatsResponse.FromString,
        )
        first = await rpc(pb.GetStatsRequest(page_size=1), metadata=METADATA)
        token = first.next_page_token
        assert token
        again = pb.GetStatsRequest(page_size=1, page_token=token)
        await rpc(again, metadata=METADATA)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc(again, metadata=(("x-agent360-tenant", "globex"),))
        assert from_rpc_error(caught.value).reason == "INVALID_REQUEST"


# ---------------------------------------------------------------- what is not even a request


async def test_bytes_that_are_no_message_end_the_call_and_nothing_else() -> None:
    async with (
        running("cache") as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
        open_channel(server.address) as channel,
    ):
        await mesh.cache.set("k", b"v")
        garbage = os.urandom(1_000)
        unary = channel.unary_unary("/agent360.cache.v1.CacheService/Get")
        with pytest.raises(grpc.aio.AioRpcError):
            await unary(b"\xff" + garbage, metadata=METADATA, timeout=5)
        stream: Any = channel.stream_stream("/agent360.cache.v1.CacheService/Pipeline")
        call = stream(timeout=5)
        await call.write(b"\xff" + garbage)
        assert await call.code() is not grpc.StatusCode.OK
        assert (await mesh.cache.get("k")).hit


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01", b"\x00"])
async def test_another_protocol_on_the_grpc_port_is_dropped(first: bytes) -> None:
    async with (
        running("cache") as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        for _ in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(first + os.urandom(10_000))
            writer.close()
        assert (await mesh.cache.set("k", b"v")).stored


async def test_garbage_on_the_http_port_is_answered_or_dropped() -> None:
    async with running("cache") as server:
        for _ in range(5):
            _, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
            writer.write(os.urandom(10_000))
            writer.close()
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{server.http_port}/readyz") as answer,
        ):
            assert answer.status == 200


async def test_a_message_beyond_the_bound_is_refused_and_the_service_goes_on() -> None:
    async with (
        running("cache") as server,
        open_channel(server.address, max_message_bytes=64 * 2**20) as channel,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        large = {**ENTRY, "value": bytes(MAX_MESSAGE_BYTES + 1)}
        stream = RawStream(channel)
        await stream.send(items=[{"id": 1, "set": {"entry": large}}], context=ACME)
        error = await stream.read_to_the_end()
        assert error is not None
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(MeshError) as caught:
            await mesh.cache.set("k", bytes(MAX_MESSAGE_BYTES + 1))
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "bytes" in caught.value.message
        assert (await mesh.cache.set("k", b"v")).stored


# ---------------------------------------------------------------- models


async def test_an_unknown_model_is_named_with_those_there_are() -> None:
    async with (
        Simulator(SimulatorSettings(port=0)) as simulator,
        running("inference", backends=[{"url": simulator.url}]) as server,
        Mesh.connect(inference=server.address, tenant="acme", api_key="") as mesh,
    ):
        with pytest.raises(MeshError) as caught:
            await mesh.inference.generate("Hello", model="no-such-model")
        assert caught.value.reason == "MODEL_UNKNOWN"
        assert "sim-small" in caught.value.message


async def test_a_prompt_of_10_mb_is_refused_by_its_field_or_answered() -> None:
    text = "all work and no play " * (10 * 2**20 // 21)
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.0, inter_token_s=0.0)) as simulator,
        running("inference", backends=[{"url": simulator.url}]) as server,
        Mesh.connect(inference=server.address, tenant="acme", api_key="") as mesh,
    ):
        with pytest.raises(MeshError) as caught:
            await mesh.inference.generate(text, model="sim-small")
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "bytes" in str(caught.value)
        assert (await mesh.inference.generate("Hello", model="sim-small")).text
