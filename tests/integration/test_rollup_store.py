"""The port ``RollupStore`` on real stores: commits, reading, coarser rollups, retention."""

from collections.abc import Sequence

import pytest
from support.rollup_frames import Sample, frame_of, reckoned, rows_of, series_named

from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.ports import Commit, Mark, RollupStore, Stores
from agent360.mesh.metrics.resolution import (
    FINE,
    HOUR,
    MINUTE,
    RESOLUTIONS,
    Resolution,
    Retention,
)
from agent360.mesh.metrics.series import Kind, SeriesId

T0 = 1_800_000_000 // 86_400 * 86_400
"""A midnight."""
DAY_S = 86_400
RETENTION = Retention(2 * DAY_S, 14 * DAY_S, 400 * DAY_S)
SERIES = [
    *series_named("seconds", "tokens"),
    SeriesId("acme", "plans", (("kind", "trip"),), Kind.COUNTER, "1"),
]
ME = "writer-1"


@pytest.fixture
def store(stores: Stores) -> RollupStore:
    return stores.rollups


def commit(origin: int, samples: Sequence[Sample], writer: str = ME, **marks: bytes) -> Commit:
    frame = frame_of(SERIES, samples)
    stamped = {name: Mark(value, T0) for name, value in marks.items()}
    return Commit(writer, origin, origin + 1, frame, stamped)


async def everything(
    store: RollupStore, resolution: Resolution = FINE, before: int = 1 << 40
) -> Frame:
    frame = await store.read(SERIES, T0, T0 + 40 * DAY_S, resolution, writer=ME, before=before)
    return Frame.merged([frame])


def spread(count: int, step_s: float = 7.0) -> list[Sample]:
    return [(n % 3, T0 + n * step_s, n % 50 / 8, 1 + n % 2) for n in range(count)]


async def test_commits_add_up_and_are_read_by_series_and_time(store: RollupStore) -> None:
    samples = spread(2_000)
    await store.commit(commit(0, samples[:900]))
    await store.commit(commit(1, samples[900:1_000]))
    await store.commit(commit(2, samples[500:]))
    wanted = [*samples[:1_000], *samples[500:]]
    assert rows_of(await everything(store)) == reckoned(SERIES, wanted)
    part = await store.read(SERIES[2:], T0 + 1_000, T0 + 3_000, FINE, writer=ME, before=1 << 40)
    inside = [each for each in wanted if each[0] == 2 and T0 + 1_000 <= each[1] < T0 + 3_000]
    assert rows_of(Frame.merged([part])) == reckoned(SERIES, inside)


async def test_rows_of_commits_that_the_reader_has_in_memory_are_left_out(
    store: RollupStore,
) -> None:
    await store.commit(commit(0, spread(100)))
    await store.commit(commit(1, spread(100)))
    await store.commit(commit(7, spread(100), writer="another"))
    assert (await everything(store)).count.sum() == 3 * 150
    assert (await everything(store, before=1)).count.sum() == 2 * 150
    assert (await everything(store, before=0)).count.sum() == 150


async def test_position_and_marks_are_stored_with_the_rows(store: RollupStore) -> None:
    assert await store.checkpoint(ME) == (0, {})
    await store.commit(commit(0, spread(5), a=b"1", b=b"5"))
    await store.commit(commit(1, [], a=b"2"))
    position, marks = await store.checkpoint(ME)
    assert position == 2
    assert marks == {"a": Mark(b"2", T0), "b": Mark(b"5", T0)}
    assert set(await store.series("acme")) == set(SERIES)
    assert await store.series("acme", "plans") == SERIES[2:]
    assert await store.series("globex") == []


async def test_coarser_rollups_hold_exactly_what_the_finest_hold(store: RollupStore) -> None:
    samples = spread(3_000)
    for origin in range(6):
        await store.commit(commit(origin, samples[origin * 500 : origin * 500 + 500]))
    before = await everything(store)
    assert await store.compact(T0 + DAY_S, ME, 6) == 6
    assert await store.compact(T0 + DAY_S, ME, 6) == 0
    assert rows_of(await everything(store)) == rows_of(before)
    for resolution in (MINUTE, HOUR):
        read = await store.read(SERIES, T0, T0 + DAY_S, resolution, writer=ME, before=1 << 40)
        assert set((read.bucket_s % resolution.length_s).tolist()) == {0}
        assert rows_of(Frame.merged([read])) == reckoned(SERIES, samples, resolution.length_s)


async def test_hours_that_are_not_over_or_not_settled_are_read_from_the_finest(
    store: RollupStore,
) -> None:
    await store.commit(commit(0, spread(1_000)))
    assert await store.compact(T0 + 3_600 + 299, ME, 1) == 0
    assert await store.compact(T0 + 3_600 + 301, ME, 0) == 0
    assert await store.compact(T0 + 3_600 + 301, ME, 1) == 1
    read = await store.read(SERIES, T0, T0 + DAY_S, MINUTE, writer=ME, before=1 << 40)
    assert rows_of(Frame.merged([read]).coarser(60)) == reckoned(SERIES, spread(1_000), 60)


async def test_what_comes_late_is_in_all_resolutions_once(store: RollupStore) -> None:
    await store.commit(commit(0, spread(1_000)))
    await store.compact(T0 + DAY_S, ME, 1)
    late = [(0, T0 + 61.0, 3.0, 2), (2, T0 + 3_599.0, 5.0, 1)]
    await store.commit(commit(1, late))
    wanted = [*spread(1_000), *late]
    for settled in (1, 2):
        await store.compact(T0 + DAY_S, ME, settled)
        for resolution in RESOLUTIONS:
            read = await store.read(SERIES, T0, T0 + DAY_S, resolution, writer=ME, before=1 << 40)
            length = resolution.length_s
            assert rows_of(Frame.merged([read]).coarser(length)) == reckoned(SERIES, wanted, length)


async def test_retention_drops_partitions_resolution_by_resolution(store: RollupStore) -> None:
    samples = [(0, T0 + day * DAY_S + 5.0, 1.0, 1) for day in range(20)]
    await store.commit(commit(0, samples))
    now_s = T0 + 20 * DAY_S + 400.0
    assert await store.expire(now_s, RETENTION, 0.0) == []
    assert len(await everything(store)) == 20, "hours that were not computed yet are not dropped"
    await store.compact(now_s, ME, 1)
    await store.expire(now_s, RETENTION, 0.0)
    lengths = [len(await everything(store, resolution)) for resolution in RESOLUTIONS]
    assert lengths == [2, 14, 20]


async def test_series_without_rollups_and_marks_that_stand_still_are_forgotten(
    store: RollupStore,
) -> None:
    await store.commit(commit(0, [(0, T0 + 5.0, 1.0, 1)], old=b"1"))
    await store.commit(commit(1, [(1, T0 + 100 * DAY_S, 1.0, 1)]))
    await store.compact(T0 + 101 * DAY_S, ME, 2)
    gone = await store.expire(T0 + 434 * DAY_S, RETENTION, T0 + 1.0)
    assert gone == [SERIES[0]]
    assert await store.series() == [SERIES[1]]
    assert (await store.checkpoint(ME)).marks == {}
    await store.commit(commit(2, [(0, T0 + 434 * DAY_S, 1.0, 1)]))
    assert set(await store.series()) == set(SERIES[:2])


async def test_two_tenants_series_of_the_same_name_are_apart(store: RollupStore) -> None:
    mine = series_named("seconds")
    theirs = series_named("seconds", tenant="globex")
    await store.commit(Commit(ME, 0, 1, frame_of(mine, [(0, T0, 1.0, 1)])))
    await store.commit(Commit(ME, 1, 2, frame_of(theirs, [(0, T0, 2.0, 1)])))
    for series, total in ((mine, 1.0), (theirs, 2.0)):
        read = await store.read(series, T0, T0 + 10, FINE, writer=ME, before=9)
        assert read.total.tolist() == [total]


async def test_rollups_are_read_without_bins_if_they_are_not_wanted(store: RollupStore) -> None:
    await store.commit(commit(0, spread(1_000)))
    await store.compact(T0 + 3_600 + 301, ME, 1)
    for resolution in (FINE, MINUTE):
        whole = Frame.merged([await everything(store, resolution)]).coarser(60)
        read = await store.read(
            SERIES, T0, T0 + DAY_S, resolution, writer=ME, before=1 << 40, bins=False
        )
        plain = Frame.merged([read]).coarser(60)
        assert len(plain.bin_row) == 0
        assert plain.count.tolist() == whole.count.tolist()
        assert plain.total.tolist() == whole.total.tolist()
