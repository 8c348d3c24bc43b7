"""A service that is away is not waited for again and again."""

import grpc
import pytest
import structlog

from agent360.client.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    UnavailableError,
    Violation,
)
from agent360.mesh.inference.peers.reachability import Reachability


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def reach(clock):
    return Reachability("cache", "every request runs a model", structlog.get_logger(), clock)


def test_one_call_a_second_tries_a_service_that_is_away(reach, clock):
    with structlog.testing.capture_logs() as logs:
        assert reach.worth_asking()
        reach.failed(UnavailableError("gone"))
        assert not reach.worth_asking()
        clock.now += 1.0
        assert [reach.worth_asking() for _ in range(3)] == [True, False, False]
        reach.failed(DeadlineExceededError())
        clock.now += 1.0
        assert reach.worth_asking()
        reach.answered()
        assert all(reach.worth_asking() for _ in range(3))
    assert [entry["event"] for entry in logs] == [
        "cache service does not answer",
        "cache service answers again",
    ]


def test_a_refused_call_does_not_make_a_service_away(reach):
    refusal = InvalidRequestError([Violation("entry.value", "is too large")])
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            reach.failed(refusal)
            assert reach.worth_asking()
    assert len(logs) == 1
