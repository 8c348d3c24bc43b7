"""Coarser rollups on SQLite, interrupted at any slice, with late data in between."""

from pathlib import Path

import pytest
from support.rollup_frames import Sample, frame_of, reckoned, rows_of, series_named

from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.ports import Commit
from agent360.mesh.metrics.resolution import RESOLUTIONS
from agent360.mesh.metrics.stores.sqlite import Database, SqliteRollupStore, compaction
from agent360.mesh.metrics.stores.sqlite.compaction import HourCompaction, OpenHour

T0 = 1_800_000_000 // 86_400 * 86_400
SERIES = series_named(*"abcde")


def samples(first: int, last: int) -> list[Sample]:
    return [(n % 5, T0 + n * 1.5, n % 40 / 8, 1) for n in range(first, last)]


@pytest.mark.parametrize("slices", range(7))
@pytest.mark.parametrize("late", [False, True])
async def test_a_compaction_that_was_cut_off_counts_nothing_twice_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slices: int, late: bool
) -> None:
    monkeypatch.setattr(compaction, "_SERIES_AT_ONCE", 1)
    path = str(tmp_path / "m.db")
    database = Database(path)
    store = SqliteRollupStore(database)
    wanted = samples(0, 2_000)
    await store.commit(Commit("w", 0, 1, frame_of(SERIES, wanted[:1_200])))
    await store.commit(Commit("w", 1, 2, frame_of(SERIES, wanted[1_200:])))

    async def check() -> None:
        for resolution in RESOLUTIONS:
            frame = await store.read(SERIES, T0, T0 + 7_200, resolution, writer="w", before=9)
            length = resolution.length_s
            found = rows_of(Frame.merged([frame]).coarser(length))
            assert found == reckoned(SERIES, wanted, length)

    cut_off = HourCompaction(OpenHour(T0, 1, 1))
    for _ in range(slices):
        await database.write(cut_off.next_slice)
    await check()
    if late:
        wanted += samples(100, 200)
        await store.commit(Commit("w", 2, 3, frame_of(SERIES, wanted[2_000:])))
        await database.write(cut_off.finish)
        await check()
    await database.close()

    database = Database(path)
    store = SqliteRollupStore(database)
    await check()
    assert await store.compact(T0 + 86_400, "w", 9) == 1
    assert await store.compact(T0 + 86_400, "w", 9) == 0
    await check()
    await database.close()
