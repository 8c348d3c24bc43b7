"""Which limits apply, windows of the calendar, and what a wrong file is told."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent360.mesh.ratelimit.limits import Algorithm, Limit, LimitsError, LimitSet
from agent360.mesh.ratelimit.limits_file import read_limits
from agent360.mesh.ratelimit.windows import Calendar, CalendarWindows


def ids(limits: LimitSet, tenant: str, name: str, **facts: str) -> set[tuple[str, int]]:
    known = {**facts, "tenant": tenant, "plan": limits.plan_of(tenant)}
    return {(each.limit_id, each.amount) for each in limits.matching(tenant, name, known)}


def test_of_one_id_a_tenant_has_its_own_limit_or_its_plans_or_the_general_one() -> None:
    limits = LimitSet(
        [
            Limit("r", 1, 1.0, tenant="own"),
            Limit("r", 2, 1.0, plan="pro"),
            Limit("r", 3, 1.0),
        ],
        {"own": "pro", "globex": "pro"},
    )
    assert ids(limits, "own", "x") == {("r", 1)}
    assert ids(limits, "globex", "x") == {("r", 2)}
    assert ids(limits, "acme", "x") == {("r", 3)}


def test_the_plan_is_a_fact_that_limits_may_match() -> None:
    limits = LimitSet([Limit("free", 1, 1.0, match={"plan": "default"})], {"globex": "pro"})
    assert ids(limits, "acme", "x") == {("free", 1)}
    assert ids(limits, "globex", "x") == set()


def test_of_a_group_only_the_most_specific_limit_applies() -> None:
    limits = LimitSet(
        [
            Limit("any", 1, 1.0, group="g", match={"model": "*"}),
            Limit("family", 2, 1.0, group="g", match={"model": "gpt-*", "user": "*"}),
            Limit("vip", 3, 1.0, group="g", match={"model": "*", "user": "ana"}),
            Limit("named", 4, 1.0, group="g", name="chat"),
            Limit("alone", 5, 1.0),
        ]
    )
    assert ids(limits, "acme", "x", model="m") == {("any", 1), ("alone", 5)}
    assert ids(limits, "acme", "x", model="gpt-9", user="ben") == {("family", 2), ("alone", 5)}
    assert ids(limits, "acme", "x", model="gpt-9", user="ana") == {("vip", 3), ("alone", 5)}
    assert ids(limits, "acme", "chat", model="m") == {("named", 4), ("alone", 5)}


def us(*parts: int) -> int:
    return int(datetime(*parts, tzinfo=UTC).timestamp() * 1e6)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("unit", "zone", "now", "start", "end"),
    [
        (Calendar.HOUR, "Asia/Kolkata", (2026, 5, 1, 0, 40), (2026, 5, 1, 0, 30),
         (2026, 5, 1, 1, 30)),
        (Calendar.DAY, "UTC", (2026, 5, 1, 23, 59), (2026, 5, 1), (2026, 5, 2)),
        (Calendar.DAY, "Europe/Berlin", (2026, 3, 29, 12), (2026, 3, 28, 23), (2026, 3, 29, 22)),
        (Calendar.WEEK, "UTC", (2026, 5, 3), (2026, 4, 27), (2026, 5, 4)),
        (Calendar.MONTH, "America/New_York", (2026, 3, 1, 2), (2026, 2, 1, 5), (2026, 3, 1, 5)),
        (Calendar.MONTH, "UTC", (2026, 12, 31), (2026, 12, 1), (2027, 1, 1)),
        (Calendar.YEAR, "UTC", (2028, 2, 29), (2028, 1, 1), (2029, 1, 1)),
    ],
)  # fmt: skip
def test_windows_follow_the_calendar_of_their_time_zone(
    unit: Calendar,
    zone: str,
    now: tuple[int, ...],
    start: tuple[int, ...],
    end: tuple[int, ...],
) -> None:
    assert CalendarWindows(unit, zone).at(us(*now)) == (us(*start), us(*end))


GOOD = '[[limits]]\nid = "a"\namount = 1\nperiod = "1s"\n'


@pytest.mark.parametrize(
    ("text", "line", "fault"),
    [
        (GOOD + '\n[[limits]]\nid = "b"\namount = 0\nperiod = "1s"', 8, "amount must be"),
        (GOOD + '\n[[limits]]\nid = "b"\namount = 1', 6, "period must be"),
        (GOOD + 'typo = "x"', 5, "'typo' is not known"),
        (GOOD + "\n" + GOOD, 7, "stands twice"),
        (GOOD + '\n[[limits]]\nid="b"\namount=1\nalgorithm="concurrency"\nperiod="1s"', 10,
         "not used by concurrency"),
        (GOOD + 'time_zone = "Mars/Phobos"', 5, "needs a calendar's period"),
        (GOOD.replace("1s", "1d") + 'algorithm="fixed_window"\ntime_zone = "Mars/Phobos"', 6,
         "there is no time zone"),
        (GOOD + "burst = -1", 5, "burst must not be negative"),
        (GOOD + "[tenants]\nacme = 7", 6, "must be a name"),
        ("[plans]\n", 1, "'plans' is not known"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_the_line(
    tmp_path: Path, text: str, line: int, fault: str
) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(text)
    with pytest.raises(LimitsError, match=fault) as caught:
        read_limits(file)
    assert f"limits.toml:{line}:" in str(caught.value)


def test_a_file_may_say_everything(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(
        '[[limits]]\nid = "m"\namount = 5\nperiod = "month"\nalgorithm = "fixed_window"\n'
        'time_zone = "Asia/Tokyo"\nfailure_mode = "closed"\nplan = "pro"\ngroup = "g"\n'
        'match = { model = "gpt-*" }\nstrict = true\n[tenants]\nacme = "pro"\n'
    )
    limits = read_limits(file)
    (limit,) = limits
    assert (limit.algorithm, limit.calendar) == (Algorithm.FIXED_WINDOW, Calendar.MONTH)
    assert limits.of("acme") == {"m": limit}
    assert limits.of("globex") == {}
