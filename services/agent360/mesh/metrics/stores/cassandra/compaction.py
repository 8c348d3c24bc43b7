"""Computes rollups of minutes and hours of one hour from those of 10 s.

A crash at any point, or two processes at it, only make the work be done again: from the same
commits the same rows are written, and rows from more commits have a higher version and stay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.resolution import FINE, HOUR, MINUTE
from agent360.mesh.metrics.stores.blobs import frame_of
from agent360.mesh.metrics.stores.cassandra.hours import OpenHour
from agent360.mesh.metrics.stores.cassandra.lifetimes import Lifetimes
from agent360.mesh.metrics.stores.cassandra.registry import DAY_S, Known
from agent360.mesh.metrics.stores.cassandra.rows import (
    Span,
    Wanted,
    coarse_writes,
    reads,
)
from agent360.mesh.metrics.stores.cassandra.session import Batch, Row, Session, Statement

_SERIES_AT_ONCE: Final = 200


async def compact_hour(
    session: Session, lifetimes: Lifetimes, hour: OpenHour, known: Sequence[Known]
) -> None:
    """Writes the coarser rollups of an hour.

    Args:
        session: of the cluster.
        lifetimes: of the rows.
        hour: which, and the commits that are to be in the rollups.
        known: all series.

    Raises:
        StoreError: it failed; it is to be repeated.
    """
    active = [each for each in known if each.last_day >= hour.start_s // DAY_S]
    span = Span(hour.start_s, hour.start_s + FINE.block_s)
    for place in range(0, len(active), _SERIES_AT_ONCE):
        some = active[place : place + _SERIES_AT_ONCE]
        requests = [
            (number, statement)
            for number, each in enumerate(some)
            for statement in reads(Wanted(each.series.tenant, each.key, number), FINE, span)
        ]
        answers = await session.run_all([statement for _, statement in requests])
        found: list[tuple[int, Row]] = [
            (number, row)
            for (number, _), rows in zip(requests, answers, strict=True)
            for row in rows
            if hour.has(*row[2:])
        ]
        if found:
            writes = await asyncio.to_thread(_computed, hour, some, found, lifetimes)
            await session.run_all(writes)


def _computed(
    hour: OpenHour,
    some: Sequence[Known],
    found: Sequence[tuple[int, Row]],
    lifetimes: Lifetimes,
) -> list[Statement | Batch]:
    keys = [(each.series.tenant, each.key) for each in some]
    # In the order of the commits: where times are equal, the last value is that of the later one.
    ordered = sorted(found, key=lambda each: (each[0], *each[1][2:]))
    blocks = [(number, rows, bins) for number, (rows, bins, _, _) in ordered]
    whole = Frame.merged((frame_of((), blocks),))
    return [
        write
        for resolution in (MINUTE, HOUR)
        for write in coarse_writes(
            whole.coarser(resolution.length_s), keys, resolution, hour.version, lifetimes
        )
    ]
