"""What the metrics service learns of limits: hours of use, top tenants, who changed what."""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

from support.polling import eventually_async
from support.redis_servers import RedisServer
from support.servers import running

from agent360.client import Mesh
from agent360.mesh.runtime.call import MESH_TENANT
from agent360.metrics.v1 import metrics_pb2
from agent360.ratelimit.v1 import ratelimit_pb2

LIMITS = """
[[limits]]
id = "ten"
name = "ten"
amount = 10
period = "10h"

[[limits]]
id = "plenty"
name = "plenty"
amount = 1000
period = "10h"
"""
HITS = "ratelimit_hits_total"


async def groups(
    mesh: Mesh, tenant: str, by: list[str], **matching: str
) -> dict[tuple[str, ...], float]:
    """Sums of hits by labels."""
    request = metrics_pb2.QueryRequest(
        name=HITS, aggregation=metrics_pb2.AGGREGATION_SUM, group_by=by, top_k=10
    )
    for label, value in matching.items():
        request.matchers.add(label=label, operator=metrics_pb2.MATCH_OPERATOR_EQUAL, value=value)
    return {
        tuple(group.labels[label] for label in by): sum(point.value for point in group.points)
        async for group in mesh.metrics.query(request, tenant=tenant)
    }


async def test_use_is_told_by_hour_of_day_and_by_tenant(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    _ = file.write_text(LIMITS)
    async with (
        running("metrics") as metrics,
        Mesh.connect(metrics=metrics.address, tenant="acme", api_key="") as mesh,
    ):
        hours = {f"{datetime.now(UTC).hour:02}"}
        async with (
            running("ratelimit", limits=file, mesh={"metrics": metrics.address}) as server,
            Mesh.connect(ratelimit=server.address, tenant="acme", api_key="") as asking,
        ):
            for tenant, hits in (("acme", 3), ("globex", 40), ("initech", 7)):
                await asking.ratelimit.check("plenty", hits=hits, tenant=tenant)
            for _ in range(12):
                await asking.ratelimit.check("ten")
        hours.add(f"{datetime.now(UTC).hour:02}")
        by_hour = await groups(mesh, "acme", ["hour"], limit="ten", outcome="allowed")
        assert {hour for (hour,) in by_hour} <= hours
        assert sum(by_hour.values()) == 10
        assert await groups(mesh, "acme", ["limit", "outcome"]) == {
            ("plenty", "allowed"): 3,
            ("ten", "allowed"): 10,
            ("ten", "denied"): 2,
        }
        top = await groups(mesh, MESH_TENANT, ["tenant"], outcome="allowed", limit="plenty")
        assert list(top.items()) == [(("globex",), 40), (("initech",), 7), (("acme",), 3)]
        assert await groups(mesh, "initech", ["limit"]) == {("plenty",): 7}


async def test_changes_of_limits_are_audited_and_reach_the_other_replica_within_a_second() -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    keys = [{"name": "ana", "sha256": digest, "tenants": ["*"], "admin": True}]
    limit = ratelimit_pb2.Limit(
        limit_id="new", name="new", amount=5, algorithm=ratelimit_pb2.ALGORITHM_FIXED_WINDOW
    )
    limit.period.seconds = 3_600
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(RedisServer())
        metrics = await stack.enter_async_context(running("metrics"))
        meshes = []
        for _ in range(2):
            server = await stack.enter_async_context(
                running(
                    "ratelimit",
                    store=redis.url,
                    answer_s=2,
                    authentication={"keys": keys},
                    mesh={"metrics": metrics.address},
                )
            )
            mesh = Mesh.connect(
                ratelimit=server.address, metrics=metrics.address, tenant="acme", api_key="secret"
            )
            meshes.append(await stack.enter_async_context(mesh))
        first, second = meshes
        for amount in (5, 7, 0):
            if amount:
                limit.amount = amount
                await first.ratelimit.set_limit(limit)
            else:
                await first.ratelimit.delete_limit("new")
            async with asyncio.timeout(1):
                while (await second.ratelimit.check("new", hits=0)).limit != amount:  # noqa: ASYNC110 - another replica
                    await asyncio.sleep(0.01)

        async def audited() -> bool:
            events = [each async for each in first.audit.list_events(tenant=MESH_TENANT)]
            found = [
                (
                    each.action,
                    each.actor,
                    *(
                        json.loads(each.attributes[at] or "{}").get("amount")
                        for at in ("before", "after")
                    ),
                )
                for each in reversed(events)
                if each.resource == "limits/new"
            ]
            return found == [
                ("ratelimit.limits.set", "ana", None, 5),
                ("ratelimit.limits.set", "ana", 5, 7),
                ("ratelimit.limits.delete", "ana", 7, None),
            ]

        await eventually_async(audited)
