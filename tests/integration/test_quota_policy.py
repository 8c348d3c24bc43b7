"""Quotas: every call of a service is charged to the limits named like its method."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.raw_streams import ACME, RawStream
from support.redis_servers import RedisServer
from support.servers import running

from agent360.client import CheckRequest, Mesh, MeshError, RateLimitedError
from agent360.client.channel import open_channel
from agent360.client.errors import from_rpc_error, from_status
from agent360.mesh.runtime.policies.authentication import hash_key
from agent360.mesh.runtime.server import Server

NOBODY = "127.0.0.1:1"
LIMITS = """
[[limits]]
id = "gets"
name = "agent360.cache.v1.CacheService/Get"
algorithm = "fixed_window"
amount = 5
period = "10h"

[[limits]]
id = "checks"
name = "agent360.ratelimit.v1.RateLimitService/*"
tenant = "small"
algorithm = "fixed_window"
amount = 3
period = "10h"
"""


@pytest.fixture
def limits(tmp_path: Path) -> Path:
    file = tmp_path / "limits.toml"
    file.write_text(LIMITS)
    return file


def asking(address: str, **quota: Any) -> dict[str, Any]:
    """Settings of a service whose quota is decided at an address."""
    return {"quota": {"enabled": True, **quota}, "mesh": {"ratelimit": address}}


def unasked(server: Server) -> int:
    policies = server._handlers._policies._policies
    (found,) = (each.unasked for each in policies if hasattr(each, "unasked"))
    return int(found)


async def test_a_tenant_is_served_up_to_its_limit_and_others_up_to_theirs(limits: Path) -> None:
    async with (
        running("ratelimit", limits=limits) as limiter,
        running("cache", **asking(limiter.address)) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        for _ in range(5):
            await mesh.cache.get("k")
        with pytest.raises(RateLimitedError) as caught:
            await mesh.cache.get("k")
        assert caught.value.metadata["limit_id"] == "gets"
        assert caught.value.retry_after_s is not None
        assert caught.value.quotas[0].subject == "tenant:acme"
        assert (await mesh.cache.set("k", b"v")).stored, "the limit is that of Get alone"
        assert not (await mesh.cache.get("k", tenant="globex")).hit


async def test_of_a_message_as_many_calls_are_served_as_the_limit_admits(limits: Path) -> None:
    async with (
        running("ratelimit", limits=limits) as limiter,
        running("cache", **asking(limiter.address)) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        found = await mesh.cache.get_many(f"k{n}" for n in range(20))
        denied = [each for each in found if isinstance(each, MeshError)]
        assert len(denied) == 15
        assert {each.reason for each in denied} == {"RATE_LIMITED"}


async def test_the_first_of_a_message_are_served_and_the_others_told_when_to_come_back(
    limits: Path,
) -> None:
    async with (
        running("ratelimit", limits=limits) as limiter,
        running("cache", **asking(limiter.address)) as server,
        open_channel(server.address) as channel,
    ):
        items: list[dict[str, Any]] = [
            {"id": number, "get": {"namespace": "n", "key": "k"}} for number in range(1, 9)
        ]
        entry = {"namespace": "n", "key": "other", "value": b"v"}
        items.append({"id": 9, "set": {"entry": entry}})
        stream = await RawStream.opened(channel, items=items, context=ACME)
        await stream.read_until_answered(*range(1, 10))
        served = [number for number in range(1, 10) if not stream.final(number).HasField("error")]
        assert served == [1, 2, 3, 4, 5, 9]
        for number in (6, 7, 8):
            error = from_status(stream.final(number).error)
            assert isinstance(error, RateLimitedError)
            assert error.retry_after_s is not None
            assert error.retry_after_s > 0


@pytest.mark.parametrize("when_away", ["open", "closed"])
async def test_a_unary_call_meets_an_absent_ratelimit_service_like_an_item(when_away: str) -> None:
    from agent360.cache.v1 import cache_pb2 as pb

    async with (
        running("cache", **asking(NOBODY, timeout_s=0.1, when_away=when_away)) as server,
        open_channel(server.address) as channel,
    ):
        rpc = channel.unary_unary(
            "/agent360.cache.v1.CacheService/Get",
            request_serializer=pb.GetRequest.SerializeToString,
            response_deserializer=pb.GetResponse.FromString,
        )
        metadata = (("x-agent360-tenant", "acme"),)
        call = rpc(pb.GetRequest(namespace="n", key="k"), metadata=metadata)
        if when_away == "open":
            assert (await call).lookup.outcome == pb.OUTCOME_MISS
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert from_rpc_error(caught.value).reason == "QUOTA_UNKNOWN"
        assert unasked(server) == 1


async def test_unary_calls_are_charged_like_items(limits: Path) -> None:
    from agent360.cache.v1 import cache_pb2 as pb

    async with (
        running("ratelimit", limits=limits) as limiter,
        running("cache", **asking(limiter.address)) as server,
        open_channel(server.address) as channel,
    ):
        rpc = channel.unary_unary(
            "/agent360.cache.v1.CacheService/Get",
            request_serializer=pb.GetRequest.SerializeToString,
            response_deserializer=pb.GetResponse.FromString,
        )
        codes = []
        for _ in range(7):
            call = rpc(
                pb.GetRequest(namespace="n", key="k"), metadata=(("x-agent360-tenant", "acme"),)
            )
            codes.append(await call.code())
        assert codes == [grpc.StatusCode.OK] * 5 + [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2


async def test_while_the_ratelimit_service_is_away_calls_are_served_and_counted() -> None:
    async with (
        running("cache", **asking(NOBODY, timeout_s=0.1)) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        for _ in range(3):
            assert not (await mesh.cache.get("k")).hit
        assert unasked(server) == 3


async def test_where_it_must_be_asked_calls_are_refused_while_it_is_away() -> None:
    async with (
        running("cache", **asking(NOBODY, timeout_s=0.1, when_away="closed")) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        with pytest.raises(MeshError) as caught:
            await mesh.cache.get("k")
        assert (caught.value.code, caught.value.reason) == (
            grpc.StatusCode.UNAVAILABLE,
            "QUOTA_UNKNOWN",
        )
        assert caught.value.retry_after_s is not None


async def test_it_is_asked_again_as_soon_as_it_is_back(limits: Path) -> None:
    async with running("ratelimit", limits=limits) as first:
        port = first.port
    async with (
        running("cache", **asking(f"127.0.0.1:{port}", timeout_s=0.1)) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        for _ in range(10):
            await mesh.cache.get("k")
        async with running("ratelimit", limits=limits, port=port):
            outcomes = []
            async with asyncio.timeout(20):
                while "RATE_LIMITED" not in outcomes:
                    (found,) = await mesh.cache.get_many(["k"], timeout=5)
                    outcomes.append(found.reason if isinstance(found, MeshError) else "served")
            assert outcomes.count("served") >= 5


async def test_the_meshs_own_services_are_exempt(limits: Path) -> None:
    keys = [
        {"name": "mesh", "sha256": hash_key("key-mesh"), "tenants": ("*",), "service": True},
        {"name": "user", "sha256": hash_key("key-user"), "tenants": ("*",)},
    ]
    async with (
        running("ratelimit", limits=limits) as limiter,
        running("cache", **asking(limiter.address), authentication={"keys": keys}) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="key-mesh") as own,
        Mesh.connect(cache=server.address, tenant="acme", api_key="key-user") as others,
    ):
        for _ in range(10):
            await own.cache.get("k")
        found = await others.cache.get_many(["k"] * 10)
        assert sum(isinstance(each, MeshError) for each in found) == 5


async def test_the_ratelimit_service_limits_its_own_callers(limits: Path) -> None:
    async with (
        running("ratelimit", limits=limits) as server,
        Mesh.connect(ratelimit=server.address, tenant="small", api_key="") as mesh,
    ):
        found = await mesh.ratelimit.check_many(CheckRequest("free") for _ in range(10))
        assert sum(isinstance(each, MeshError) for each in found) == 7
        assert (await mesh.ratelimit.check("free", tenant="acme")).allowed


async def test_the_ratelimit_service_too_exempts_the_meshs_own_services(limits: Path) -> None:
    keys = [
        {"name": "mesh", "sha256": hash_key("key-mesh"), "tenants": ("*",), "service": True},
        {"name": "user", "sha256": hash_key("key-user"), "tenants": ("*",)},
    ]
    async with (
        running("ratelimit", limits=limits, authentication={"keys": keys}) as server,
        Mesh.connect(ratelimit=server.address, tenant="small", api_key="key-mesh") as own,
        Mesh.connect(ratelimit=server.address, tenant="small", api_key="key-user") as others,
    ):
        for mesh, denied in ((own, 0), (others, 7)):
            found = await mesh.ratelimit.check_many(CheckRequest("free") for _ in range(10))
            assert sum(isinstance(each, MeshError) for each in found) == denied


async def test_the_ratelimit_service_limits_its_own_callers_by_its_shared_store(
    limits: Path,
) -> None:
    async with (
        RedisServer() as redis,
        running("ratelimit", limits=limits, store=redis.url, answer_s=2) as server,
        Mesh.connect(ratelimit=server.address, tenant="small", api_key="") as mesh,
    ):
        found = await mesh.ratelimit.check_many(CheckRequest("free") for _ in range(10))
        assert sum(isinstance(each, MeshError) for each in found) == 7
        assert (await mesh.ratelimit.check("free", tenant="acme")).allowed


async def test_a_limit_for_any_name_does_not_count_a_check_twice(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    _ = file.write_text('[[limits]]\nid = "any"\namount = 5\nperiod = "10h"\n')
    async with (
        running("ratelimit", limits=file) as server,
        Mesh.connect(ratelimit=server.address, tenant="acme", api_key="") as mesh,
    ):
        assert [(await mesh.ratelimit.check("x")).remaining for _ in range(5)] == [4, 3, 2, 1, 0]


async def test_a_quota_is_charged_by_leases_with_little_asked(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    _ = file.write_text(
        '[[limits]]\nid = "gets"\nname = "agent360.cache.v1.CacheService/Get"\n'
        'algorithm = "fixed_window"\namount = 1000\nperiod = "10h"\n'
    )
    async with (
        running("ratelimit", limits=file) as limiter,
        running("cache", **asking(limiter.address)) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        served = 0
        for _ in range(1_200):
            (found,) = await mesh.cache.get_many(["k"])
            served += not isinstance(found, MeshError)
        assert served == 1_000
