"""Reads alert rules and silences from messages of the contract; every fault is found and named."""

from __future__ import annotations

import math
import re
from typing import Any, Final

from agent360.mesh.metrics.alerts.rules import RULE_LABEL, AlertRule, unknown_places
from agent360.mesh.metrics.alerts.silences import Silence
from agent360.mesh.metrics.frame import BUCKET_S
from agent360.mesh.metrics.queries.query import TENANT_LABEL, Aggregation, Query
from agent360.mesh.metrics.queries.reading import read_matchers, read_question
from agent360.mesh.metrics.series import LABEL
from agent360.mesh.runtime.validation import Violations, seconds_of
from agent360.metrics.v1 import metrics_pb2 as pb

RULE_ID: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
"""What a rule may be called."""

_COMPARISONS: Final = {
    pb.COMPARISON_GREATER: ">",
    pb.COMPARISON_GREATER_OR_EQUAL: ">=",
    pb.COMPARISON_LESS: "<",
    pb.COMPARISON_LESS_OR_EQUAL: "<=",
}
_MAX_WINDOW_S: Final = 35 * 86_400
_MAX_WAIT_S: Final = 7 * 86_400
_MAX_TEXTS: Final = 16
_MAX_LABEL_BYTES: Final = 256
_MAX_TEXT_BYTES: Final = 4_096
_MAX_SILENCE_S: Final = 366 * 86_400
_OWN_LABELS: Final = (RULE_LABEL, TENANT_LABEL)


def read_rule(tenant: str, message: Any) -> AlertRule:
    """An AlertRule.

    Raises:
        InvalidRequestError: it is malformed.
    """
    faults = Violations()
    faults.nested("rule", lambda inner: _check(inner, tenant, message))
    faults.raise_if_any()
    return _rule(Violations(), tenant, message)


def _check(faults: Violations, tenant: str, message: Any) -> None:
    faults.matches("rule_id", message.rule_id, RULE_ID, f"must match {RULE_ID.pattern}")
    _rule(faults, tenant, message)
    faults.require("comparison", message.comparison in _COMPARISONS, "is missing or not known")
    for field in ("threshold", "at_least"):
        faults.require(field, math.isfinite(getattr(message, field)), "must be finite")
    _check_window(faults, "window", message.window, required=True)
    _check_window(faults, "short_window", message.short_window)
    if message.HasField("short_window"):
        shorter = seconds_of(message.short_window) < seconds_of(message.window)
        faults.require("short_window", shorter, "must be shorter than window")
    for field in ("for", "keep_firing_for"):
        given_s = seconds_of(getattr(message, field))
        faults.require(field, 0 <= given_s <= _MAX_WAIT_S, "must be from 0 to 7 days")
    if message.HasField("divide_by"):
        same = (
            list(message.divide_by.group_by) == list(message.query.group_by)
            and message.divide_by.by_series == message.query.by_series
        )
        faults.require("divide_by.group_by", same, "must be the same as that of query")
    faults.require("at_least", message.at_least >= 0, "must not be negative")
    _check_texts(faults, "labels", message.labels, _MAX_LABEL_BYTES)
    for name in _OWN_LABELS:
        faults.require(f"labels[{name}]", name not in message.labels, "is set by the service")
    _check_texts(faults, "annotations", message.annotations, _MAX_TEXT_BYTES)
    for name, text in message.annotations.items():
        for place in unknown_places(text):
            faults.add(
                f"annotations[{name[:64]}]",
                f"{{{{{place[:64]}}}}} cannot be filled in: there are value, labels, labels.NAME",
            )


def _rule(faults: Violations, tenant: str, message: Any) -> AlertRule:
    divide_by = None
    if message.HasField("divide_by"):
        divide_by = _question(faults, "divide_by", tenant, message.divide_by)
    return AlertRule(
        tenant=tenant,
        rule_id=message.rule_id,
        query=_question(faults, "query", tenant, message.query),
        window_s=int(seconds_of(message.window)),
        short_window_s=int(seconds_of(message.short_window)),
        divide_by=divide_by,
        at_least=message.at_least,
        comparison=_COMPARISONS.get(message.comparison, ">"),
        threshold=message.threshold,
        for_s=seconds_of(getattr(message, "for")),
        keep_firing_for_s=seconds_of(message.keep_firing_for),
        labels=tuple(sorted(message.labels.items())),
        annotations=tuple(sorted(message.annotations.items())),
    )


def _question(faults: Violations, field: str, tenant: str, message: Any) -> Query:
    found: list[Query] = []
    faults.nested(field, lambda inner: found.append(read_question(inner, tenant, message)))
    (query,) = found
    if query.aggregation is Aggregation.QUANTILES:
        faults.require(f"{field}.quantiles", len(query.quantiles) == 1, "must be exactly one")
    faults.require(f"{field}.top_k", not query.top_k, "must be absent: a group would come and go")
    return query


def _check_window(faults: Violations, field: str, window: Any, *, required: bool = False) -> None:
    window_s = seconds_of(window)
    if not required and window_s == 0:
        return
    fits = 0 < window_s <= _MAX_WINDOW_S and window_s % BUCKET_S == 0
    faults.require(field, fits, f"must be a positive multiple of {BUCKET_S} s, at most 35 days")


def _check_texts(faults: Violations, field: str, texts: Any, max_bytes: int) -> None:
    faults.count(field, len(texts), at_least=0, at_most=_MAX_TEXTS)
    for name, text in texts.items():
        place = f"{field}[{name[:64]}]"
        faults.matches(place, name, LABEL, "must be a label's name")
        faults.text(place, text, max_bytes=max_bytes, min_bytes=0)


def read_silence(tenant: str, silence_id: str, message: Any) -> Silence:
    """A Silence whose times are given.

    Raises:
        InvalidRequestError: it is malformed.
    """
    faults = Violations()
    found: list[Silence] = []

    def read(inner: Violations) -> None:
        matchers = read_matchers(inner, message.matchers)
        inner.count("matchers", len(matchers), at_least=1, at_most=_MAX_TEXTS)
        for field in ("start_time", "end_time"):
            inner.time(field, getattr(message, field))
        start_s = message.start_time.seconds + message.start_time.nanos / 1e9
        end_s = message.end_time.seconds + message.end_time.nanos / 1e9
        inner.require("end_time", message.HasField("end_time"), "is missing")
        inner.require("end_time", start_s < end_s, "must be after start_time, and in the future")
        inner.require("end_time", end_s - start_s <= _MAX_SILENCE_S, "is over a year after")
        inner.text("comment", message.comment, max_bytes=_MAX_TEXT_BYTES, min_bytes=0)
        found.append(Silence(tenant, silence_id, matchers, start_s, end_s))

    faults.nested("silence", read)
    faults.raise_if_any()
    return found[0]
