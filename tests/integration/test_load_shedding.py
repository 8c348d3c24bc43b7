"""Load shedding: beyond the bound the least important calls are refused at once."""

from typing import Any

import grpc
import pytest
from support.polling import eventually
from support.raw_streams import RawStream
from support.servers import running

from agent360.cache.v1 import cache_pb2 as pb
from agent360.client import Mesh, MeshError, Priority, call_scope
from agent360.client.channel import open_channel
from agent360.client.errors import from_rpc_error, from_status
from agent360.mesh.runtime.policies.shedding import SheddingPolicy
from agent360.mesh.runtime.server import Server

BOUND = {"shedding": {"max_in_flight": 10}}


def claim(item_id: int, priority: str = "") -> dict[str, Any]:
    context = {"tenant": "acme"}
    if priority:
        context["priority"] = f"PRIORITY_{priority}"
    return {"id": item_id, "claim": {"namespace": "n", "key": "taken"}, "context": context}


def in_progress(server: Server) -> int:
    policies = server._handlers._policies._policies
    (shedding,) = (each for each in policies if isinstance(each, SheddingPolicy))
    return shedding.in_flight


async def holding(server: Server, channel: grpc.aio.Channel, calls: int) -> RawStream:
    """A stream on which so many calls of high priority wait."""
    stream = await RawStream.opened(channel, items=[claim(1_000, "HIGH")])
    await stream.read_until_answered(1_000)
    await stream.send(items=[claim(item_id, "HIGH") for item_id in range(1, calls + 1)])
    await eventually(lambda: in_progress(server) == calls)
    return stream


async def outcome(mesh: Mesh, priority: Priority) -> str:
    """What becomes of a cheap call."""
    with call_scope(priority=priority):
        (found,) = await mesh.cache.get_many(["k"], timeout=5)
    if not isinstance(found, MeshError):
        return "served"
    assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert found.retry_after_s is not None
    assert found.retry_after_s > 0
    return found.reason


@pytest.mark.parametrize(
    ("in_flight", "low", "normal", "high"),
    [
        (7, "served", "served", "served"),
        (8, "OVERLOADED", "served", "served"),
        (9, "OVERLOADED", "OVERLOADED", "served"),
        (10, "OVERLOADED", "OVERLOADED", "OVERLOADED"),
    ],
)
async def test_low_priority_is_shed_first_and_high_last(
    in_flight: int, low: str, normal: str, high: str
) -> None:
    async with (
        running("cache", **BOUND) as server,
        open_channel(server.address) as channel,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        stream = await holding(server, channel, in_flight)
        wanted = {Priority.LOW: low, Priority.NORMAL: normal, Priority.HIGH: high}
        assert {each: await outcome(mesh, each) for each in wanted} == wanted
        stream.call.cancel()
        await eventually(lambda: in_progress(server) == 0)
        assert await outcome(mesh, Priority.LOW) == "served"


async def test_of_one_message_as_many_items_are_served_as_there_is_room_for() -> None:
    async with running("cache", **BOUND) as server, open_channel(server.address) as channel:
        stream = await RawStream.opened(channel, items=[claim(1_000, "HIGH")])
        await stream.read_until_answered(1_000)
        await stream.send(items=[claim(item_id) for item_id in range(1, 31)])
        await eventually_read(stream, 21)
        reasons = {
            item_id: from_status(stream.final(item_id).error).reason for item_id in range(10, 31)
        }
        assert set(reasons.values()) == {"OVERLOADED"}
        assert all(stream.final(item_id) is None for item_id in range(1, 10))
        entry = {"namespace": "n", "key": "taken", "value": b"v"}
        token = stream.final(1_000).claim.fill_token
        fill = {"id": 2_000, "fill": {"fill_token": token, "entry": entry}}
        await stream.send(items=[{**fill, "context": claim(1, "HIGH")["context"]}])
        await stream.read_until_answered(*range(1, 10))
        assert all(stream.final(n).claim.lookup.value == b"v" for n in range(1, 10))


async def eventually_read(stream: RawStream, answers: int) -> None:
    while len(stream.answers()) < answers + 1:
        assert await stream.read()


async def test_unary_calls_count_and_are_shed_like_items() -> None:
    async with running("cache", **BOUND) as server, open_channel(server.address) as channel:
        rpc = channel.unary_unary(
            "/agent360.cache.v1.CacheService/Claim",
            request_serializer=pb.ClaimRequest.SerializeToString,
            response_deserializer=pb.ClaimResponse.FromString,
        )
        metadata = (("x-agent360-tenant", "acme"), ("x-agent360-priority", "low"))
        request = pb.ClaimRequest(namespace="n", key="k")
        await rpc(request, metadata=metadata)
        waiting = [rpc(request, metadata=metadata, timeout=30) for _ in range(9)]
        await eventually(lambda: sum(each.done() for each in waiting) == 1)
        (shed,) = (each for each in waiting if each.done())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await shed
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for each in waiting:
            each.cancel()


@pytest.mark.parametrize(
    ("in_flight", "shed"),
    [(7, ()), (8, ("low",)), (9, ("low", "normal", "")), (10, ("low", "normal", "", "high"))],
)
async def test_a_unary_call_is_shed_by_its_priority_and_told_when_to_come_back(
    in_flight: int, shed: tuple[str, ...]
) -> None:
    async with running("cache", **BOUND) as server, open_channel(server.address) as channel:
        await holding(server, channel, in_flight)
        rpc = channel.unary_unary(
            "/agent360.cache.v1.CacheService/Get",
            request_serializer=pb.GetRequest.SerializeToString,
            response_deserializer=pb.GetResponse.FromString,
        )
        for priority in ("low", "normal", "", "high"):
            metadata = [("x-agent360-tenant", "acme")]
            if priority:
                metadata.append(("x-agent360-priority", priority))
            call = rpc(pb.GetRequest(namespace="n", key="k"), metadata=metadata)
            if priority not in shed:
                assert (await call).lookup.outcome == pb.OUTCOME_MISS
                continue
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            error = from_rpc_error(caught.value)
            assert (error.code, error.reason) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "OVERLOADED",
            )
            assert error.retry_after_s is not None
            assert error.retry_after_s > 0
        assert in_progress(server) == in_flight


async def test_however_calls_end_they_make_room_for_others() -> None:
    """Answered, refused, shed, withdrawn and broken off in one stream: none is counted for ever."""
    async with running("cache", **BOUND) as server, open_channel(server.address) as channel:
        stream = await holding(server, channel, 5)
        nameless = {"namespace": "n", "key": ""}
        foreign = {"tenant": "Not A Tenant"}
        get = {"namespace": "n", "key": "k"}
        high = {"tenant": "acme", "priority": "PRIORITY_HIGH"}
        items = [
            {"id": 20, "get": nameless, "context": high},
            {"id": 21, "get": get, "context": foreign},
            {"id": 22, "get": get, "context": high},
            *(claim(item_id, "LOW") for item_id in range(30, 40)),
        ]
        await stream.send(items=items)
        await stream.read_until_answered(20, 21, 22, 39)
        await stream.send(cancels=[1, 2])
        await stream.read_until_answered(1, 2)
        open_now = sum(stream.final(n) is None for n in (*range(1, 6), *range(30, 40)))
        assert in_progress(server) == open_now
        stream.call.cancel()
        await eventually(lambda: in_progress(server) == 0)
