"""Query, ListSeries and Watch as callers meet them: whose series, pages, masks, streams."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import numpy as np
import pytest
from support.polling import eventually_async
from support.servers import connected, running

from agent360.client import (
    InvalidRequestError,
    LabelMatch,
    Mesh,
    MeshError,
    alert_rule,
    metric_query,
)
from agent360.client.channel import open_channel
from agent360.client.errors import from_rpc_error
from agent360.mesh.metrics.queries.query import Group
from agent360.mesh.metrics.queries.reading import read_query
from agent360.mesh.metrics.queries.rpcs import _page
from agent360.mesh.runtime.policies.authentication import hash_key
from agent360.mesh.runtime.server import Server
from agent360.metrics.v1 import metrics_pb2 as pb

STEP = timedelta(seconds=10)
KEYS = {
    "acme": {"tenants": ("acme",)},
    "globex": {"tenants": ("globex",)},
    "both": {"tenants": ("acme", "globex")},
    "all": {"tenants": ("*",)},
    "admin-of-one": {"tenants": ("acme",), "admin": True},
    "operator": {"tenants": ("*",), "admin": True},
}
AUTHENTICATION = {
    "keys": [
        {"name": name, "sha256": hash_key(f"key-{name}"), **rights} for name, rights in KEYS.items()
    ]
}


def client(server: Server, key: str, tenant: str = "") -> Mesh:
    return Mesh.connect(metrics=server.address, tenant=tenant, api_key=f"key-{key}")


@asynccontextmanager
async def two_tenants(**settings: Any) -> AsyncIterator[Server]:
    """A service that has series of acme and of globex, by the same names."""
    async with running("metrics", authentication=AUTHENTICATION, **settings) as server:
        for tenant, calls in (("acme", 1), ("globex", 100)):
            async with client(server, tenant) as mesh:
                for n in range(3):
                    mesh.metrics.count("calls", calls, {"n": str(n), "owner": tenant})
                    mesh.metrics.observe("seconds", calls, {"owner": tenant}, unit="s")
                mesh.metrics.count(f"only_{tenant}")
                await mesh.metrics.flush()
        yield server


async def rpc(server: Server, method: str, request: Any, key: str, tenant: str = "") -> Any:
    name = f"/agent360.metrics.v1.MetricsService/{method}"
    metadata = [("authorization", f"Bearer key-{key}")]
    if tenant:
        metadata.append(("x-agent360-tenant", tenant))
    async with open_channel(server.address) as channel:
        answer: Any = getattr(pb, f"{method}Response").FromString
        try:
            if method == "Watch":
                call = channel.unary_stream(name, type(request).SerializeToString, answer)
                return await call(request, metadata=metadata, timeout=10).read()
            call = channel.unary_unary(name, type(request).SerializeToString, answer)
            return await call(request, metadata=metadata, timeout=10)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None


async def firing(mesh: Mesh) -> bool:
    return len([alert async for alert in mesh.metrics.list_alerts()]) == 1


def forms() -> dict[str, Any]:
    """Every way to ask about the calls of tenants."""
    everyone = pb.LabelMatcher(label="tenant", operator=pb.MATCH_OPERATOR_REGEX, value=".*")
    globex = pb.LabelMatcher(label="tenant", value="globex")
    owner = pb.LabelMatcher(label="owner", operator=pb.MATCH_OPERATOR_REGEX, value="globex|acme")
    plain = {"name": "calls", "aggregation": pb.AGGREGATION_SUM}
    queries = {
        "plain": plain,
        "by series": {**plain, "by_series": True},
        "by tenant": {**plain, "group_by": ["tenant", "owner"]},
        "regex on tenant": {**plain, "matchers": [everyone], "group_by": ["tenant", "owner"]},
        "the other tenant": {**plain, "matchers": [globex], "by_series": True},
        "regex on a label": {**plain, "matchers": [owner], "group_by": ["owner"]},
        "masked": {**plain, "group_by": ["owner"], "read_mask": {"paths": ["labels", "values"]}},
        "top": {**plain, "group_by": ["owner"], "top_k": 1},
        "quantiles": {"name": "seconds", "aggregation": pb.AGGREGATION_QUANTILES,
                      "quantiles": [1], "group_by": ["owner"]},
        "trend": {**plain, "group_by": ["owner"], "compare_to": [{"seconds": 10}]},
    }  # fmt: skip
    found: dict[str, Any] = {
        f"query {name}": ("Query", pb.QueryRequest(**fields)) for name, fields in queries.items()
    }
    for name, fields in queries.items():
        request = pb.WatchRequest(query=pb.QueryRequest(**fields))
        found[f"watch {name}"] = ("Watch", request)
    found |= {
        "alerts": ("ListAlerts", pb.ListAlertsRequest()),
        "list": ("ListSeries", pb.ListSeriesRequest()),
        "list by name": ("ListSeries", pb.ListSeriesRequest(name="calls")),
        "list by tenant": ("ListSeries", pb.ListSeriesRequest(matchers=[everyone])),
        "list the other": ("ListSeries", pb.ListSeriesRequest(matchers=[globex])),
        "list masked": (
            "ListSeries",
            pb.ListSeriesRequest(read_mask={"paths": ["labels"]}),  # type: ignore[arg-type]
        ),
    }
    return found


async def test_no_form_of_asking_shows_another_tenants_series() -> None:
    async with two_tenants(alerts={"evaluate_every_s": 0.05}) as server:
        for tenant in ("acme", "globex"):
            async with client(server, tenant) as mesh:
                seen = metric_query("calls", "sum", group_by=["owner", "tenant"])
                await mesh.metrics.set_alert_rule(alert_rule("any", seen, ">", 0, window=STEP * 60))
                await eventually_async(lambda: firing(mesh))
        for name, (method, request) in forms().items():
            for key, tenant in (("acme", ""), ("both", "acme"), ("all", "acme")):
                answer = await rpc(server, method, request, key, tenant)
                assert "globex" not in str(answer), name
                assert "100" not in str(answer), name
            for key, tenant in (
                ("acme", "globex"),
                ("acme", "*"),
                ("both", "*"),
                ("all", "*"),
                ("admin-of-one", "*"),
            ):
                with pytest.raises(MeshError) as caught:
                    await rpc(server, method, request, key, tenant)
                assert caught.value.reason == "TENANT_NOT_ALLOWED", (name, key)


async def test_an_operator_asks_about_all_tenants_and_sees_whose_each_series_is() -> None:
    async with two_tenants() as server, client(server, "operator", "*") as mesh:
        query = metric_query("calls", "sum", group_by=["tenant"])
        found = {g.labels["tenant"]: g.points[0].value async for g in mesh.metrics.query(query)}
        assert found == {"acme": 3, "globex": 300}
        one = metric_query("calls", "sum", where=[LabelMatch("tenant", "=~", "glo.*")])
        assert [g.points[0].value async for g in mesh.metrics.query(one)] == [300]
        series = [each async for each in mesh.metrics.list_series("calls", page_size=4)]
        assert [each.labels["tenant"] for each in series] == ["acme"] * 3 + ["globex"] * 3
        async for groups in mesh.metrics.watch(query):
            assert {group.labels["tenant"] for group in groups} == {"acme", "globex"}
            break
        with pytest.raises(InvalidRequestError):
            await rpc(server, "DeleteAlertRule", pb.DeleteAlertRuleRequest(), "operator", "*")


async def test_the_label_tenant_is_an_ordinary_one_to_everybody_else() -> None:
    async with two_tenants() as server, client(server, "acme") as mesh:
        mesh.metrics.count("calls", 1_000, {"tenant": "globex"})
        await mesh.metrics.flush()
        query = metric_query("calls", "sum", group_by=["tenant"])
        found = {g.labels["tenant"]: g.points[0].value async for g in mesh.metrics.query(query)}
        assert found == {"": 3, "globex": 1_000}
    async with two_tenants() as server, client(server, "acme") as mesh:
        mesh.metrics.count("calls", 1_000, {"tenant": "globex"})
        await mesh.metrics.flush()
        async with client(server, "operator", "*") as operator:
            found = {
                g.labels["tenant"]: g.points[0].value async for g in operator.metrics.query(query)
            }
        assert found == {"acme": 1_003, "globex": 300}


async def test_pages_are_complete_and_of_one_range_and_tokens_are_bound() -> None:
    async with two_tenants() as server, client(server, "acme") as mesh:
        for n in range(10, 35):
            mesh.metrics.count("calls", 1, {"n": str(n)})
        await mesh.metrics.flush()
        request = pb.QueryRequest(
            name="calls", aggregation=pb.AGGREGATION_SUM, group_by=["n"], page_size=7
        )
        first = await rpc(server, "Query", request, "acme")
        assert len(first.groups) == 7
        labels = [group.labels["n"] async for group in mesh.metrics.query(request)]
        assert labels == sorted({"0", "1", "2", *map(str, range(10, 35))})
        request.page_token = first.next_page_token
        refused = (
            ("globex", request, "another tenant"),
            ("acme", pb.QueryRequest(name="seconds", aggregation=pb.AGGREGATION_COUNT), "another"),
        )
        for key, other, text in refused:
            other.page_token = first.next_page_token
            with pytest.raises(InvalidRequestError, match=text):
                await rpc(server, "Query", other, key)
        listing = pb.ListSeriesRequest(name="calls", page_size=5)
        page = await rpc(server, "ListSeries", listing, "acme")
        listing.page_token = page.next_page_token
        with pytest.raises(InvalidRequestError, match="another tenant"):
            await rpc(server, "ListSeries", listing, "globex")
        # A token of the operator's view of all tenants is no token of a tenant's.
        listing.page_token = ""
        page = await rpc(server, "ListSeries", listing, "operator", "*")
        listing.page_token = page.next_page_token
        with pytest.raises(InvalidRequestError, match="another tenant"):
            await rpc(server, "ListSeries", listing, "acme")


async def test_series_that_appear_between_pages_repeat_and_hide_no_other() -> None:
    async with connected("metrics") as mesh:
        for n in (1, 3, 5, 7):
            mesh.metrics.count("calls", 1, {"n": str(n)})
        await mesh.metrics.flush()
        seen = []
        async for series in mesh.metrics.list_series("calls", page_size=2):
            seen.append(series.labels["n"])
            if len(seen) == 2:
                mesh.metrics.count("calls", 1, {"n": "0"})
                await mesh.metrics.flush()
        assert seen == ["1", "3", "5", "7"]


async def test_a_mask_leaves_only_what_it_names() -> None:
    async with connected("metrics") as mesh:
        mesh.metrics.count("calls", 5, {"n": "1"})
        await mesh.metrics.flush()
        request = metric_query("calls", "sum", group_by=["n"])
        request.read_mask.paths.extend(["values"])
        (group,) = [each async for each in mesh.metrics.query(request)]
        assert (group.labels, group.unit, group.points[0].value) == ({}, "", 5)
        request.read_mask.paths[:] = ["secrets"]
        with pytest.raises(InvalidRequestError, match="secrets"):
            [each async for each in mesh.metrics.query(request)]


def test_groups_with_many_points_come_in_smaller_pages() -> None:
    column = np.zeros(80_000)
    groups = [
        Group((("n", str(n)),), "", column.astype(np.int64), column[:, None], column)
        for n in range(5)
    ]
    query = read_query("acme", metric_query("calls", "sum"), 1.8e9)
    assert _page(groups, query) == groups[:2]
    assert _page(groups[4:], query) == groups[4:]
    day_before = replace(query, offsets_s=(86_400,))
    assert _page(groups, day_before) == groups[:1]


async def test_a_step_that_is_too_short_for_its_range_is_told_one_that_is_not() -> None:
    async with connected("metrics") as mesh:
        start = datetime.now(UTC) - timedelta(days=730)
        with pytest.raises(InvalidRequestError, match="at least 5,740 s would do"):
            [g async for g in mesh.metrics.query(metric_query("x", "sum", start=start, step=STEP))]
        fitting = timedelta(seconds=5_740)
        query = metric_query("x", "sum", start=start, step=fitting)
        assert [group async for group in mesh.metrics.query(query)] == []


async def test_a_watch_tells_the_present_and_then_what_is_new() -> None:
    async with connected("metrics") as mesh:
        mesh.metrics.count("calls", 5)
        await mesh.metrics.flush()
        query = metric_query("calls", "sum", step=STEP)
        told: list[float] = []
        async with asyncio.timeout(15):
            async for groups in mesh.metrics.watch(query, interval=timedelta(seconds=1)):
                told.append(sum(point.value for point in groups[0].points))
                if len(told) == 1:
                    assert told == [5]
                    mesh.metrics.count("calls", 2)
                    await mesh.metrics.flush()
                elif 2 in told or 7 in told:
                    break


async def test_watches_end_when_the_service_stops_and_are_bounded() -> None:
    async with running("metrics", query={"max_tenant_watches": 2}) as server:
        request = pb.WatchRequest(query=metric_query("calls", "sum"))
        async with open_channel(server.address) as channel:
            watch: Any = channel.unary_stream(
                "/agent360.metrics.v1.MetricsService/Watch",
                pb.WatchRequest.SerializeToString,
                pb.WatchResponse.FromString,
            )
            metadata = (("x-agent360-tenant", "acme"),)
            open_ones = [watch(request, metadata=metadata) for _ in range(2)]
            for each in open_ones:
                assert await each.read() is not grpc.aio.EOF
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await watch(request, metadata=metadata).read()
            assert from_rpc_error(caught.value).reason == "WATCHES_EXHAUSTED"
            open_ones.pop().cancel()
            async with asyncio.timeout(5):
                while True:
                    another = watch(request, metadata=metadata)
                    try:
                        assert await another.read() is not grpc.aio.EOF
                        break
                    except grpc.aio.AioRpcError:
                        await asyncio.sleep(0.01)
            async with asyncio.timeout(5):
                await server.stop(2.0)
                assert await open_ones[0].read() is grpc.aio.EOF
                assert await another.read() is grpc.aio.EOF


async def test_a_watch_that_cannot_be_is_refused_by_its_fields() -> None:
    async with connected("metrics") as mesh:
        query = metric_query("no name", "sum", end=datetime.now(UTC))
        with pytest.raises(InvalidRequestError) as caught:
            async for _ in mesh.metrics.watch(query, interval=timedelta(milliseconds=5)):
                pass
        fields = {violation.field for violation in caught.value.violations}
        assert fields == {"query.end_time", "interval", "query.name"}
