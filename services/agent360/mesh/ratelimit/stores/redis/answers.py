"""Decisions out of what the script answers, those of several slots joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agent360.mesh.ratelimit.decisions import Decision, allowed_run
from agent360.mesh.ratelimit.sharing import AWAY, Away, Decided, Run
from agent360.mesh.ratelimit.stores.redis.keys import counted_in
from agent360.mesh.ratelimit.stores.redis.places import Part

Row = Any
"""What the script answered to one operation, or AWAY."""


class AllAway(Sequence[Any]):
    """The results of operations whose server is away, however many."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, at: Any) -> Any:
        return AWAY


def decision_of(part: Part, row: Sequence[Any]) -> Decision:
    """The decision that a row is."""
    allowed, granted, remaining, tightest, reset_us, retry_us, _, _, *made_before = row
    if made_before:
        key, size = made_before
        limit_id = counted_in(key)[0]
    else:
        limit = part.counts[tightest - 1].limit
        limit_id, size = limit.limit_id, limit.size
    retry_s = None if retry_us < 0 else retry_us / 1e6
    return Decision(bool(allowed), granted, remaining, size, reset_us / 1e6, retry_s, limit_id)


def expanded(part: Part, row: Sequence[Any], run: Run) -> tuple[Decided, Sequence[str]]:
    """The decisions on a run, of which the first so many were allowed."""
    fit, room, tightest, reset_us, retry_us, denier, denier_reset_us, denier_room = row
    hits, limit = run.ask.hits, part.counts[tightest - 1].limit
    size, limit_id, reset_s = limit.size, limit.limit_id, reset_us / 1e6
    decisions = allowed_run(hits, fit, room - fit * hits, size, reset_s, limit_id)
    missing = run.times - fit
    if not missing:
        return decisions, ()
    wait_s = None if retry_us < 0 else retry_us / 1e6
    left = max(0, denier_room - fit * hits)
    limit = part.counts[denier - 1].limit
    denial = Decision(False, 0, left, limit.size, denier_reset_us / 1e6, wait_s, limit.limit_id)
    return [*decisions, *[denial] * missing], [limit.limit_id] * missing


def denied_by(part: Part, row: Sequence[Any]) -> Sequence[str]:
    """The limits that denied or, in shadow mode, would have."""
    return [part.counts[at - 1].limit.limit_id for at in row[7]] if row[7] else ()


def joined(
    rows: Sequence[tuple[Part, Row]], undo: Callable[[Part, int, Row], None]
) -> Decision | Away:
    """One decision of several parts.

    Args:
        rows: of each part.
        undo: told of hits that a part was charged in vain.
    """
    granted = min((0 if row is AWAY else row[1]) for _, row in rows)
    denied = any(row is AWAY or not row[0] for _, row in rows)
    for part, row in rows:
        if row is AWAY:
            continue
        excess = row[1] - (0 if denied else granted)
        if excess > 0:
            undo(part, excess, row)
    return AWAY if any(row is AWAY for _, row in rows) else joint_decision(rows)


def joint_decision(rows: Sequence[tuple[Part, Row]]) -> Decision:
    """The decision of parts that have all answered: the longest wait, or the least that is left."""
    decisions = [decision_of(part, row) for part, row in rows]
    denials = [each for each in decisions if not each.allowed]
    if denials:
        return max(denials, key=lambda each: (each.retry_after_s is None, each.retry_after_s or 0))
    granted = min(each.granted for each in decisions)
    deciding = [
        decision
        for decision, (part, _) in zip(decisions, rows, strict=True)
        if not all(count.limit.shadow for count in part.counts)
    ]
    tightest = min(deciding or decisions, key=lambda each: each.remaining + each.granted)
    lower = next((each for each in decisions if each.granted == granted), tightest)
    return tightest._replace(granted=granted, retry_after_s=lower.retry_after_s)
