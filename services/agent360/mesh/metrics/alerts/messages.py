"""Alerts and built-in rules as messages of the contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from agent360.mesh.metrics.alerts.lifecycle import Alert
from agent360.mesh.metrics.alerts.rules import AlertRule
from agent360.mesh.metrics.queries.query import Aggregation, Matcher, Query
from agent360.mesh.runtime.validation import set_duration
from agent360.metrics.v1 import metrics_pb2 as pb

_COMPARISONS: Final = {
    ">": pb.COMPARISON_GREATER,
    ">=": pb.COMPARISON_GREATER_OR_EQUAL,
    "<": pb.COMPARISON_LESS,
    "<=": pb.COMPARISON_LESS_OR_EQUAL,
}


def alert_message(alert: Alert, silences: Sequence[str]) -> Any:
    """A wire Alert."""
    message = pb.Alert(
        rule_id=alert.rule_id,
        labels=dict(alert.labels),
        value=alert.value,
        annotations=dict(alert.annotations),
        tenant=alert.tenant,
        silenced_by=silences,
    )
    message.state = int(alert.state)  # type: ignore[assignment]  # an enum's number
    message.state_time.FromNanoseconds(int(alert.state_s * 1e9))
    return message


def built_in_message(rule: AlertRule, fault: str) -> Any:
    """A wire AlertRule of a rule that comes with the service."""
    message = pb.AlertRule(
        rule_id=rule.rule_id,
        query=_question(rule.query),
        comparison=_COMPARISONS[rule.comparison],
        threshold=rule.threshold,
        at_least=rule.at_least,
        labels=dict(rule.labels),
        annotations=dict(rule.annotations),
        built_in=True,
        last_error=fault,
    )
    if rule.divide_by is not None:
        message.divide_by.CopyFrom(_question(rule.divide_by))
    for field, seconds in (
        ("window", rule.window_s),
        ("short_window", rule.short_window_s),
        ("for", rule.for_s),
        ("keep_firing_for", rule.keep_firing_for_s),
    ):
        if seconds:
            set_duration(getattr(message, field), seconds)
    return message


def _question(query: Query) -> Any:
    return pb.QueryRequest(
        name=query.name,
        aggregation=pb.Aggregation.Value(f"AGGREGATION_{query.aggregation.name}"),
        quantiles=query.quantiles if query.aggregation is Aggregation.QUANTILES else (),
        bound=query.bound,
        group_by=query.group_by,
        matchers=[_matcher(each) for each in query.matchers],
    )


def _matcher(matcher: Matcher) -> Any:
    kind = "REGEX" if matcher.is_pattern else "EQUAL"
    name = f"MATCH_OPERATOR_{'NOT_' if matcher.negated else ''}{kind}"
    operator = pb.MatchOperator.Value(name)
    return pb.LabelMatcher(label=matcher.label, operator=operator, value=matcher.value)
