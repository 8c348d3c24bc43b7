"""Burn-rate rules for the four services, by error ratio and by latency.

Multi-window, multi-burn-rate alerts: Site Reliability Workbook, chapter 5.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from agent360.mesh.metrics.alerts.rules import AlertRule
from agent360.mesh.metrics.alerts.settings import SloSettings
from agent360.mesh.metrics.frame import BUCKET_S
from agent360.mesh.metrics.queries.query import Aggregation, Matcher, Query
from agent360.mesh.metrics.queries.reading import compiled
from agent360.mesh.runtime.call import MESH_TENANT

FAULTS: Final = "UNKNOWN|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE|DATA_LOSS"
"""Codes of calls that failed by the service's fault; an expression."""

_INFERENCE: Final = "inference"


class _Burn(NamedTuple):
    """How fast a budget is used up before somebody is told."""

    name: str
    rate: float
    window_s: int
    short_window_s: int
    severity: str


_BURNS: Final = (
    _Burn("fast", 14.4, 3_600, 300, "page"),
    _Burn("slow", 6.0, 6 * 3_600, 1_800, "ticket"),
)


def slo_rules(settings: SloSettings) -> tuple[AlertRule, ...]:
    """The rules that come with the service; they are about the calls of all tenants."""
    if not settings.enabled:
        return ()
    return tuple(
        rule
        for burn in _BURNS
        for rule in (
            _errors(settings, burn),
            _latency(settings, burn, settings.latency_s, inference=False),
            _latency(settings, burn, settings.inference_latency_s, inference=True),
        )
    )


def _errors(settings: SloSettings, burn: _Burn) -> AlertRule:
    calls = _calls("mesh_requests", Aggregation.SUM)
    faults = _calls(
        "mesh_requests", Aggregation.SUM, Matcher("code", False, FAULTS, True, compiled(FAULTS))
    )
    return _rule(
        f"mesh-errors-{burn.name}-burn",
        burn,
        faults,
        divide_by=calls,
        threshold=burn.rate * (1 - settings.availability),
        at_least=settings.at_least,
        summary="{{labels.service}} fails {{value}} of its calls",
        objective=f"{settings.availability:.4g} of calls do not fail",
    )


def _latency(settings: SloSettings, burn: _Burn, bound_s: float, *, inference: bool) -> AlertRule:
    slow = _calls(
        "mesh_request_seconds",
        Aggregation.SHARE_ABOVE,
        Matcher("service", not inference, _INFERENCE),
        bound=bound_s,
    )
    return _rule(
        f"mesh-{'inference-' if inference else ''}latency-{burn.name}-burn",
        burn,
        slow,
        divide_by=None,
        threshold=burn.rate * (1 - settings.fast),
        at_least=settings.at_least,
        summary=f"{{{{labels.service}}}} takes over {bound_s:g} s for {{{{value}}}} of its calls",
        objective=f"{settings.fast:.4g} of calls take at most {bound_s:g} s",
    )


def _rule(
    rule_id: str,
    burn: _Burn,
    query: Query,
    *,
    divide_by: Query | None,
    threshold: float,
    at_least: float,
    summary: str,
    objective: str,
) -> AlertRule:
    pace = f"{burn.rate:g} times too fast for {burn.window_s // 3_600} h"
    return AlertRule(
        tenant=MESH_TENANT,
        rule_id=rule_id,
        query=query,
        divide_by=divide_by,
        window_s=burn.window_s,
        short_window_s=burn.short_window_s,
        comparison=">",
        threshold=threshold,
        at_least=at_least,
        labels=(("severity", burn.severity),),
        annotations=(
            ("description", f"The budget of the objective ({objective}) is used up {pace}."),
            ("summary", summary),
        ),
        built_in=True,
    )


def _calls(name: str, aggregation: Aggregation, *matchers: Matcher, bound: float = 0.0) -> Query:
    return Query(
        tenant=None,
        name=name,
        matchers=matchers,
        start_s=0,
        end_s=BUCKET_S,
        step_s=BUCKET_S,
        aggregation=aggregation,
        bound=bound,
        group_by=("service",),
    )
