"""Alert rules, alerts and silences as callers meet them, with a real receiver at the end."""

from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from support.polling import eventually, eventually_async
from support.servers import connected, running
from support.webhook_receiver import webhook_receiver

from agent360.client import (
    InvalidRequestError,
    LabelMatch,
    Mesh,
    MeshError,
    alert_rule,
    metric_query,
)
from agent360.mesh.runtime.call import MESH_TENANT
from agent360.metrics.v1 import metrics_pb2 as pb

MINUTE = timedelta(minutes=1)
CALLS = metric_query("calls", "sum", group_by=["n"])


def busy(rule_id: str = "busy", **rest: Any) -> pb.AlertRule:
    return alert_rule(rule_id, CALLS, ">", 10, window=MINUTE, **rest)


async def rule_ids(mesh: Mesh, **rest: Any) -> list[str]:
    return [rule.rule_id async for rule in mesh.metrics.list_alert_rules(**rest)]


async def test_a_rule_is_set_listed_replaced_and_deleted_by_its_tenant_alone() -> None:
    async with connected("metrics") as mesh:
        labels = {"severity": "page"}
        made = await mesh.metrics.set_alert_rule(busy(hold=MINUTE, labels=labels))
        assert made == busy(hold=MINUTE, labels=labels)
        await mesh.metrics.set_alert_rule(busy())
        for n in range(5):
            await mesh.metrics.set_alert_rule(busy(f"r{n}"))
        assert await rule_ids(mesh, page_size=2) == ["busy", "r0", "r1", "r2", "r3", "r4"]
        assert await rule_ids(mesh, tenant="globex") == []
        with pytest.raises(MeshError) as caught:
            await mesh.metrics.delete_alert_rule("busy", tenant="globex")
        assert (caught.value.code, caught.value.reason) == (
            grpc.StatusCode.NOT_FOUND,
            "ALERT_RULE_UNKNOWN",
        )
        await mesh.metrics.delete_alert_rule("busy")
        assert await rule_ids(mesh) == ["r0", "r1", "r2", "r3", "r4"]


async def test_a_tenant_has_only_so_many_rules() -> None:
    async with connected("metrics", alerts={"max_rules": 2}) as mesh:
        for n in range(2):
            await mesh.metrics.set_alert_rule(busy(f"r{n}"))
        await mesh.metrics.set_alert_rule(busy("r1"))
        with pytest.raises(MeshError) as caught:
            await mesh.metrics.set_alert_rule(busy("r2"))
        assert caught.value.reason == "ALERT_RULES_EXHAUSTED"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rule_id": "No Id"}, "rule.rule_id"),
        ({"query": {"name": "no name"}}, "rule.query.name"),
        ({"query": {"step": {"seconds": 10}}}, "rule.query.step"),
        ({"query": {"start_time": {"seconds": 10}}}, "rule.query.start_time"),
        ({"query": {"top_k": 2}}, "rule.query.top_k"),
        ({"query": {"page_size": 2}}, "rule.query.page_size"),
        (
            {"query": {"aggregation": pb.AGGREGATION_QUANTILES, "quantiles": [0.1, 0.2]}},
            "rule.query.quantiles",
        ),
        (
            {"divide_by": {"name": "x", "aggregation": pb.AGGREGATION_SUM}},
            "rule.divide_by.group_by",
        ),
        ({"window": {"seconds": 15}}, "rule.window"),
        ({"window": {"seconds": 40 * 86_400}}, "rule.window"),
        ({"short_window": {"seconds": 600}}, "rule.short_window"),
        ({"comparison": 0}, "rule.comparison"),
        ({"threshold": float("nan")}, "rule.threshold"),
        ({"for": {"seconds": -1}}, "rule.for"),
        ({"labels": {"tenant": "globex"}}, "rule.labels[tenant]"),
        ({"labels": {"1": "x"}}, "rule.labels[1]"),
        ({"annotations": {"summary": "{{ nothing }}"}}, "rule.annotations[summary]"),
    ],
)
async def test_a_malformed_rule_names_its_fault(change: dict[str, Any], field: str) -> None:
    rule = busy()
    query = change.pop("query", {})
    if "aggregation" in query:
        rule.query.ClearField("aggregation")
    rule.query.MergeFrom(pb.QueryRequest(**query))
    for name, value in change.items():
        rule.ClearField(name)  # type: ignore[arg-type]
        rule.MergeFrom(pb.AlertRule(**{name: value}))
    async with connected("metrics") as mesh:
        with pytest.raises(InvalidRequestError) as caught:
            await mesh.metrics.set_alert_rule(rule)
        assert field in {violation.field for violation in caught.value.violations}


async def test_the_rules_that_come_with_the_service_are_the_meshs_and_can_be_turned_off() -> None:
    async with connected("metrics", tenant=MESH_TENANT) as mesh:
        rules = [rule async for rule in mesh.metrics.list_alert_rules()]
        assert [rule.rule_id for rule in rules if rule.built_in] == [
            "mesh-errors-fast-burn",
            "mesh-errors-slow-burn",
            "mesh-inference-latency-fast-burn",
            "mesh-inference-latency-slow-burn",
            "mesh-latency-fast-burn",
            "mesh-latency-slow-burn",
        ]
        assert rules[0].threshold == pytest.approx(0.0144)
        windows = (rules[0].window.seconds, rules[0].short_window.seconds)
        assert windows == (3_600, 300)
        assert rules[0].query.matchers[0].operator == pb.MATCH_OPERATOR_REGEX
        for change in (
            mesh.metrics.set_alert_rule(busy("mesh-errors-fast-burn")),
            mesh.metrics.delete_alert_rule("mesh-errors-fast-burn"),
        ):
            with pytest.raises(MeshError) as caught:
                await change
            assert caught.value.reason == "ALERT_RULE_BUILT_IN"
    async with connected("metrics", MESH_TENANT, alerts={"slo": {"enabled": False}}) as mesh:
        assert await rule_ids(mesh) == []


async def test_alerts_reach_the_receiver_and_are_listed_to_their_tenant_and_to_operators() -> None:
    async with webhook_receiver() as receiver:
        alerts = {
            "evaluate_every_s": 0.05,
            "group_wait_s": 0,
            "group_interval_s": 0.2,
            "webhook": {"url": receiver.url},
        }
        async with connected("metrics", alerts=alerts) as mesh:
            summary = {"summary": "{{labels.n}}: {{value}}"}
            await mesh.metrics.set_alert_rule(busy(annotations=summary))
            await mesh.metrics.set_alert_rule(busy("later", hold=timedelta(hours=1)))
            mesh.metrics.count("calls", 20, {"n": "1"})
            mesh.metrics.count("calls", 5, {"n": "2"})
            await mesh.metrics.flush()
            await eventually(lambda: receiver.bodies, 10)
            assert receiver.told() == [("firing", [("firing", "1: 20")])]
            found = [alert async for alert in mesh.metrics.list_alerts(page_size=1)]
            assert [(each.rule_id, each.state) for each in found] == [
                ("busy", pb.ALERT_STATE_FIRING),
                ("later", pb.ALERT_STATE_PENDING),
            ]
            assert dict(found[0].labels) == {"alertname": "busy", "n": "1", "tenant": "acme"}
            assert found[0].tenant == "acme"
            assert [each async for each in mesh.metrics.list_alerts(tenant="globex")] == []
            everything = [each async for each in mesh.metrics.list_alerts(tenant="*")]
            assert [each.rule_id for each in everything] == ["busy", "later"]
            end = datetime.now(UTC) + timedelta(hours=1)
            silence = await mesh.metrics.create_silence([LabelMatch("n", "=~", "1|2")], end)

            async def silenced() -> bool:
                found = [each async for each in mesh.metrics.list_alerts()]
                return [list(each.silenced_by) for each in found] == [[silence.silence_id]] * 2

            await eventually_async(silenced)


async def test_silences_are_made_once_listed_and_ended_by_their_tenant_alone() -> None:
    async with connected("metrics") as mesh:
        now = datetime.now(UTC)
        where = [LabelMatch("n", "=", "1")]
        one = await mesh.metrics.create_silence(where, now + MINUTE, comment="a test")
        assert (one.comment, one.created_by) == ("a test", "anonymous")
        two = await mesh.metrics.create_silence(where, now + MINUTE, start=now)
        ids = sorted((one.silence_id, two.silence_id))
        listed = [each async for each in mesh.metrics.list_silences(page_size=1)]
        assert [each.silence_id for each in listed] == ids
        assert [each async for each in mesh.metrics.list_silences(tenant="globex")] == []
        with pytest.raises(MeshError) as caught:
            await mesh.metrics.expire_silence(one.silence_id, tenant="globex")
        assert caught.value.reason == "SILENCE_UNKNOWN"
        await mesh.metrics.expire_silence(one.silence_id)
        left = [each async for each in mesh.metrics.list_silences()]
        assert [each.silence_id for each in left] == [two.silence_id]
        all_of_them = [each async for each in mesh.metrics.list_silences(include_expired=True)]
        assert [each.silence_id for each in all_of_them] == ids
        for wrong, end, field in (
            ([], now + MINUTE, "silence.matchers"),
            (where, now - MINUTE, "silence.end_time"),
            ([LabelMatch("n", "=~", "(")], now + MINUTE, "silence.matchers[0].value"),
        ):
            with pytest.raises(InvalidRequestError) as invalid:
                await mesh.metrics.create_silence(wrong, end)
            assert field in {violation.field for violation in invalid.value.violations}


async def test_a_repeated_request_makes_no_second_silence() -> None:
    async with (
        running("metrics") as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        create: Any = channel.unary_unary(
            "/agent360.metrics.v1.MetricsService/CreateSilence",
            pb.CreateSilenceRequest.SerializeToString,
            pb.CreateSilenceResponse.FromString,
        )
        request = pb.CreateSilenceRequest(request_id="7d4df1f4-93b3-4a5c-9a9e-0d7a4a4ce111")
        request.silence.matchers.add(label="n", value="1")
        request.silence.end_time.FromDatetime(datetime.now(UTC) + MINUTE)
        answers = [await create(request, metadata=(("x-agent360-tenant", "acme"),)) for _ in "12"]
        assert answers[0] == answers[1]
        async with Mesh.connect(metrics=server.address, tenant="acme", api_key="") as mesh:
            assert len([each async for each in mesh.metrics.list_silences()]) == 1
