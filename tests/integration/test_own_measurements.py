"""What a service records of its calls: counts, durations, log lines, and its own bugs."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
from support.polling import eventually
from support.servers import running

from agent360.cache.v1 import cache_pb2 as pb
from agent360.client import Mesh, MeshError, call_scope
from agent360.client.channel import open_channel
from agent360.mesh.runtime.policies.authentication import hash_key
from agent360.mesh.runtime.server import Server

METHOD = "/agent360.cache.v1.CacheService/Get"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """The log, line by line."""
    found: list[dict[str, Any]] = []

    def keep(_: Any, level: str, event: dict[str, Any]) -> dict[str, Any]:
        found.append({**event, "level": level})
        raise structlog.DropEvent

    before = structlog.get_config()["processors"]
    structlog.configure(processors=[keep])
    yield found
    structlog.configure(processors=before)


async def unary(address: str, key: str, tenant: str = "acme") -> None:
    async with open_channel(address) as channel:
        rpc = channel.unary_unary(
            METHOD,
            request_serializer=pb.GetRequest.SerializeToString,
            response_deserializer=pb.GetResponse.FromString,
        )
        await rpc(pb.GetRequest(namespace="n", key=key), metadata=(("x-agent360-tenant", tenant),))


def count(server: Server, kind: str, code: str) -> float | None:
    labels = {
        "grpc_type": kind,
        "grpc_service": "agent360.cache.v1.CacheService",
        "grpc_method": "Get",
        "grpc_code": code,
    }
    return server.registry.get_sample_value("grpc_server_handled_total", labels)


async def test_items_and_unary_calls_are_counted_and_timed_alike() -> None:
    async with (
        running("cache") as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        await mesh.cache.get_many(["k"] * 300)
        for _ in range(3):
            await unary(server.address, "k")
        for _ in range(2):
            with pytest.raises(MeshError):
                await mesh.cache.get("")
        with pytest.raises(Exception, match="INVALID"):
            await unary(server.address, "")
        await eventually(lambda: count(server, "pipeline_item", "OK") == 300)
        assert count(server, "pipeline_item", "InvalidArgument") == 2
        assert count(server, "unary", "OK") == 3
        assert count(server, "unary", "InvalidArgument") == 1
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{server.http_port}/metrics") as answer,
        ):
            text = await answer.text()
        timed = [
            line
            for line in text.splitlines()
            if line.startswith("grpc_server_handling_seconds_count") and 'method="Get"' in line
        ]
        assert sorted(float(line.rpartition(" ")[2]) for line in timed) == [4.0, 302.0]


async def test_what_a_service_counted_can_be_queried_by_its_tenant() -> None:
    async with (
        running("metrics") as metrics,
        running("cache", mesh={"metrics": metrics.address}) as server,
        Mesh.connect(
            cache=server.address, metrics=metrics.address, tenant="acme", api_key=""
        ) as mesh,
    ):
        await mesh.cache.get_many(["k"] * 7)
        await mesh.cache.get("k", tenant="globex")
        wanted = {"service": "cache", "method": "Get", "code": "OK"}
        labels: list[dict[str, str]] = []
        async with asyncio.timeout(20):
            while wanted not in labels:
                found = mesh.metrics.list_series("mesh_requests")
                labels = [dict(series.labels) async for series in found]


async def test_a_failed_call_is_logged_with_who_made_it_and_a_served_one_is_not(
    lines: list[dict[str, Any]],
) -> None:
    async with (
        running("cache") as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        await mesh.cache.get("k")
        with (
            call_scope(traceparent=TRACEPARENT, request_id="r-1"),
            pytest.raises(MeshError),
        ):
            await mesh.cache.get("")
    (line,) = (each for each in lines if each["event"] == "call")
    assert line["method"] == METHOD
    assert line["code"] == "INVALID_ARGUMENT"
    assert line["tenant"] == "acme"
    assert line["principal"] == "anonymous"
    assert line["request_id"] == "r-1"
    assert line["trace_id"] == TRACEPARENT[3:35]
    assert line["span_id"] == TRACEPARENT[36:52]
    assert line["duration_ms"] >= 0
    assert line["peer"].startswith("ipv4:127.0.0.1:")


async def test_a_call_refused_at_the_door_is_counted_and_logged_without_its_claims(
    lines: list[dict[str, Any]],
) -> None:
    keys = [{"name": "one", "sha256": hash_key("key-one"), "tenants": ("acme",)}]
    async with running("cache", authentication={"keys": keys}) as server:
        with pytest.raises(Exception, match="UNAUTHENTICATED"):
            await unary(server.address, "k")
        assert count(server, "unary", "Unauthenticated") == 1
    (line,) = (each for each in lines if each["event"] == "call")
    assert (line["code"], line["method"], line["tenant"]) == ("UNAUTHENTICATED", METHOD, "")
    assert line["peer"].startswith("ipv4:127.0.0.1:")


@pytest.mark.parametrize(("access", "expected"), [("off", 0), ("errors", 1), ("all", 2)])
async def test_the_setting_says_which_calls_are_logged(
    lines: list[dict[str, Any]], access: str, expected: int
) -> None:
    async with running("cache", log={"access": access}) as server:
        await unary(server.address, "k")
        with pytest.raises(Exception, match="INVALID"):
            await unary(server.address, "")
    assert sum(each["event"] == "call" for each in lines) == expected


async def test_a_slow_call_is_logged_though_it_succeeded(lines: list[dict[str, Any]]) -> None:
    async with running("cache", log={"slow_s": 1e-6}) as server:
        await unary(server.address, "k")
    assert [each["code"] for each in lines if each["event"] == "call"] == ["OK"]


async def test_a_bug_is_told_by_an_id_that_is_in_the_log_and_by_nothing_else(
    lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("inner-detail")

    async with (
        running("cache") as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        monkeypatch.setattr(server._servicer._service, "find", broken)
        with pytest.raises(MeshError) as caught:
            await mesh.cache.get("k")
        assert caught.value.reason == "INTERNAL"
        assert "inner-detail" not in str(caught.value)
        (line,) = (each for each in lines if each["event"] == "internal error")
        assert caught.value.metadata["error_id"] == line["error_id"]
        assert line["error_id"] in caught.value.message
        assert isinstance(line["exc_info"], KeyError)
        assert (await mesh.cache.set("k", b"v")).stored, "the stream goes on"


async def test_what_was_denied_is_an_audit_event_of_the_tenant_or_of_the_mesh(
    tmp_path: Path,
) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text(
        '[[limits]]\nid = "gets"\nname = "agent360.cache.v1.CacheService/Get"\namount = 2\n'
        'period = "10h"\nalgorithm = "fixed_window"\n'
    )
    keys = [{"name": "one", "sha256": hash_key("key-one"), "tenants": ("acme",)}]
    async with (
        running("metrics") as metrics,
        running("ratelimit", limits=limits) as limiter,
        Mesh.connect(metrics=metrics.address, tenant="acme", api_key="") as mesh,
    ):
        async with (
            running(
                "cache",
                quota={"enabled": True},
                authentication={"keys": keys},
                mesh={"metrics": metrics.address, "ratelimit": limiter.address},
            ) as server,
            Mesh.connect(cache=server.address, api_key="key-one") as caller,
        ):
            await caller.cache.get_many(["k"] * 5)
            with pytest.raises(MeshError):
                await caller.cache.get("k", tenant="globex")
        (limited,) = [each async for each in mesh.audit.list_events(action="mesh.calls.deny")]
        found = mesh.audit.list_events(action="mesh.calls.deny", tenant="agent360-mesh")
        (forbidden,) = [each async for each in found]
    assert limited.resource == "agent360.cache.v1.CacheService/Get"
    assert dict(limited.attributes) == {"code": "RESOURCE_EXHAUSTED", "count": "3"}
    assert forbidden.actor == "globex"
    assert forbidden.attributes["code"] == "PERMISSION_DENIED"
