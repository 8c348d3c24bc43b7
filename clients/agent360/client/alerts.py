"""Alert rules and silences, as messages of the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, Literal

from agent360.client.metric_queries import LabelMatch, matcher_messages
from agent360.metrics.v1 import metrics_pb2 as pb

Comparison = Literal[">", ">=", "<", "<="]

_COMPARISONS: Final[Mapping[Comparison, pb.Comparison.ValueType]] = {
    ">": pb.COMPARISON_GREATER,
    ">=": pb.COMPARISON_GREATER_OR_EQUAL,
    "<": pb.COMPARISON_LESS,
    "<=": pb.COMPARISON_LESS_OR_EQUAL,
}


def alert_rule(
    rule_id: str,
    query: pb.QueryRequest,
    comparison: Comparison,
    threshold: float,
    *,
    window: timedelta,
    short_window: timedelta | None = None,
    divide_by: pb.QueryRequest | None = None,
    at_least: float = 0.0,
    hold: timedelta = timedelta(0),
    keep_firing: timedelta = timedelta(0),
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> pb.AlertRule:
    """A condition that is watched.

    Args:
        rule_id: names the rule within the tenant.
        query: what is computed, from ``metric_query`` without times.
        comparison: how it is compared.
        threshold: with what.
        window: of the query; it ends with each evaluation.
        short_window: a second one over which the condition must hold, too.
        divide_by: divides the value of ``query`` by that of this one, group by group.
        at_least: groups with a lower value of ``divide_by``, or without it with fewer samples, are
            left out.
        hold: how long the condition must hold at every evaluation before the alert fires.
        keep_firing: how long it goes on firing after the condition last held.
        labels: added to those of the group.
        annotations: texts for people, with ``{{value}}`` and ``{{labels.NAME}}``.

    Example:
        >>> slow = metric_query("plan_seconds", "quantiles", quantiles=[0.99], group_by=["kind"])
        >>> rule = alert_rule("slow-plans", slow, ">", 2.0, window=timedelta(minutes=5))
        >>> await mesh.metrics.set_alert_rule(rule)
    """
    rule = pb.AlertRule(
        rule_id=rule_id,
        query=query,
        comparison=_COMPARISONS[comparison],
        threshold=threshold,
        at_least=at_least,
        labels=dict(labels or {}),
        annotations=dict(annotations or {}),
    )
    rule.window.FromTimedelta(window)
    if short_window is not None:
        rule.short_window.FromTimedelta(short_window)
    if divide_by is not None:
        rule.divide_by.CopyFrom(divide_by)
    if hold:
        getattr(rule, "for").FromTimedelta(hold)
    if keep_firing:
        rule.keep_firing_for.FromTimedelta(keep_firing)
    return rule


def silence_of(
    where: Sequence[LabelMatch], end: datetime, start: datetime | None, comment: str
) -> pb.Silence:
    """A silence; see ``MetricsClient.create_silence``."""
    silence = pb.Silence(comment=comment, matchers=matcher_messages(where))
    silence.end_time.FromDatetime(end)
    if start is not None:
        silence.start_time.FromDatetime(start)
    return silence
