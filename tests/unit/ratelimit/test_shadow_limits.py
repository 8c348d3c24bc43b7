"""Limits in shadow mode beside those that deny: they decide nothing."""

from types import SimpleNamespace
from typing import Any

from google.protobuf.message_factory import GetMessageClass

from agent360.mesh.ratelimit.domain import LocalDomain
from agent360.mesh.ratelimit.envoy.contract import OK, OVER_LIMIT, SERVICE
from agent360.mesh.ratelimit.envoy.service import EnvoyService
from agent360.mesh.ratelimit.limiter import Limiter
from agent360.mesh.ratelimit.limits import Limit, LimitSet
from agent360.mesh.ratelimit.stores.redis.answers import joint_decision
from agent360.mesh.ratelimit.stores.redis.keys import Count
from agent360.mesh.runtime.call import Principal

TRIED = Limit("tried", 2, 3_600.0, match={"path": "*"}, shadow=True)
ENFORCED = Limit("enforced", 3, 3_600.0, match={"address": "*"})


async def test_a_shadow_limit_that_is_used_up_is_not_what_denied_a_request_of_envoy() -> None:
    domain = LocalDomain(Limiter(LimitSet([TRIED, ENFORCED]), lambda: 1_790_000_000_000_000))
    service = EnvoyService(domain, "edge")
    principal = Principal("edge", frozenset({"edge"}))
    call: Any = SimpleNamespace(tenant="edge", principal=principal)
    request: Any = GetMessageClass(SERVICE.methods[0].input_type)(domain="edge")
    for key in ("path", "address"):
        request.descriptors.add().entries.add(key=key, value="a")
    answers = [await service.should_rate_limit(call, request) for _ in range(4)]
    assert [each.overall_code for each in answers] == [OK, OK, OK, OVER_LIMIT]
    assert [each.code for each in answers[-1].statuses] == [OK, OVER_LIMIT]


def test_of_several_slots_one_with_shadow_limits_only_is_not_told_of() -> None:
    rows = []
    for limit, remaining in ((TRIED, 0), (ENFORCED, 2)):
        part: Any = SimpleNamespace(counts=(Count(limit, "key", "tag", None),))
        rows.append((part, [1, 1, remaining, 1, 0, -1, [0], []]))
    decision = joint_decision(rows)
    assert (decision.limit_id, decision.limit, decision.remaining) == ("enforced", 3, 2)
