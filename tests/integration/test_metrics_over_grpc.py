"""The metrics and audit services through the client, over real gRPC and a real SQLite file."""

from pathlib import Path

import pytest
from support.servers import connected, running

from agent360.client import AuditEvent, InvalidRequestError, Mesh, MeshError
from agent360.metrics.v1 import metrics_pb2 as pb


async def total(mesh: Mesh, name: str, tenant: str = "acme") -> float:
    request = pb.QueryRequest(name=name, aggregation=pb.AGGREGATION_SUM)
    groups = [group async for group in mesh.metrics.query(request, tenant=tenant)]
    return sum(point.value for group in groups for point in group.points)


async def test_what_was_flushed_is_counted_exactly_and_by_tenant(tmp_path: Path) -> None:
    async with connected("metrics", store=f"sqlite:///{tmp_path}/m.db") as mesh:
        for _ in range(1_000):
            mesh.metrics.count("plans", labels={"kind": "trip"})
        mesh.metrics.count("plans", 5, tenant="globex")
        await mesh.metrics.flush()
        assert await total(mesh, "plans") == 1_000
        assert await total(mesh, "plans", "globex") == 5


async def test_nothing_acknowledged_is_lost_or_doubled_by_a_restart(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/m.db"
    async with running("metrics", store=store) as first:
        port = first.port
        mesh = Mesh.connect(metrics=first.address, tenant="acme", api_key="")
        mesh.metrics.count("plans", 3)
        await mesh.metrics.flush()
    mesh.metrics.count("plans", 4)
    async with running("metrics", store=store, port=port):
        await mesh.metrics.flush()
        assert await total(mesh, "plans") == 7
        await mesh.close()


async def test_quantiles_are_merged_over_series_and_steps(tmp_path: Path) -> None:
    async with connected("metrics", store=f"sqlite:///{tmp_path}/m.db") as mesh:
        for value in range(1, 101):
            labels = {"model": "a" if value % 2 else "b"}
            mesh.metrics.observe("seconds", value / 10, labels, unit="s")
        await mesh.metrics.flush()
        request = pb.QueryRequest(
            name="seconds", aggregation=pb.AGGREGATION_QUANTILES, quantiles=[0.5, 1.0]
        )
        (group,) = [group async for group in mesh.metrics.query(request)]
        assert group.points[0].count == 100
        assert group.points[0].quantiles == pytest.approx([5.0, 10.0], rel=0.03)
        by_model = pb.QueryRequest(
            name="seconds", aggregation=pb.AGGREGATION_COUNT, group_by=["model"]
        )
        groups = [dict(group.labels) async for group in mesh.metrics.query(by_model)]
        assert groups == [{"model": "a"}, {"model": "b"}]


async def test_series_beyond_a_tenants_bound_are_refused_and_counted(tmp_path: Path) -> None:
    async with connected(
        "metrics", store=f"sqlite:///{tmp_path}/m.db", max_series_per_tenant=3
    ) as mesh:
        for number in range(5):
            mesh.metrics.count("plans", labels={"n": str(number)})
        await mesh.metrics.flush()
        assert len([each async for each in mesh.metrics.list_series("plans", page_size=2)]) == 3


async def test_events_are_listed_newest_first_in_pages_and_to_their_tenant(tmp_path: Path) -> None:
    async with connected("metrics", store=f"sqlite:///{tmp_path}/m.db") as mesh:
        for number in range(7):
            await mesh.audit.record(AuditEvent("plans.approve", f"plans/{number}", actor="ana"))
        same = AuditEvent("plans.drop", "plans/0", event_id="7d4df1f4-93b3-4a5c-9a9e-0d7a4a4ce111")
        assert await mesh.audit.record(same) == await mesh.audit.record(same)
        listed = [each async for each in mesh.audit.list_events(page_size=3, actor="ana")]
        assert [each.resource for each in listed] == [f"plans/{n}" for n in range(6, -1, -1)]
        masked = [each async for each in mesh.audit.list_events(fields=["action"])]
        assert len(masked) == 8
        assert {each.resource for each in masked} == {""}
        assert [each async for each in mesh.audit.list_events(tenant="globex")] == []


async def test_malformed_requests_name_their_faults(tmp_path: Path) -> None:
    async with connected("metrics", store=f"sqlite:///{tmp_path}/m.db") as mesh:
        with pytest.raises(InvalidRequestError) as caught:
            await mesh.audit.record(AuditEvent("Not An Action", "", event_id="x"))
        fields = {violation.field for violation in caught.value.violations}
        assert fields == {"event.action", "event.resource", "event.event_id"}
        with pytest.raises(InvalidRequestError, match="aggregation"):
            [group async for group in mesh.metrics.query(pb.QueryRequest(name="x"))]
        request = pb.QueryRequest(name="x", aggregation=pb.AGGREGATION_SUM, page_token="garbage")
        with pytest.raises(MeshError, match="page_token"):
            [group async for group in mesh.metrics.query(request)]
