"""The life of an alert, step by step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent360.client import metric_query
from agent360.mesh.metrics.alerts.lifecycle import OUTAGE_S, Alert, AlertState, held, not_held
from agent360.mesh.metrics.alerts.rules import AlertRule, filled_in, unknown_places
from agent360.mesh.metrics.queries.reading import read_query

QUERY = read_query("acme", metric_query("calls", "sum"), 1.8e9)
LABELS = (("model", "m"),)


def rule(for_s: float = 0.0, keep_s: float = 0.0) -> AlertRule:
    return AlertRule("acme", "busy", QUERY, 60, ">", 1.0, for_s=for_s, keep_firing_for_s=keep_s)


def run(watched: AlertRule, course: str, every_s: float = 10.0) -> str:
    """The states over a course of evaluations: + the condition holds, - it does not."""
    alert: Alert | None = None
    states = ""
    for number, sign in enumerate(course):
        now_s = 1_000 + number * every_s
        if sign == "+":
            alert = held(watched, alert, LABELS, 2.0, now_s)
        elif alert is not None:
            alert = not_held(watched.keep_firing_for_s, alert, now_s)
        states += "." if alert is None else alert.state.name[0].lower()
    return states


@pytest.mark.parametrize(
    ("for_s", "keep_s", "course", "states"),
    [
        (0, 0, "-+-", ".fr"),
        (20, 0, "++++-", "ppffr"),
        (20, 0, "++-+++-", "pp.ppfr"),
        (25, 0, "+++++", "pppff"),
        (0, 25, "+----", "fffrr"),
        (0, 20, "+-+--", "ffffr"),
        (10, 15, "++-+--+", "pffffrp"),
        (0, 0, "+-+", "frf"),
    ],
)
def test_alerts_pend_fire_and_resolve(
    for_s: float, keep_s: float, course: str, states: str
) -> None:
    assert run(rule(for_s, keep_s), course) == states


def test_an_alert_goes_on_pending_after_a_short_outage_and_begins_anew_after_a_long_one() -> None:
    watched = rule(for_s=600)
    pending = held(watched, None, LABELS, 2.0, 1_000)
    after_short = held(watched, pending, LABELS, 2.0, 1_000 + 700)
    assert after_short.state is AlertState.FIRING
    after_long = held(watched, pending, LABELS, 2.0, 1_000 + OUTAGE_S + 1)
    assert (after_long.state, after_long.since_s) == (AlertState.PENDING, 1_000 + OUTAGE_S + 1)


@given(
    st.text("+-", max_size=40),
    st.integers(0, 6).map(lambda n: n * 10.0),
    st.integers(0, 6).map(lambda n: n * 10.0),
)
def test_it_fires_only_after_for_and_resolves_only_after_keep_firing_for(
    course: str, for_s: float, keep_s: float
) -> None:
    states = run(rule(for_s, keep_s), course)
    for place in range(len(course)):
        began = place > 0 and states[place - 1] == "f"
        if states[place] == "f" and not began:
            steps = int(for_s // 10)
            assert "-" not in course[place - steps : place + 1]
            assert place >= steps
        if states[place] == "r" and began:
            last = course.rindex("+", 0, place)
            assert (place - last) * 10 >= keep_s


def test_texts_are_filled_in() -> None:
    labels = (("model", "m"), ("zone", "z"))
    text = "{{labels.model}} in {{ $labels.zone }}{{labels.no}}: {{ $value }} ({{labels}})"
    assert filled_in(text, labels, 0.123456789) == "m in z: 0.123457 (model=m, zone=z)"
    assert unknown_places(text) == []
    assert unknown_places("{{ value | humanize }} {{labels.a b}} {{x}}") == [
        "value | humanize",
        "labels.a b",
        "x",
    ]


def test_a_fingerprint_is_of_tenant_and_labels() -> None:
    one = held(rule(), None, (("a", "b"),), 1, 1)
    assert held(rule(), None, (("a", "b"),), 2, 9).fingerprint == one.fingerprint
    assert held(rule(), None, (("a", "c"),), 1, 1).fingerprint != one.fingerprint
    assert held(rule(), None, (("a\1b", ""),), 1, 1).fingerprint != one.fingerprint
