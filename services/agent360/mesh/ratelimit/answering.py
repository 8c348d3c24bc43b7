"""Answers to the checks of a batch: what decisions in a row have in common is done once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from agent360.mesh.ratelimit.decisions import Decision
from agent360.mesh.ratelimit.domain import Ask
from agent360.mesh.ratelimit.usage import UsageReport
from agent360.mesh.ratelimit.wire import write_decision
from agent360.mesh.runtime.call import Emit, Item


def answer_checks(
    checks: Iterable[tuple[Item, Ask, Decision]], emit: Emit, report: UsageReport
) -> None:
    """Answers checks and adds their decisions to the report.

    Decisions on the same check in a row often differ only in what remains: the first of them is
    written field by field, the others are copies of it.

    Args:
        checks: with what was asked and decided, in order.
        emit: takes the answers.
        report: is told of the decisions.
    """
    reply = emit.reply
    ask: Ask | None = None
    last: Decision | None = None
    original: Any = None
    copy = b""
    tenant, limit_id, allowed = "", "", False
    each = hits = 0
    for item, asked, decision in checks:
        response = reply(item)
        if (
            asked is ask
            and last is not None
            # In the order in which others differ first.
            and decision[4] is last[4]
            and decision[0] is last[0]
            and decision[1] == last[1]
            and decision[3] == last[3]
            and decision[5] is last[5]
            and decision[6] == last[6]
            and decision[7] is last[7]
        ):
            hits += each
            if original is not None:
                copy, original = original.SerializeToString(), None
            response.MergeFromString(copy)
            response.decision.remaining = decision[2]
            continue
        ask, last, original = asked, decision, response
        write_decision(response.decision, decision)
        each = decision[1] if decision[0] else asked[1]
        if decision[6] != limit_id or decision[0] is not allowed or item.call.tenant != tenant:
            report.add(tenant, limit_id, allowed, hits)
            tenant, limit_id, allowed, hits = item.call.tenant, decision[6], decision[0], 0
        hits += each
    report.add(tenant, limit_id, allowed, hits)
