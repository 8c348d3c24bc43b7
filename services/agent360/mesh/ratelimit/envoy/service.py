"""Answers Envoy's questions with the service's own limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from agent360.mesh.ratelimit.decisions import Decision
from agent360.mesh.ratelimit.domain import Ask, Domain
from agent360.mesh.ratelimit.envoy.contract import (
    OK,
    OVER_LIMIT,
    SERVICE,
    UNITS,
    RateLimitResponse,
)
from agent360.mesh.ratelimit.envoy.questions import MOST_HITS, Question, read_questions
from agent360.mesh.ratelimit.limits import Limit, Source
from agent360.mesh.runtime.call import Call
from agent360.mesh.runtime.service import ServiceDefinition
from agent360.mesh.runtime.validation import set_duration

_UNIT_OF: Final = {
    1.0: "SECOND",
    60.0: "MINUTE",
    3_600.0: "HOUR",
    86_400.0: "DAY",
    604_800.0: "WEEK",
}


class EnvoyService:
    """Serves envoy.service.ratelimit.v3.RateLimitService.

    A domain is what limits call a name; the entries of a descriptor are its facts, and an entry
    ``tenant`` says whose request it is. A descriptor that brings a limit is charged to it alone.
    All descriptors of a request are charged, or none.
    """

    def __init__(self, domain: Domain, default_tenant: str) -> None:
        """Makes the service.

        Args:
            domain: decides.
            default_tenant: the tenant of requests that name none.
        """
        self._domain = domain
        self._default_tenant = default_tenant

    @property
    def definition(self) -> ServiceDefinition:
        """What the runtime serves."""
        return ServiceDefinition(
            SERVICE,
            unary={"ShouldRateLimit": self.should_rate_limit},
            default_tenant=self._default_tenant,
        )

    async def should_rate_limit(self, call: Call, request: Any) -> Any:
        """Decides one request of Envoy."""
        questions = read_questions(call, request)
        domain, name = self._domain, request.domain
        plans = [
            domain.plan(each.tenant, name, each.facts, override=each.override) for each in questions
        ]
        decisions: Sequence[Decision]
        if len(questions) == 1:
            decisions = await domain.decide([Ask(plans[0], questions[0].hits, False)])
            over = [not decisions[0].allowed]
        elif len({each.hits for each in questions}) == 1:
            decisions, over = await self._decide_together(questions, plans)
        else:
            decisions = await domain.decide(
                [Ask(plan, each.hits, False) for plan, each in zip(plans, questions, strict=True)]
            )
            over = [not decision.allowed for decision in decisions]
        response = RateLimitResponse(overall_code=OVER_LIMIT if any(over) else OK)
        for question, decision, denied in zip(questions, decisions, over, strict=True):
            limit = self._limit_of(question, decision)
            _write_status(response.statuses.add(), decision, limit, denied)
        _write_headers(response, decisions, over)
        return response

    async def _decide_together(
        self, questions: Sequence[Question], plans: Sequence[Any]
    ) -> tuple[Sequence[Decision], list[bool]]:
        """Charges all descriptors or none; then looks at each."""
        hits = questions[0].hits
        (joint,) = await self._domain.decide([Ask(self._domain.join(plans), hits, False)])
        looks = await self._domain.decide([Ask(plan, 0, False) for plan in plans])
        if joint.allowed:
            return looks, [False] * len(plans)
        over = []
        for question, look in zip(questions, looks, strict=True):
            limit = self._limit_of(question, look)
            enforced = limit is not None and not limit.shadow
            over.append(enforced and look.remaining < max(1, hits))
        if not any(over):  # it came back meanwhile, or the store is away
            over[0] = True
        return [
            look._replace(retry_after_s=joint.retry_after_s) if denied else look
            for look, denied in zip(looks, over, strict=True)
        ], over

    def _limit_of(self, question: Question, decision: Decision) -> Limit | None:
        """The limit that a decision tells of; None: none applies."""
        if question.override is not None:
            return question.override
        return self._domain.limits.of(question.tenant).get(decision.limit_id)


def _write_status(status: Any, decision: Decision, limit: Limit | None, denied: bool) -> None:
    status.code = OVER_LIMIT if denied else OK
    if limit is None:
        return
    status.limit_remaining = 0 if denied else min(decision.remaining, MOST_HITS)
    unit = limit.calendar.name if limit.calendar else _UNIT_OF.get(limit.period_s, "UNKNOWN")
    status.current_limit.requests_per_unit = min(limit.amount, MOST_HITS)
    status.current_limit.unit = UNITS[unit]
    if limit.source is not Source.REQUEST:
        status.current_limit.name = limit.limit_id
    wait_s = decision.retry_after_s if denied else None
    set_duration(status.duration_until_reset, decision.reset_after_s if wait_s is None else wait_s)


def _write_headers(response: Any, decisions: Sequence[Decision], over: Sequence[bool]) -> None:
    limited = [row for row in zip(over, decisions, strict=True) if row[1].limit_id]
    if not limited:
        return
    denied, tightest = min(limited, key=lambda row: (not row[0], row[1].remaining))
    headers = {
        "ratelimit-limit": str(tightest.limit),
        "ratelimit-remaining": "0" if denied else str(tightest.remaining),
        "ratelimit-reset": str(math.ceil(tightest.reset_after_s)),
    }
    if denied and tightest.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(tightest.retry_after_s))
    for key, value in headers.items():
        response.response_headers_to_add.add(key=key, value=value)
