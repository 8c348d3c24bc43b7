"""Budgets of extra load, measured latencies, and what errors say."""

import random

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent360.client.errors import DeadlineExceededError, MeshError, UnavailableError
from agent360.mesh.inference.failover.budget import Budget
from agent360.mesh.inference.failover.latencies import Latencies
from agent360.mesh.inference.failover.verdict import Cure, cure, is_ill


@given(
    st.lists(st.booleans(), max_size=300),
    st.sampled_from([0.0, 0.05, 0.2, 1.0]),
    st.integers(0, 20),
)
def test_extra_tries_never_exceed_the_share_of_requests_and_what_was_saved(steps, ratio, saved):
    budget = Budget(saved)
    requests = spent = 0
    for is_request in steps:
        if is_request:
            requests += 1
            budget.earn(ratio, most=saved)
        else:
            spent += budget.spend()
        assert spent <= saved + ratio * requests + 1e-6


def test_five_requests_earn_one_retry():
    budget = Budget(0)
    for _ in range(5):
        assert not budget.spend()
        budget.earn(0.2, most=10)
    assert budget.spend()
    assert not budget.spend()


def test_what_is_saved_is_bounded():
    budget = Budget(0)
    for _ in range(1_000):
        budget.earn(0.2, most=3)
    assert sum(budget.spend() for _ in range(10)) == 3


def test_quantiles_are_those_of_the_latest_times():
    latencies, times = Latencies(), [random.Random(7).random() for _ in range(1_000)]
    for each in times:
        latencies.add(each)
    latest = sorted(times[-256:])
    assert len(latencies) == 256
    assert latencies.quantile(0.5) == latest[128]
    assert latencies.quantile(0.95) == latest[243]
    assert latencies.quantile(0.999) == latest[-1]


@pytest.mark.parametrize(
    ("code", "reason", "remedy", "ill"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "UPSTREAM_REFUSED", Cure.NOTHING, False),
        (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_TOO_LONG", Cure.NOTHING, False),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "UPSTREAM_RATE_LIMITED", Cure.AGAIN, False),
        (grpc.StatusCode.FAILED_PRECONDITION, "UPSTREAM_UNAUTHENTICATED", Cure.ELSEWHERE, True),
        (grpc.StatusCode.FAILED_PRECONDITION, "UPSTREAM_MODEL_UNKNOWN", Cure.ELSEWHERE, False),
        (grpc.StatusCode.INTERNAL, "INTERNAL", Cure.NOTHING, False),
    ],
)
def test_errors_tell_what_can_help(code, reason, remedy, ill):
    error = MeshError(code, reason, "x")
    assert (cure(error), is_ill(error)) == (remedy, ill)


def test_a_backend_that_is_away_is_ill_and_a_deadline_in_a_queue_sends_elsewhere():
    assert is_ill(UnavailableError("x"))
    assert cure(UnavailableError("x")) is Cure.AGAIN
    assert cure(DeadlineExceededError()) is Cure.ELSEWHERE
