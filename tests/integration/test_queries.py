"""Queries on a real store: what is computed, what is kept of it, and what it may cost."""

import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.metric_history import DAY_S, NOON_S, Clock, metric_history

from agent360.client import InvalidRequestError, MeshError, metric_query
from agent360.client.metric_queries import LabelMatch
from agent360.mesh.metrics.queries.query import Group
from agent360.mesh.metrics.queries.reading import read_query
from agent360.mesh.metrics.series import Kind
from agent360.metrics.v1 import metrics_pb2 as pb

MINUTE = timedelta(minutes=1)


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def asked(name: str, aggregation: Any, minutes: float = 10, **rest: Any) -> pb.QueryRequest:
    """About the minutes before noon."""
    start = at(NOON_S - 60 * minutes)
    return metric_query(name, aggregation, start=start, end=at(NOON_S), **rest)


def points(group: Group) -> list[tuple[int, float]]:
    """Minutes before noon, and values."""
    times = ((NOON_S - group.times_s) // 60).tolist()
    return list(zip(times, group.values[:, 0].tolist(), strict=True))


async def test_each_aggregation_is_what_one_would_reckon(tmp_path: Path) -> None:
    async with metric_history(tmp_path) as past:
        await past.add("hits", [(NOON_S - 120, 3), (NOON_S - 110, 5), (NOON_S - 60, 1)])
        wanted = {
            "count": [(2, 2), (1, 1)],
            "sum": [(2, 8), (1, 1)],
            "increase": [(2, 8), (1, 1)],
            "rate": [(2, 8 / 60), (1, 1 / 60)],
            "mean": [(2, 4), (1, 1)],
            "min": [(2, 3), (1, 1)],
            "max": [(2, 5), (1, 1)],
            "last": [(2, 5), (1, 1)],
        }
        for aggregation, values in wanted.items():
            (group,) = await past.ask(asked("hits", aggregation, step=MINUTE))
            assert points(group) == values, aggregation


async def test_a_step_that_is_not_over_has_its_rate_so_far(tmp_path: Path) -> None:
    async with metric_history(tmp_path, Clock(NOON_S + 20)) as past:
        await past.add("hits", [(NOON_S, 100), (NOON_S + 15, 100)])
        (group,) = await past.ask(metric_query("hits", "rate", step=MINUTE))
        assert group.values.tolist() == [[10.0]]


async def test_an_instant_is_one_point_of_the_step_before_it(tmp_path: Path) -> None:
    async with metric_history(tmp_path) as past:
        await past.add("hits", [(NOON_S - 400, 1), (NOON_S - 200, 2), (NOON_S - 50, 4)])
        now = at(NOON_S)
        (five_minutes,) = await past.ask(metric_query("hits", "sum", start=now, end=now))
        assert points(five_minutes) == [(5, 6)]
        (minute,) = await past.ask(metric_query("hits", "sum", start=now, end=now, step=MINUTE))
        assert points(minute) == [(1, 4)]
        seconds = timedelta(seconds=390)
        unaligned = metric_query("hits", "sum", start=now - seconds, end=now, step=seconds)
        (last,) = await past.ask(unaligned)
        assert last.values.tolist() == [[6]]
        (whole,) = await past.ask(metric_query("hits", "sum"))
        assert points(whole) == [(60, 7)]


async def test_a_long_range_as_one_point_is_made_of_coarse_and_fine_buckets(
    tmp_path: Path,
) -> None:
    async with metric_history(tmp_path) as past:
        chance = random.Random(3)
        samples = [(NOON_S - chance.uniform(0, 30 * 3_600), 1.0) for _ in range(2_000)]
        await past.add("hits", sorted(samples))
        await past.intake.commit()
        await past.store.compact(NOON_S, past.intake.writer, 1 << 60)
        start_s = NOON_S - 26 * 3_600 - 30
        request = metric_query("hits", "sum", start=at(start_s), end=at(NOON_S - 1_230))
        (group,) = await past.ask(request)
        inside = [time_s for time_s, _ in samples if start_s <= time_s < NOON_S - 1_230]
        assert group.values.tolist() == [[len(inside)]]
        (again,) = await past.ask(request)
        assert again.values.tolist() == group.values.tolist()


async def test_quantiles_are_merged_over_series_and_steps(tmp_path: Path) -> None:
    async with metric_history(tmp_path) as past:
        for value in range(1, 101):
            await past.add(
                "seconds",
                [(NOON_S - 6 * value, value / 10)],
                {"model": "a" if value % 2 else "b"},
                kind=Kind.DISTRIBUTION,
                unit="s",
            )
        wanted = [0.0, 0.5, 0.99, 1.0]
        (group,) = await past.ask(asked("seconds", "quantiles", quantiles=wanted))
        assert group.values[0] == pytest.approx([0.1, 5.0, 9.9, 10.0], rel=0.011)
        assert group.counts.tolist() == [100]
        (share,) = await past.ask(asked("seconds", "share_above", bound=7.53))
        assert share.values.tolist() == [[0.25]]


async def test_groups_are_by_labels_and_never_mix_units_or_kinds(tmp_path: Path) -> None:
    async with metric_history(tmp_path) as past:
        when = NOON_S - 60
        await past.add("size", [(when, 1)], {"model": "a"}, kind=Kind.GAUGE, unit="By")
        await past.add("size", [(when, 2)], {"model": "b"}, kind=Kind.GAUGE, unit="By")
        await past.add("size", [(when, 4)], {"model": "b"}, kind=Kind.GAUGE, unit="kBy")
        groups = await past.ask(asked("size", "sum"))
        assert [(group.unit, group.values.tolist()) for group in groups] == [
            ("By", [[3.0]]),
            ("kBy", [[4.0]]),
        ]
        groups = await past.ask(asked("size", "sum", group_by=["model", "zone"]))
        assert [dict(group.labels) for group in groups] == [
            {"model": "a", "zone": ""},
            {"model": "b", "zone": ""},
            {"model": "b", "zone": ""},
        ]
        with pytest.raises(InvalidRequestError, match="increase needs a counter; size is a gauge"):
            await past.ask(asked("size", "increase"))
        with pytest.raises(InvalidRequestError, match="quantiles needs a distribution"):
            await past.ask(asked("size", "quantiles", quantiles=[0.5]))


async def test_matchers_choose_series_and_an_absent_label_is_empty(tmp_path: Path) -> None:
    async with metric_history(tmp_path) as past:
        for number, labels in enumerate(({"code": "OK"}, {"code": "INTERNAL"}, {})):
            await past.add("calls", [(NOON_S - 60, 10**number)], labels)
        for where, total in (
            (LabelMatch("code", "=", "OK"), 1),
            (LabelMatch("code", "!=", "OK"), 110),
            (LabelMatch("code", "=", ""), 100),
            (LabelMatch("code", "=~", "OK|INT.*"), 11),
            (LabelMatch("code", "=~", "O"), 0),
            (LabelMatch("code", "!~", ".+"), 100),
        ):
            groups = await past.ask(asked("calls", "sum", where=[where]))
            assert sum(group.values.sum() for group in groups) == total, where


async def test_top_k_has_the_largest_first(tmp_path: Path) -> None:
    async with metric_history(tmp_path) as past:
        for number in range(5):
            await past.add("calls", [(NOON_S - 60, number)], {"n": str(number)})
        groups = await past.ask(asked("calls", "sum", group_by=["n"], top_k=2))
        assert [dict(group.labels) for group in groups] == [{"n": "4"}, {"n": "3"}]


async def test_trends_are_against_the_same_step_a_day_and_a_week_before(tmp_path: Path) -> None:
    async with metric_history(tmp_path) as past:
        for days, value in ((0, 6.0), (1, 3.0)):
            await past.add("calls", [(NOON_S - days * DAY_S - 90, value)], {"n": "1"})
        await past.add("calls", [(NOON_S - 7 * DAY_S - 90, 9.0)], {"n": "2"})
        offsets = [timedelta(days=1), timedelta(days=7)]
        (group,) = await past.ask(
            asked("calls", "sum", step=MINUTE, group_by=["n"], compare_to=offsets)
        )
        day, week = group.trends
        assert (day.offset_s, day.values.tolist(), day.ratios.tolist()) == (86_400, [[3]], [[2]])
        assert math.isnan(week.values[0, 0])
        assert math.isnan(week.ratios[0, 0])
        (whole,) = await past.ask(asked("calls", "sum", compare_to=offsets))
        assert whole.trends[1].values.tolist() == [[9]]
        assert whole.trends[1].ratios.tolist() == [[6 / 9]]


async def test_steps_that_are_over_are_read_once_and_again_when_a_sample_comes_late(
    tmp_path: Path,
) -> None:
    async with metric_history(tmp_path, Clock(NOON_S + 60)) as past:
        await past.add("calls", [(NOON_S - 90, 1)])
        request = asked("calls", "sum", minutes=120, step=MINUTE)
        for _ in range(2):
            assert [points(group) for group in await past.ask(request)] == [[(2, 1)]]
        assert (past.kept.hits, past.kept.misses) == (2, 2)
        await past.add("other", [(NOON_S - 90, 1)])
        await past.add("calls", [(NOON_S - 90, 1)], tenant="globex")
        await past.ask(request)
        assert past.kept.invalidated == 0
        await past.add("calls", [(NOON_S - 80, 5)], {"new": "series"})
        assert [points(group) for group in await past.ask(request)] == [[(2, 6)]]
        assert past.kept.invalidated == 1
        assert (past.kept.hits, past.kept.misses) == (5, 3)


async def test_a_sample_that_comes_while_a_query_reads_is_not_lost_to_the_cache(
    tmp_path: Path,
) -> None:
    async with metric_history(tmp_path, Clock(NOON_S + 60)) as past:
        await past.add("calls", [(NOON_S - 90, 1)])
        read = past.history.read

        async def slow(*arguments: Any, **rest: Any) -> Any:
            frame = await read(*arguments, **rest)
            await past.add("calls", [(NOON_S - 90, 5)])
            return frame

        past.history.read = slow  # type: ignore[method-assign]
        request = asked("calls", "sum", step=MINUTE)
        await past.ask(request)
        past.history.read = read  # type: ignore[method-assign]
        assert [points(group) for group in await past.ask(request)] == [[(2, 6)]]


async def test_kept_answers_are_the_ones_that_are_read_anew_whatever_comes_when(
    tmp_path: Path,
) -> None:
    chance = random.Random(7)
    async with metric_history(tmp_path) as past:

        async def compare() -> None:
            step_s = chance.choice([10, 60, 300, 420, 3_600, 7_200, 0])
            reach_s = chance.choice([600, 5_000, 20_000, 90_000])
            end_s = past.clock.now_s - chance.choice([0, 0, 3_333, 40_000])
            request = metric_query(
                "seconds",
                chance.choice(["sum", "last", "max", "quantiles"]),
                start=at(end_s - reach_s),
                end=at(end_s),
                step=timedelta(seconds=step_s) if step_s else None,
                quantiles=[0.5, 0.9],
                group_by=chance.choice([[], ["model"]]),
            )
            query = read_query(chance.choice(["acme", None]), request, past.clock())
            found = await past.engine.answer(query)
            anew = await past.another_engine().answer(query)
            assert [plain(group) for group in found] == [plain(group) for group in anew]

        def plain(group: Group) -> tuple[Any, ...]:
            return (*group[:2], *(column.tolist() for column in group[2:5]))

        for _ in range(60):
            past.clock.now_s += chance.choice([5, 60, 700, 4_000])
            for _ in range(chance.randrange(3)):
                late_s = chance.choice([0, 5, 50, 5_000, 60_000])
                time_s = past.clock.now_s - late_s
                value = float(chance.randrange(1, 100))
                tenant = chance.choice(["acme", "globex"])
                await past.add(
                    "seconds",
                    [(time_s, value)],
                    {"model": chance.choice("ab")},
                    tenant=tenant,
                    kind=Kind.DISTRIBUTION,
                )
            if chance.random() < 0.1:
                await past.intake.commit()
                await past.store.compact(past.clock(), past.intake.writer, 1 << 60)
            await compare()
        assert past.kept.hits > 20
        assert past.kept.invalidated > 5


async def test_the_cache_is_bounded_by_tenant(tmp_path: Path) -> None:
    async with metric_history(tmp_path, Clock(NOON_S + 60)) as past:
        past.kept._max_tenant_bytes = 20_000
        for tenant in ("acme", "globex"):
            for hour in range(12):
                sample = (NOON_S - 3_600 * hour - 60, 1.0)
                await past.add("calls", [sample], tenant=tenant)
        request = asked("calls", "sum", minutes=720, step=MINUTE)
        await past.ask(request, "globex")
        theirs = past.kept.size_bytes
        assert 10_000 < theirs <= 20_000
        await past.ask(request)
        assert theirs < past.kept.size_bytes <= 40_000
        assert past.kept.shrink(5_000) > 0
        assert past.kept.size_bytes <= 5_000


async def test_a_query_that_costs_too_much_says_what_to_narrow(tmp_path: Path) -> None:
    async with metric_history(tmp_path) as past:
        for number in range(20):
            await past.add("calls", [(NOON_S - 60, 1)], {"n": str(number)})
        request = asked("calls", "sum", minutes=60, step=timedelta(seconds=10), by_series=True)
        query = read_query("acme", request, past.clock())
        with pytest.raises(MeshError, match=r"20 series x 360 .*query.max_rollups") as caught:
            await past.another_engine(max_rollups=1_000).answer(query)
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.reason == "QUERY_TOO_LARGE"
        with pytest.raises(MeshError, match=r"20 groups x 360 steps .*query.max_points"):
            await past.another_engine(max_points=1_000).answer(query)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "no name"}, "name"),
        ({"aggregation": 0}, "aggregation"),
        ({"step": {"seconds": 15}}, "step"),
        ({"step": {"nanos": 5}}, "step"),
        ({"step": {"seconds": -10}}, "step"),
        ({"start_time": {"seconds": NOON_S + 5}}, "start_time"),
        ({"start_time": {"seconds": -5}}, "start_time"),
        ({"aggregation": pb.AGGREGATION_QUANTILES}, "quantiles"),
        ({"quantiles": [1.5]}, "quantiles"),
        ({"quantiles": [math.nan]}, "quantiles"),
        ({"bound": math.nan}, "bound"),
        ({"group_by": ["1x"]}, "group_by[0]"),
        ({"group_by": ["x"], "by_series": True}, "by_series"),
        ({"compare_to": [{"seconds": 25}]}, "compare_to[0]"),
        ({"compare_to": [{"seconds": 60}, {"seconds": 60}]}, "compare_to"),
        ({"matchers": [{"label": "a b"}]}, "matchers[0].label"),
        (
            {"matchers": [{"label": "a", "operator": pb.MATCH_OPERATOR_REGEX, "value": "("}]},
            "matchers[0].value",
        ),
        (
            {"matchers": [{"label": "a", "operator": pb.MATCH_OPERATOR_REGEX, "value": "(?=b)"}]},
            "matchers[0].value",
        ),
        ({"start_time": {"seconds": NOON_S - 9 * DAY_S}, "step": {"seconds": 10}}, "step"),
    ],
)
def test_a_malformed_query_names_its_fault(change: dict[str, Any], field: str) -> None:
    base: dict[str, Any] = {"name": "x", "aggregation": pb.AGGREGATION_SUM}
    request = pb.QueryRequest(**{**base, "end_time": {"seconds": NOON_S}, **change})
    with pytest.raises(InvalidRequestError) as caught:
        read_query("acme", request, NOON_S)
    assert field in {violation.field for violation in caught.value.violations}


async def test_an_expression_is_matched_in_linear_time(tmp_path: Path) -> None:
    async with metric_history(tmp_path) as past:
        await past.add("calls", [(NOON_S - 60, 1)], {"a": "a" * 250})
        where = [LabelMatch("a", "=~", "(a+)+b")]
        assert await past.ask(asked("calls", "sum", where=where)) == []
