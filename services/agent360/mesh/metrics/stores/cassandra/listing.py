"""Pages of lists whose partitions are stretches of time, the newest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from agent360.mesh.metrics.ports import Position
from agent360.mesh.metrics.stores.cassandra.session import Row, Session, Statement

T = TypeVar("T")

_AT_ONCE: Final = 8
_MOST_ROWS: Final = 5_000
"""Rows that one page may look at."""


async def page(
    session: Session,
    selections: Sequence[Callable[[Position | None], Statement]],
    read: Callable[[Row], T | None],
    before: Position | None,
    limit: int,
) -> tuple[list[T], Position | None]:
    """Reads a page.

    Args:
        session: of the cluster.
        selections: of each partition, the newest first: what selects at most ``limit`` rows that
            come after a position; they begin with time and id.
        read: what a row says; None: it is not meant.
        before: where the page before ended; None: it is the first.
        limit: how much is wanted at most.

    Returns:
        What was found, perhaps less than there is, and where to go on; None: there is no more.
    """
    found: list[T] = []
    looked_at = 0
    for place in range(0, len(selections), _AT_ONCE):
        answers = await session.run_all(
            [select(before) for select in selections[place : place + _AT_ONCE]]
        )
        for rows in answers:
            for row in rows:
                before = Position(row[0], row[1])
                wanted = read(row)
                if wanted is not None:
                    found.append(wanted)
                    if len(found) == limit:
                        return found, before
            looked_at += len(rows)
            if len(rows) == limit or looked_at >= _MOST_ROWS:
                return found, before
    return found, None
