"""The same request many times in a row: decided and answered at once, as if one by one."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent360.mesh.ratelimit.answering import answer_checks
from agent360.mesh.ratelimit.decisions import Decision
from agent360.mesh.ratelimit.domain import Ask
from agent360.mesh.ratelimit.limiter import Limiter
from agent360.mesh.ratelimit.limits import Algorithm, Limit, LimitSet
from agent360.mesh.ratelimit.usage import UsageReport
from agent360.mesh.ratelimit.wire import write_decision
from agent360.ratelimit.v1 import ratelimit_pb2 as pb

RATES = (Algorithm.TOKEN_BUCKET, Algorithm.SLIDING_WINDOW, Algorithm.FIXED_WINDOW)

runs = st.lists(
    st.tuples(st.integers(0, 5_000_000), st.integers(0, 4), st.integers(1, 6), st.booleans()),
    min_size=1,
    max_size=20,
)


@pytest.mark.parametrize("algorithm", RATES)
@pytest.mark.parametrize("shadow", [False, True])
@given(runs)
def test_a_run_is_decided_as_its_requests_are_one_by_one(
    algorithm: Algorithm, shadow: bool, history: list[tuple[int, int, int, bool]]
) -> None:
    limit = Limit("r", 12, 4.0, algorithm=algorithm, shadow=shadow)
    together, alone = (Limiter(LimitSet([limit]), lambda: 0) for _ in range(2))
    now = 1_000_000_000
    for pause, hits, times, partial in history:
        now += pause
        found = together.decide_run(together.plan("acme", "x", {}), hits, partial, times, now)
        expected = [
            alone.decide(alone.plan("acme", "x", {}), hits, partial, now) for _ in range(times)
        ]
        resets = {each.reset_after_s for each in found}
        assert resets <= {each.reset_after_s for each in expected}
        assert [each._replace(reset_after_s=0) for each in found] == [
            each._replace(reset_after_s=0) for each in expected
        ]
        assert found[-1] == expected[-1]
    assert (together.allowed, together.denied) == (alone.allowed, alone.denied)
    assert list(together.usage("acme")) == list(alone.usage("acme"))


decisions = st.builds(
    Decision,
    allowed=st.booleans(),
    granted=st.integers(0, 2),
    remaining=st.integers(0, 3),
    limit=st.sampled_from([0, 7]),
    reset_after_s=st.sampled_from([0.0, 1.5]),
    retry_after_s=st.sampled_from([None, 0.25]),
    limit_id=st.sampled_from(["", "r", "s"]),
    degraded=st.booleans(),
)


class Emit:
    """Keeps the answers."""

    def __init__(self) -> None:
        self.responses: list[Any] = []

    def reply(self, item: Any, size_bytes: int = 0) -> Any:
        self.responses.append(pb.CheckResponse())
        return self.responses[-1]


class Meter:
    """Adds up what the report tells of each tenant."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str, str], float] = {}

    def count(self, name: str, value: float, labels: dict[str, str], tenant: str) -> None:
        if "tenant" not in labels:
            assert name == "ratelimit_hits_total"
            key = (tenant, labels["limit"], labels["outcome"])
            self.sums[key] = self.sums.get(key, 0) + value


@given(st.lists(st.tuples(st.integers(0, 2), decisions, st.integers(1, 4)), max_size=12))
async def test_answers_and_report_tell_of_each_decision_whatever_was_decided_before_it(
    rows: list[tuple[int, Decision, int]],
) -> None:
    asks = [Ask((), hits, True) for hits in (0, 1, 2)]
    checks: list[Any] = []
    expected_sums: dict[tuple[str, str, str], float] = {}
    for which, decision, times in rows:
        tenant = f"t{which}"
        item = SimpleNamespace(call=SimpleNamespace(tenant=tenant))
        granted = min(decision.granted, which)
        for number in range(times):
            left = decision.remaining + times - number
            each = decision._replace(granted=granted, remaining=left)
            checks.append((item, asks[which], each))
            hits = granted if each.allowed else which
            if each.limit_id and hits:
                key = (tenant, each.limit_id, "allowed" if each.allowed else "denied")
                expected_sums[key] = expected_sums.get(key, 0) + hits
    emit: Any = Emit()
    meter: Any = Meter()
    report = UsageReport(meter)
    answer_checks(checks, emit, report)
    await report.close()
    expected = []
    for _, _, decision in checks:
        expected.append(pb.CheckResponse())
        write_decision(expected[-1].decision, decision)
    assert emit.responses == expected
    assert meter.sums == expected_sums
