"""Alerts with a real store and a real receiver; only the clock is the test's."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from support.metric_history import NOON_S, Clock, MetricHistory, metric_history
from support.webhook_receiver import WebhookReceiver, webhook_receiver

from agent360.client import LabelMatch, alert_rule, metric_query
from agent360.mesh.metrics.alerts.documents import rule_document, silence_document
from agent360.mesh.metrics.alerts.lifecycle import AlertState
from agent360.mesh.metrics.alerts.reading import read_rule
from agent360.mesh.metrics.alerts.service import AlertService
from agent360.mesh.metrics.alerts.settings import AlertSettings
from agent360.mesh.metrics.ports import StoreError
from agent360.mesh.metrics.series import Kind
from agent360.mesh.runtime.call import MESH_TENANT
from agent360.metrics.v1 import metrics_pb2 as pb

EVERY_S = 10.0
MINUTE = timedelta(minutes=1)


class Desk:
    """An alert service on a history, at whose pace time goes on."""

    def __init__(self, past: MetricHistory, url: str, **settings: Any) -> None:
        self.past = past
        given = {
            "webhook": {"url": url, "headers": {"Authorization": "Bearer s3cret"}},
            "evaluate_every_s": EVERY_S,
            "group_wait_s": 20,
            "group_interval_s": 60,
            "repeat_interval_s": 600,
            "slo": {"enabled": False},
            **settings,
        }
        self.service = AlertService(
            AlertSettings.model_validate(given),
            past.rules,
            past.engine,
            structlog.get_logger(),
            past.clock,
        )

    async def pass_time(self, seconds: float, calls: float | None = None, n: str = "1") -> None:
        """Evaluates and notifies every 10 s; ``calls`` are counted in each, if given."""
        for _ in range(int(seconds // EVERY_S)):
            if calls is not None:
                await self.past.add("calls", [(self.past.clock(), calls)], {"n": n})
            await self.service.evaluate()
            await self.service.notify()
            self.past.clock.now_s += EVERY_S

    async def set(self, rule: Any, tenant: str = "acme") -> None:
        read_rule(tenant, rule)
        await self.past.rules.put([rule_document(tenant, rule)])

    async def states(self) -> list[str]:
        return [each.state.name for each in await self.service.documents.alerts()]


@asynccontextmanager
async def desk(
    directory: Path, receiver: WebhookReceiver, clock: Clock, **settings: Any
) -> AsyncIterator[Desk]:
    async with metric_history(directory, clock) as past:
        made = Desk(past, receiver.url, **settings)
        yield made
        await made.service.close()


def busy(**rest: Any) -> pb.AlertRule:
    """More than a call a second over the last 30 s."""
    given: dict[str, Any] = {
        "window": timedelta(seconds=30),
        "annotations": {"summary": "{{labels.n}} has {{value}} calls"},
        **rest,
    }
    return alert_rule("busy", metric_query("calls", "sum", group_by=["n"]), ">", 30, **given)


async def test_an_alert_pends_fires_keeps_firing_and_resolves_across_restarts(
    tmp_path: Path,
) -> None:
    clock = Clock(NOON_S + 5)
    async with webhook_receiver() as receiver:
        async with desk(tmp_path, receiver, clock) as first:
            await first.set(busy(hold=MINUTE, keep_firing=timedelta(minutes=2)))
            await first.pass_time(30, calls=1)
            assert await first.states() == []
            await first.pass_time(40, calls=50)
            assert await first.states() == ["PENDING"]
        async with desk(tmp_path, receiver, clock) as second:
            await second.pass_time(20, calls=50)
            assert await second.states() == ["PENDING"]
            assert receiver.bodies == []
            await second.pass_time(10, calls=50)
            assert await second.states() == ["FIRING"]
            fired_s = clock() - EVERY_S
            await second.pass_time(30, calls=50)
            assert receiver.told() == [("firing", [("firing", "1 has 150 calls")])]
        async with desk(tmp_path, receiver, clock) as third:
            await third.pass_time(130)
            assert await third.states() == ["FIRING"]
            assert len(receiver.bodies) == 1
            await third.pass_time(60)
            assert await third.states() == ["RESOLVED"]
            assert receiver.told()[1:] == [("resolved", [("resolved", "1 has 50 calls")])]
            body = receiver.bodies[1]
        assert receiver.headers[0]["Authorization"] == "Bearer s3cret"
        first_body = receiver.bodies[0]
        (alert,) = first_body.pop("alerts")
        assert first_body == {
            "version": "4",
            "groupKey": 'acme:{tenant="acme", alertname="busy"}',
            "truncatedAlerts": 0,
            "status": "firing",
            "receiver": "agent360-mesh",
            "groupLabels": {"alertname": "busy", "tenant": "acme"},
            "commonLabels": {"alertname": "busy", "n": "1", "tenant": "acme"},
            "commonAnnotations": {"summary": "1 has 150 calls"},
            "externalURL": "",
        }
        assert alert["endsAt"] == "0001-01-01T00:00:00Z"
        assert alert["startsAt"].startswith("2027-01-15T")
        (resolved,) = body["alerts"]
        assert resolved["fingerprint"] == alert["fingerprint"]
        assert resolved["startsAt"] == alert["startsAt"]
        assert alert["startsAt"] < resolved["endsAt"]
        assert fired_s < clock()


async def test_the_condition_must_hold_at_every_evaluation(tmp_path: Path) -> None:
    async with webhook_receiver() as receiver, desk(tmp_path, receiver, Clock()) as made:
        await made.set(busy(hold=timedelta(seconds=90)))
        await made.pass_time(50, calls=50)
        assert await made.states() == ["PENDING"]
        await made.pass_time(40)
        assert await made.states() == []
        await made.pass_time(60, calls=50)
        assert await made.states() == ["PENDING"]


async def test_missing_data_holds_no_condition_and_resolves(tmp_path: Path) -> None:
    async with webhook_receiver() as receiver, desk(tmp_path, receiver, Clock()) as made:
        quiet = alert_rule("quiet", metric_query("calls", "sum"), "<", 5, window=MINUTE)
        await made.set(quiet)
        await made.pass_time(20)
        assert await made.states() == []
        await made.pass_time(10, calls=1)
        assert await made.states() == ["FIRING"]
        await made.pass_time(70)
        assert await made.states() == ["RESOLVED"]


async def test_each_group_has_an_alert_of_its_own_and_a_group_is_told_of_together(
    tmp_path: Path,
) -> None:
    async with webhook_receiver() as receiver, desk(tmp_path, receiver, Clock()) as made:
        await made.set(busy(labels={"severity": "page"}))
        await made.pass_time(10, calls=50, n="1")
        await made.pass_time(10, calls=50, n="2")
        assert receiver.bodies == []
        await made.pass_time(10)
        assert [body["commonLabels"] for body in receiver.bodies] == [
            {"alertname": "busy", "severity": "page", "tenant": "acme"}
        ]
        assert len(receiver.bodies[0]["alerts"]) == 2
        await made.pass_time(60)
        assert receiver.told()[-1][0] == "resolved"
        assert await made.service.documents.notified() != []
        await made.pass_time(80)
        assert await made.service.documents.notified() == []
        assert len(receiver.bodies) == 2


async def test_a_group_tells_changes_after_its_interval_and_repeats_itself_rarely(
    tmp_path: Path,
) -> None:
    async with webhook_receiver() as receiver, desk(tmp_path, receiver, Clock()) as made:
        await made.set(busy())
        await made.pass_time(40, calls=50)
        assert len(receiver.bodies) == 1
        for _ in range(2):
            await made.past.add("calls", [(made.past.clock(), 50)], {"n": "2"})
            await made.pass_time(20, calls=50)
        assert len(receiver.bodies) == 1
        await made.pass_time(20, calls=50)
        assert [status for status, _ in receiver.told()[1][1]] == ["firing", "resolved"] or len(
            receiver.bodies[1]["alerts"]
        ) == 2
        before = len(receiver.bodies)
        await made.pass_time(500, calls=50)
        assert len(receiver.bodies) <= before + 1
        told = len(receiver.bodies)
        await made.pass_time(200, calls=50)
        assert len(receiver.bodies) == told + 1
        assert receiver.told()[-1][0] == "firing"


async def test_a_notification_that_was_not_taken_is_repeated_until_it_is(tmp_path: Path) -> None:
    async with webhook_receiver() as receiver, desk(tmp_path, receiver, Clock()) as made:
        receiver.status = 503
        await made.set(busy())
        await made.pass_time(100, calls=50)
        tries = len(receiver.headers)
        assert 3 <= tries <= 7
        receiver.status = 200
        await made.pass_time(70, calls=50)
        assert receiver.told() == [("firing", [("firing", "1 has 150 calls")])]
        # An alert that is over while its receiver is away is told of when that is back.
        receiver.status = 503
        await made.pass_time(1_500)
        receiver.status = 200
        await made.pass_time(70)
        assert receiver.told()[-1][0] == "resolved"


async def test_an_alert_that_was_never_told_of_is_not_told_to_be_over(tmp_path: Path) -> None:
    async with (
        webhook_receiver() as receiver,
        desk(tmp_path, receiver, Clock(), group_wait_s=120) as made,
    ):
        await made.set(busy())
        await made.pass_time(20, calls=50)
        await made.pass_time(300)
        assert receiver.bodies == []


async def test_a_silence_keeps_alerts_from_being_told_of_until_it_ends(tmp_path: Path) -> None:
    clock = Clock()
    async with webhook_receiver() as receiver, desk(tmp_path, receiver, clock) as made:
        await made.set(busy())
        silence = pb.Silence(silence_id="s")
        silence.matchers.add(label="n", value="1")
        silence.start_time.seconds = NOON_S
        silence.end_time.seconds = NOON_S + 120
        await made.past.rules.put([silence_document("acme", silence)])
        await made.past.rules.put([silence_document("globex", silence)])
        await made.pass_time(100, calls=50)
        assert receiver.bodies == []
        await made.pass_time(100, calls=50)
        assert len(receiver.bodies) == 1


async def test_another_tenants_silence_silences_nothing(tmp_path: Path) -> None:
    async with webhook_receiver() as receiver, desk(tmp_path, receiver, Clock()) as made:
        await made.set(busy())
        silence = pb.Silence(silence_id="s")
        silence.matchers.add(label="n", operator=pb.MATCH_OPERATOR_REGEX, value=".*")
        silence.start_time.seconds = NOON_S
        silence.end_time.seconds = NOON_S + 3_600
        await made.past.rules.put([silence_document("globex", silence)])
        await made.pass_time(60, calls=50)
        assert len(receiver.bodies) == 1


async def test_a_rule_sees_its_tenants_series_alone(tmp_path: Path) -> None:
    async with webhook_receiver() as receiver, desk(tmp_path, receiver, Clock()) as made:
        await made.set(busy(), tenant="globex")
        await made.pass_time(60, calls=50)
        assert await made.states() == []


async def test_a_quotient_of_nothing_by_something_is_zero_and_by_nothing_is_none(
    tmp_path: Path,
) -> None:
    failed = metric_query("calls", "sum", where=[LabelMatch("n", "=", "bad")])
    ratio = alert_rule(
        "healthy", failed, "<=", 0.5, window=MINUTE, divide_by=metric_query("calls", "sum")
    )
    async with webhook_receiver() as receiver, desk(tmp_path, receiver, Clock()) as made:
        await made.set(ratio)
        await made.pass_time(10)
        assert await made.states() == []
        await made.pass_time(10, calls=10, n="good")
        (alert,) = await made.service.documents.alerts()
        assert (alert.state, alert.value) == (AlertState.FIRING, 0)
        await made.pass_time(10, calls=5, n="bad")
        (alert,) = await made.service.documents.alerts()
        assert alert.value == pytest.approx(1 / 3)
        await made.pass_time(10, calls=50, n="bad")
        assert await made.states() == ["RESOLVED"]


async def test_a_rule_that_fails_keeps_its_alerts_and_says_why(tmp_path: Path) -> None:
    async with webhook_receiver() as receiver, desk(tmp_path, receiver, Clock()) as made:
        await made.set(busy())
        await made.pass_time(20, calls=50)
        answer = made.past.engine.answer

        async def fail(*_: Any) -> Any:
            raise StoreError("away")

        made.past.engine.answer = fail  # type: ignore[method-assign]
        await made.pass_time(120)
        assert await made.states() == ["FIRING"]
        (rule,) = await made.service.documents.rule_messages("acme")
        assert rule.last_error == "away"
        made.past.engine.answer = answer  # type: ignore[method-assign]
        await made.pass_time(10)
        assert await made.states() == ["RESOLVED"]
        (rule,) = await made.service.documents.rule_messages("acme")
        assert rule.last_error == ""


async def test_the_alerts_of_a_rule_that_was_removed_are_resolved(tmp_path: Path) -> None:
    async with webhook_receiver() as receiver, desk(tmp_path, receiver, Clock()) as made:
        await made.set(busy(keep_firing=timedelta(hours=1)))
        await made.pass_time(40, calls=50)
        await made.past.rules.put((), [rule_document("acme", busy())])
        await made.pass_time(70, calls=50)
        assert [status for status, _ in receiver.told()] == ["firing", "resolved"]


async def test_of_two_replicas_one_evaluates_and_the_other_takes_over(tmp_path: Path) -> None:
    clock = Clock()
    async with webhook_receiver() as receiver, desk(tmp_path, receiver, clock) as one:
        other_store = type(one.past.rules)(one.past.database)
        two = Desk(one.past, receiver.url)
        two.service.documents._store = other_store
        await one.set(busy())
        await one.pass_time(40, calls=50)
        assert len(receiver.bodies) == 1
        clock.now_s -= EVERY_S
        await two.pass_time(10, calls=50)
        assert not two.service._evaluator.leads
        assert two.service._evaluator.alerts == {}
        await two.pass_time(60, calls=50)
        assert two.service._evaluator.leads
        await two.pass_time(100, calls=50)
        assert len(receiver.bodies) == 1
        await one.pass_time(10, calls=50)
        assert not one.service._evaluator.leads
        await two.service.close()
        await one.pass_time(10, calls=50)
        assert one.service._evaluator.leads
        await one.pass_time(60, calls=50)
        assert len(receiver.bodies) == 1


async def test_burn_rate_rules_tell_of_errors_and_of_slow_calls_of_each_service(
    tmp_path: Path,
) -> None:
    clock = Clock()
    async with (
        webhook_receiver() as receiver,
        desk(tmp_path, receiver, clock, slo={"at_least": 5}) as made,
    ):
        start_s = NOON_S - 7 * 3_600
        for service, failing, slow_s in (
            ("cache", 0.001, 0.01),
            ("ratelimit", 0.03, 0.01),
            ("inference", 0.0, 20.0),
            ("metrics", 0.0, 5.0),
        ):
            ok, bad = {"service": service, "code": "OK"}, {"service": service, "code": "INTERNAL"}
            denied = {"service": service, "code": "RESOURCE_EXHAUSTED"}
            times = [start_s + 30 * n for n in range(7 * 120)]
            for tenant in ("acme", "globex"):
                calls = [(time_s, 10 * (1 - failing)) for time_s in times]
                await made.past.add("mesh_requests", calls, ok, tenant=tenant)
                await made.past.add("mesh_requests", calls, denied, tenant=tenant)
                if failing:
                    failed = [(time_s, 10 * failing) for time_s in times]
                    await made.past.add("mesh_requests", failed, bad, tenant=tenant)
            took = [(time_s, slow_s) for time_s in times]
            await made.past.add("mesh_request_seconds", took, ok, kind=Kind.DISTRIBUTION, unit="s")
        await made.pass_time(10)
        alerts = await made.service.documents.alerts(MESH_TENANT)
        found = {(each.rule_id, dict(each.labels)["service"]) for each in alerts}
        assert found == {
            ("mesh-errors-fast-burn", "ratelimit"),
            ("mesh-errors-slow-burn", "ratelimit"),
            ("mesh-latency-fast-burn", "metrics"),
            ("mesh-latency-slow-burn", "metrics"),
        }
        (fast,) = (each for each in alerts if each.rule_id == "mesh-errors-fast-burn")
        assert fast.value == pytest.approx(0.03 / 1.97, rel=0.02)
        assert dict(fast.labels)["severity"] == "page"
        # Once calls are well again the short windows end it, long before the long ones forget.
        clock.now_s += 40 * 60
        well = [(clock.now_s - n * 10, 10.0) for n in range(240)]
        await made.past.add("mesh_requests", well, {"service": "ratelimit", "code": "OK"})
        await made.pass_time(10)
        states = {each.rule_id: each.state.name for each in await made.service.documents.alerts()}
        assert states["mesh-errors-fast-burn"] == "RESOLVED"
        assert states["mesh-errors-slow-burn"] == "RESOLVED"


def test_secrets_of_the_webhook_are_not_shown() -> None:
    settings = AlertSettings.model_validate(
        {"webhook": {"url": "https://h/TOKEN", "headers": {"Authorization": "Bearer TOKEN"}}}
    )
    assert "TOKEN" not in repr(settings)
    assert "TOKEN" not in json.dumps(settings.model_dump(mode="json"))
