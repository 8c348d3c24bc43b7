"""Deadlines: given, shortened, enforced and handed on."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.polling import eventually
from support.raw_streams import ACME, CACHE, RawStream
from support.servers import running

from agent360.cache.v1 import cache_pb2 as pb
from agent360.client import DeadlineExceededError, Mesh, call_scope
from agent360.client.channel import open_channel
from agent360.client.errors import from_rpc_error
from agent360.inference.v1 import inference_pb2
from agent360.mesh.ratelimit import RateLimitServicer, RateLimitSettings
from agent360.mesh.runtime.call import Emit, Item
from agent360.mesh.runtime.policies.shedding import SheddingPolicy
from agent360.mesh.runtime.server import Server
from agent360.mesh.simulator import Simulator, SimulatorSettings

ALONE = {"cache": {"enabled": False}, "limits": {"enabled": False}}
LATE_S = 1.0
"""How much later than its deadline a call may end."""
ROUNDED = 1.1 * 1.1
"""How much longer a timeout may become on its way over two streams."""


def claim(item_id: int, key: str, seconds: float | None = None) -> dict[str, object]:
    item: dict[str, object] = {"id": item_id, "claim": {"namespace": "n", "key": key}}
    if seconds is not None:
        timeout = {"seconds": int(seconds), "nanos": int(seconds % 1 * 1e9)}
        item["context"] = {"tenant": "acme", "timeout": timeout}
    return item


def get(item_id: int, key: str) -> dict[str, object]:
    return {"id": item_id, "get": {"namespace": "n", "key": key}}


def in_progress(server: Server) -> int:
    policies = server._handlers._policies._policies
    (shedding,) = (each for each in policies if isinstance(each, SheddingPolicy))
    return shedding.in_flight


def refusal(stream: RawStream, item_id: int) -> int:
    return int(stream.final(item_id).error.code)


LATE = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


async def test_an_item_ends_at_its_own_deadline_and_its_neighbours_go_on() -> None:
    async with running("cache") as server, open_channel(server.address) as channel:
        first = await RawStream.opened(channel, items=[claim(1, "taken")], context=ACME)
        await first.read_until_answered(1)
        started = time.monotonic()
        items = [claim(2, "taken", 0.3), claim(3, "taken", 30), claim(4, "taken", 0.6)]
        await first.send(items=items, context=ACME)
        await first.read_until_answered(2)
        assert 0.3 <= time.monotonic() - started < 0.3 + LATE_S
        assert refusal(first, 2) == LATE
        assert first.final(4) is None
        await first.read_until_answered(4)
        assert 0.6 <= time.monotonic() - started < 0.6 + LATE_S
        token = first.final(1).claim.fill_token
        entry = {"namespace": "n", "key": "taken", "value": b"v"}
        fill = {"id": 5, "fill": {"fill_token": token, "entry": entry}}
        await first.send(items=[fill], context=ACME)
        await first.read_until_answered(3, 5)
        assert first.final(3).claim.lookup.value == b"v"


async def test_a_call_without_a_deadline_gets_the_default_one() -> None:
    settings = {"deadline": {"default_s": 0.3}}
    async with running("cache", **settings) as server, open_channel(server.address) as channel:
        stream = await RawStream.opened(channel, items=[claim(1, "k")], context=ACME)
        await stream.read_until_answered(1)
        started = time.monotonic()
        await stream.send(items=[claim(2, "k")], context=ACME)
        await stream.read_until_answered(2)
        assert refusal(stream, 2) == LATE
        assert 0.3 <= time.monotonic() - started < 0.3 + LATE_S


async def test_a_deadline_beyond_the_maximum_is_cut_to_it() -> None:
    settings = {"deadline": {"maximum_s": 0.3}}
    async with running("cache", **settings) as server, open_channel(server.address) as channel:
        stream = await RawStream.opened(channel, items=[claim(1, "k", 50)])
        await stream.read_until_answered(1)
        started = time.monotonic()
        await stream.send(items=[claim(2, "k", 50)])
        await stream.read_until_answered(2)
        assert refusal(stream, 2) == LATE
        assert time.monotonic() - started < 0.3 + LATE_S


async def test_the_default_deadline_is_no_longer_than_the_maximum() -> None:
    settings = {"deadline": {"default_s": 30.0, "maximum_s": 0.3}}
    async with running("cache", **settings) as server, open_channel(server.address) as channel:
        stream = await RawStream.opened(channel, items=[claim(1, "k")], context=ACME)
        await stream.read_until_answered(1)
        async with asyncio.timeout(0.3 + LATE_S):
            await stream.send(items=[claim(2, "k")], context=ACME)
            await stream.read_until_answered(2)
        assert refusal(stream, 2) == LATE


@pytest.mark.parametrize("timeout", [{}, {"nanos": -1}, {"seconds": -5}])
async def test_an_item_that_arrives_too_late_does_nothing(timeout: dict[str, int]) -> None:
    async with running("cache") as server, open_channel(server.address) as channel:
        late = {"tenant": "acme", "timeout": timeout}
        entry = {"namespace": "n", "key": "k", "value": b"v"}
        items = [{"id": 1, "set": {"entry": entry}, "context": late}, get(2, "k")]
        stream = await RawStream.opened(channel, items=items, context=ACME)
        await stream.read_until_answered(1, 2)
        assert refusal(stream, 1) == LATE
        assert stream.final(2).get.lookup.outcome == pb.OUTCOME_MISS


async def test_a_unary_call_ends_at_its_deadline_and_its_work_with_it() -> None:
    async with running("cache") as server, open_channel(server.address) as channel:
        rpc = channel.unary_unary(
            f"/{CACHE[0]}/Claim",
            request_serializer=pb.ClaimRequest.SerializeToString,
            response_deserializer=pb.ClaimResponse.FromString,
        )
        request = pb.ClaimRequest(namespace="n", key="k")
        metadata = (("x-agent360-tenant", "acme"),)
        await rpc(request, metadata=metadata)
        started = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc(request, metadata=metadata, timeout=0.3)
        assert from_rpc_error(caught.value).code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - started < 0.3 + LATE_S
        await eventually(lambda: in_progress(server) == 0)


@pytest.mark.parametrize(
    ("bound", "timeout"), [({"default_s": 0.3}, None), ({"maximum_s": 0.3}, 50.0)]
)
async def test_a_unary_call_is_bounded_by_the_service_like_an_item(
    bound: dict[str, float], timeout: float | None
) -> None:
    async with (
        running("cache", deadline=bound) as server,
        open_channel(server.address) as channel,
    ):
        rpc = channel.unary_unary(
            f"/{CACHE[0]}/Claim",
            request_serializer=pb.ClaimRequest.SerializeToString,
            response_deserializer=pb.ClaimResponse.FromString,
        )
        request = pb.ClaimRequest(namespace="n", key="k")
        metadata = (("x-agent360-tenant", "acme"),)
        await rpc(request, metadata=metadata)
        started = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc(request, metadata=metadata, timeout=timeout)
        assert 0.3 <= time.monotonic() - started < 0.3 + LATE_S
        error = from_rpc_error(caught.value)
        assert (error.code, error.reason) == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "DEADLINE_EXCEEDED",
        )
        assert in_progress(server) == 0


async def read_on(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_streamed_answer_breaks_off_at_the_deadline_after_what_was_in_time() -> None:
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.0, inter_token_s=30.0)) as simulator,
        running(
            "inference", backends=[{"url": simulator.url}], deadline={"default_s": 0.5}, **ALONE
        ) as server,
        open_channel(server.address) as channel,
    ):
        rpc = channel.unary_stream(
            "/agent360.inference.v1.InferenceService/StreamGenerate",
            request_serializer=inference_pb2.StreamGenerateRequest.SerializeToString,
            response_deserializer=inference_pb2.StreamGenerateResponse.FromString,
        )
        message = {"role": inference_pb2.ROLE_USER, "content": "Name a river"}
        request = inference_pb2.StreamGenerateRequest(
            request={"model": "sim-small", "messages": [message]}
        )
        started = time.monotonic()
        call = rpc(request, metadata=(("x-agent360-tenant", "acme"),))
        first = await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_on(call)
        assert from_rpc_error(caught.value).reason == "DEADLINE_EXCEEDED"
        assert 0.5 <= time.monotonic() - started < 0.5 + LATE_S
        assert first is not grpc.aio.EOF
        await eventually(lambda: simulator.load.running == 0)
        assert in_progress(server) == 0


STRICT = """
[[limits]]
id = "requests"
name = "inference.requests"
amount = 1_000
period = "1m"
strict = true
"""


class Listening(RateLimitServicer):
    """The ratelimit service, which notes what its callers have left."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.remaining_s: list[float] = []

    async def check(self, items: Sequence[Item], emit: Emit) -> None:
        now = time.monotonic()
        self.remaining_s += [item.call.deadline - now for item in items]
        await super().check(items, emit)


async def test_what_remains_of_a_deadline_is_the_deadline_of_calls_to_other_services(
    tmp_path: Path,
) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text(STRICT)
    limiter = Server(RateLimitSettings(ephemeral_ports=True, grace_s=1.0, limits=limits), Listening)
    await limiter.start()
    try:
        async with (
            Simulator(SimulatorSettings(port=0, first_token_s=0.0, inter_token_s=0.0)) as simulator,
            running(
                "inference",
                backends=[{"url": simulator.url}],
                cache={"enabled": False},
                limits={"timeout_s": 30.0},
                mesh={"ratelimit": limiter.address},
            ) as server,
            Mesh.connect(inference=server.address, tenant="acme", api_key="") as mesh,
        ):
            await mesh.inference.generate("Name a river", model="sim-small", timeout=2.0)
            await mesh.inference.generate("Name a river", model="sim-small", timeout=9.0)
        first, second = limiter._servicer.remaining_s
        assert 0 < first <= 2.0 * ROUNDED
        assert 2.0 * ROUNDED < second <= 9.0 * ROUNDED
    finally:
        await limiter.stop()


async def test_what_remains_of_a_deadline_goes_with_the_call_to_the_model_server() -> None:
    """Its work there ends with the caller's patience, not with the backend's own timeout."""
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=30.0)) as simulator,
        running("inference", backends=[{"url": simulator.url}], **ALONE) as server,
        Mesh.connect(inference=server.address, tenant="acme", api_key="") as mesh,
    ):
        started = time.monotonic()
        asking = asyncio.create_task(
            mesh.inference.generate("Name a river", model="sim-small", timeout=0.5)
        )
        await eventually(lambda: simulator.load.running == 1)
        with pytest.raises(DeadlineExceededError):
            await asking
        assert time.monotonic() - started < 0.5 + LATE_S
        await eventually(lambda: simulator.load.running == 0)
        assert in_progress(server) == 0


async def test_a_scope_bounds_everything_inside_and_none_can_stretch_it() -> None:
    async with (
        running("cache") as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        await mesh.cache.claim("k", fill_timeout=60)
        started = time.monotonic()
        with call_scope(timeout=0.3):
            for timeout in (None, 20.0):
                with pytest.raises(DeadlineExceededError):
                    await mesh.cache.claim("k", timeout=timeout)
            with call_scope(timeout=20.0), pytest.raises(DeadlineExceededError):
                await mesh.cache.get("k")
        assert time.monotonic() - started < 0.3 + LATE_S
        assert not (await mesh.cache.get("k")).hit


async def test_a_timeout_shorter_than_the_scopes_holds_for_its_call_alone() -> None:
    async with (
        running("cache") as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        await mesh.cache.claim("k", fill_timeout=60)
        with call_scope(timeout=20.0):
            with pytest.raises(DeadlineExceededError):
                await mesh.cache.claim("k", timeout=0.2)
            assert not (await mesh.cache.get("k")).hit
