"""Limits of requests at a time that follow how a backend answers; time is virtual."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import grpc
import pytest
from pydantic import ValidationError
from support.timed_backends import TimedBackend, model_on, queues_of
from support.virtual_time import run_virtually

from agent360.client.errors import MeshError
from agent360.mesh.inference.queueing import Ticket
from agent360.mesh.inference.queueing.limits import (
    AimdLimit,
    GradientLimit,
    Limit,
    Sample,
    limit_of,
)
from agent360.mesh.inference.queueing.settings import ConcurrencySettings


def answer(
    limit: Limit,
    at: float,
    *,
    took_s: float = 0.1,
    running: int | None = None,
    overloaded: bool = False,
) -> None:
    busy = limit.value if running is None else running
    limit.learn(Sample(at - took_s, at, took_s, busy, overloaded))


def aimd(**options: object) -> AimdLimit:
    return AimdLimit(ConcurrencySettings.model_validate({"mode": "aimd", **options}))


def gradient(**options: object) -> GradientLimit:
    return GradientLimit(ConcurrencySettings.model_validate({"mode": "gradient", **options}))


def test_a_fixed_limit_stays() -> None:
    limit = limit_of(ConcurrencySettings(mode="fixed", maximum=7))
    answer(limit, 1.0, overloaded=True)
    assert limit.value == 7


def test_trouble_takes_a_share_and_good_answers_add_one_a_round() -> None:
    limit = aimd(maximum=100, initial=40, backoff=0.5)
    answer(limit, 1.0, overloaded=True)
    assert limit.value == 20
    for number in range(21):
        answer(limit, 2.0 + number)
    assert limit.value == 21


def test_requests_that_were_in_flight_together_count_as_one_trouble() -> None:
    limit = aimd(maximum=100, backoff=0.5)
    answer(limit, 1.0, overloaded=True)
    for _ in range(30):
        answer(limit, 1.05, overloaded=True)  # They began at 0.95.
    assert limit.value == 50
    answer(limit, 1.2, overloaded=True)
    assert limit.value == 25


def test_the_limit_does_not_grow_while_it_is_not_made_use_of() -> None:
    limit = aimd(maximum=100, initial=10)
    for number in range(1_000):
        answer(limit, float(number), running=2)
    assert limit.value == 10


def test_limits_stay_within_their_bounds() -> None:
    low, high = aimd(minimum=3, maximum=50), gradient(minimum=3, maximum=50)
    for number in range(100):
        answer(low, 10.0 * number, overloaded=True)
        answer(high, 10.0 * number, overloaded=True)
    assert (low.value, high.value) == (3, 3)
    for number in range(5_000):
        answer(low, 2_000.0 + number)
        answer(high, 2_000.0 + number)
    assert (low.value, high.value) == (50, 50)


def test_an_answer_later_than_wanted_is_trouble() -> None:
    limit = aimd(maximum=10, backoff=0.5, latency_s=1.0)
    answer(limit, 5.0, took_s=0.9)
    assert limit.value == 10
    answer(limit, 7.0, took_s=1.1)
    assert limit.value == 5


def test_a_slower_response_lowers_the_gradient_limit_in_proportion() -> None:
    limit = gradient(maximum=200, initial=100)
    for number in range(80):
        answer(limit, float(number), took_s=0.1)
    before = limit.value
    for number in range(80, 120):
        answer(limit, float(number), took_s=0.4)
    assert limit.value < before / 2


@pytest.mark.parametrize(
    "wrong",
    [{"minimum": 9, "maximum": 8}, {"initial": 300}, {"initial": 1, "minimum": 2}],
)
def test_bounds_that_contradict_each_other_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        ConcurrencySettings.model_validate(wrong)


# -------------------------------------------------------------------- before a backend


@dataclass
class Strict(TimedBackend):
    """Refuses more than it can take, as a server does that answers 429."""

    most: int = 8
    refused: int = 0

    async def work(self, size: int) -> None:
        if self.running >= self.most:
            self.refused += 1
            raise MeshError(grpc.StatusCode.RESOURCE_EXHAUSTED, "UPSTREAM_RATE_LIMITED", "429")
        await super().work(size)


@dataclass
class Crowded(TimedBackend):
    """Works on so many at a time; more are slower in proportion."""

    most: int = 8

    async def work(self, size: int) -> None:
        self.running += 1
        try:
            await asyncio.sleep(0.1 * max(1.0, self.running / self.most))
        finally:
            self.running -= 1


async def load(backend: TimedBackend, concurrency: ConcurrencySettings, seconds: float) -> int:
    """Keeps 100 callers busy; returns the limit in the end."""
    queues, model = queues_of(backend, concurrency=concurrency), model_on(backend)
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds

    async def caller() -> None:
        while loop.time() < end:
            try:
                async with queues.turn(model, Ticket("acme", tokens=100)) as turn:
                    await turn.member.backend.work(100)  # type: ignore[attr-defined]
            except MeshError:
                await asyncio.sleep(0.01)

    await asyncio.gather(*(caller() for _ in range(100)))
    return queues.limit("gpu") or 0


def test_before_a_server_that_refuses_the_aimd_limit_settles_where_it_does_not() -> None:
    async def main() -> tuple[int, int, int]:
        backend = Strict()
        limit = await load(backend, ConcurrencySettings(maximum=64), 60.0)
        return limit, backend.refused, len(backend.sizes)

    limit, refused, served = run_virtually(main())
    assert 4 <= limit <= 9
    assert refused < 0.05 * served


def test_before_a_server_that_slows_down_the_gradient_limit_stays_near_its_capacity() -> None:
    async def main() -> int:
        settings = ConcurrencySettings(mode="gradient", maximum=100, initial=4, tolerance=1.2)
        return await load(Crowded(), settings, 60.0)

    assert 8 <= run_virtually(main()) <= 40
