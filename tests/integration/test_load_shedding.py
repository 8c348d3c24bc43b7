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
from agent360.client.errors import from_status

BOUND = {"shedding": {"max_in_flight": 10}}


def claim(item_id: int, priority: str = "") -> dict[str, Any]:
    context = {"tenant": "acme"}
    if priority:
        context["priority"] = f"PRIORITY_{priority}"
    return {"id": item_id, "claim": {"namespace": "n", "key": "taken"}, "context": context}


async def holding(channel: grpc.aio.Channel, calls: int) -> RawStream:
    """A stream on which so many calls of high priority wait."""
    stream = await RawStream.opened(channel, items=[claim(1_000, "HIGH")])
    await stream.read_until_answered(1_000)
    await stream.send(items=[claim(item_id, "HIGH") for item_id in range(1, calls + 1)])
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
        await mesh.cache.get("k")
        stream = await holding(channel, in_flight)
        wanted = {Priority.LOW: low, Priority.NORMAL: normal, Priority.HIGH: high}
        if low == "OVERLOADED":
            await eventually_shed(mesh)
        assert {each: await outcome(mesh, each) for each in wanted} == wanted
        stream.call.cancel()
        await eventually_served(mesh)


async def eventually_shed(mesh: Mesh) -> None:
    """Waits until the held calls are counted."""
    while await outcome(mesh, Priority.LOW) == "served":
        pass


async def eventually_served(mesh: Mesh) -> None:
    while await outcome(mesh, Priority.LOW) != "served":
        pass


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
