"""Turns of models, with callers that really wait; time is virtual."""

from __future__ import annotations

import asyncio
import contextlib
import random

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.timed_backends import TimedBackend, model_on, queues_of, use
from support.virtual_time import run_virtually

from agent360.client.errors import MeshError, UnavailableError
from agent360.mesh.inference.queueing import Statistics, Ticket
from agent360.mesh.inference.queueing.settings import ConcurrencySettings
from agent360.mesh.inference.settings import ModelSettings

LOW, NORMAL, HIGH = 1, 2, 3


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# -------------------------------------------------------------------- fairness


def test_a_flood_of_50_to_1_at_most_doubles_the_p99_of_the_other_tenant() -> None:
    async def calm_latencies(*, flooded: bool) -> list[float]:
        backend = TimedBackend(fixed_s=0.05, per_unit_s=0.001)
        queues, model = queues_of(backend, slots=8), model_on(backend, queue={"timeout_s": None})
        sizes = random.Random(3)
        loop = asyncio.get_running_loop()
        over = loop.time() + 120.0

        async def flood(count: int) -> None:
            # Most are small, some ten times as large as the calm tenant's.
            for _ in range(count):
                size = min(2_000, int(sizes.paretovariate(1.2) * 50))
                tasks.add(loop.create_task(use(queues, model, Ticket("flood", tokens=size))))

        latencies = []
        tasks: set[asyncio.Task[float]] = set()
        while loop.time() < over:
            if flooded and queues.queued("model") < 1_000:
                await flood(50)
            ticket = Ticket("calm", tokens=sizes.randint(100, 300))
            latencies.append(await use(queues, model, ticket))
            await asyncio.sleep(sizes.expovariate(1 / 0.2))
        if flooded:
            assert backend.running >= 7, "the backend was saturated to the end"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return latencies

    alone = quantile(run_virtually(calm_latencies(flooded=False)), 0.99)
    beside = quantile(run_virtually(calm_latencies(flooded=True)), 0.99)
    assert beside <= 2 * alone


@pytest.mark.parametrize("slots", [2, 4, 8])
def test_answers_ten_times_as_large_at_most_double_the_p99_of_the_other_tenant(slots: int) -> None:
    async def calm_latencies(*, flooded: bool) -> list[float]:
        backend = TimedBackend(fixed_s=0.02, per_unit_s=0.001)
        queues, model = queues_of(backend, slots=slots), model_on(backend)
        loop = asyncio.get_running_loop()
        over = False

        async def flood(number: int) -> None:
            # Half of the answers are much smaller than they might have been.
            while not over:
                async with queues.turn(model, Ticket("flood", tokens=400)) as turn:
                    used = 400 if number % 2 else 10
                    await turn.member.backend.work(used)  # type: ignore[attr-defined]
                    turn.outcome(tokens=used)

        latencies = [await use(queues, model, Ticket("calm", tokens=40)) for _ in range(10)]
        tasks = [loop.create_task(flood(number)) for number in range(100 if flooded else 0)]
        await asyncio.sleep(1.0)
        latencies = [await use(queues, model, Ticket("calm", tokens=40)) for _ in range(200)]
        over = True
        await asyncio.gather(*tasks)
        return latencies

    alone = quantile(run_virtually(calm_latencies(flooded=False)), 0.99)
    beside = quantile(run_virtually(calm_latencies(flooded=True)), 0.99)
    assert beside <= 2 * alone


def test_a_slot_is_kept_only_while_another_tenant_came_lately() -> None:
    async def main() -> list[int]:
        backend = TimedBackend()
        queues, model = queues_of(backend, slots=4), model_on(backend, queue={"keep_slot_s": 5.0})
        loop = asyncio.get_running_loop()
        running = []

        async def flood() -> None:
            while loop.time() < 10.0:
                await use(queues, model, Ticket("flood", tokens=100))

        tasks = [loop.create_task(flood()) for _ in range(20)]
        await asyncio.sleep(1.05)
        running.append(backend.running)
        await use(queues, model, Ticket("calm", tokens=10))
        await asyncio.sleep(2.0)
        running.append(backend.running)
        await asyncio.sleep(4.0)
        running.append(backend.running)
        await asyncio.gather(*tasks)
        return running

    assert run_virtually(main()) == [4, 3, 4]


def test_no_slot_is_kept_where_none_is_to_be() -> None:
    async def main() -> int:
        backend = TimedBackend()
        queues, model = queues_of(backend, slots=4), model_on(backend, queue={"keep_slot_s": 0})
        await use(queues, model, Ticket("calm", tokens=10))
        await asyncio.gather(
            *(use(queues, model, Ticket("flood", tokens=100)) for _ in range(8)),
        )
        return backend.peak

    assert run_virtually(main()) == 4


@pytest.mark.parametrize("visited", [False, True], ids=["two", "two and a visitor"])
def test_busy_tenants_share_by_weight_and_none_starves_beside_a_kept_slot(visited: bool) -> None:
    async def main() -> dict[str, int]:
        backend = TimedBackend()
        weights = {"small": 1.0, "large": 7.0}
        queues = queues_of(backend, slots=4, weights=weights)
        model = model_on(backend, queue={"timeout_s": None})
        loop = asyncio.get_running_loop()
        served = dict.fromkeys([*weights, "visitor"], 0)

        async def keep_busy(tenant: str, size: int) -> None:
            while loop.time() < 200.0:
                await use(queues, model, Ticket(tenant, tokens=size))
                served[tenant] += size

        async with asyncio.TaskGroup() as tasks:
            for number in range(30):
                tasks.create_task(keep_busy("small", 50 + 10 * number))
                tasks.create_task(keep_busy("large", 50 + 10 * number))
            while visited and loop.time() < 200.0:
                await asyncio.sleep(5.0)
                await use(queues, model, Ticket("visitor", tokens=10))
                served["visitor"] += 10
        return served

    served = run_virtually(main())
    assert served["large"] / served["small"] == pytest.approx(7.0, rel=0.1)
    assert served["visitor"] >= 300 * visited


def test_a_tenant_with_a_claim_meets_a_deadline_that_those_who_wait_could_not() -> None:
    async def main() -> None:
        backend = TimedBackend()
        queues, model = queues_of(backend, slots=4), model_on(backend, queue={"timeout_s": None})
        loop = asyncio.get_running_loop()
        for _ in range(3):
            await use(queues, model, Ticket("calm", tokens=100))
        flood = [
            loop.create_task(use(queues, model, Ticket("flood", tokens=5_000))) for _ in range(99)
        ]
        await asyncio.sleep(0.1)
        ticket = Ticket("calm", tokens=100, deadline=loop.time() + 0.15)
        assert await use(queues, model, ticket) == pytest.approx(0.1)
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)

    run_virtually(main())


def test_a_tenants_latency_does_not_depend_on_how_much_the_flood_has_queued() -> None:
    async def latency(queued: int) -> float:
        backend = TimedBackend(per_unit_s=0.001)
        queues, model = queues_of(backend, slots=2), model_on(backend, queue={"timeout_s": None})
        loop = asyncio.get_running_loop()
        flood = [
            loop.create_task(use(queues, model, Ticket("flood", tokens=100))) for _ in range(queued)
        ]
        await asyncio.sleep(0.01)
        taken = await use(queues, model, Ticket("calm", tokens=100))
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        return taken

    assert run_virtually(latency(5_000)) == pytest.approx(run_virtually(latency(10)))


# -------------------------------------------------------------------- priorities


def test_strict_priority_starves_nobody_longer_than_the_bound() -> None:
    async def main() -> tuple[list[float], list[float]]:
        backend = TimedBackend(per_unit_s=0.001)
        queues = queues_of(backend, slots=2)
        model = model_on(backend, queue={"starvation_s": 3.0, "timeout_s": None})
        loop = asyncio.get_running_loop()
        waits: dict[int, list[float]] = {LOW: [], HIGH: []}

        async def ask(priority: int) -> None:
            came = loop.time()
            async with queues.turn(model, Ticket("acme", priority, 100)) as turn:
                waits[priority].append(loop.time() - came)
                await turn.member.backend.work(100)  # type: ignore[attr-defined]

        async def keep_busy() -> None:
            while loop.time() < 60.0:
                await ask(HIGH)

        # Six callers that come back at once for two slots: the high level always has waiters.
        async with asyncio.TaskGroup() as tasks:
            for _ in range(6):
                tasks.create_task(keep_busy())
            for _ in range(50):
                await asyncio.sleep(1.0)
                tasks.create_task(ask(LOW))
        return waits[LOW], waits[HIGH]

    low, high = run_virtually(main())
    longest_piece_of_work_s = 0.1
    assert max(low) <= 3.0 + max(high) + longest_piece_of_work_s
    assert min(low) >= 3.0 - longest_piece_of_work_s, "else the priority was not strict"


def test_one_that_waits_moves_up_when_its_priority_is_raised() -> None:
    async def main() -> list[str]:
        backend = TimedBackend()
        queues, model = queues_of(backend, slots=1), model_on(backend, queue={"timeout_s": 3.0})
        done: list[str] = []

        async def ask(name: str, ticket: Ticket) -> None:
            await use(queues, model, ticket)
            done.append(name)

        low = Ticket("acme", LOW, 100)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ask("running", Ticket("acme", NORMAL, 100)))
            await asyncio.sleep(0)
            tasks.create_task(ask("low", Ticket("acme", LOW, 100)))
            tasks.create_task(ask("raised", low))
            tasks.create_task(ask("normal", Ticket("acme", NORMAL, 100)))
            await asyncio.sleep(0.01)
            low.raise_to(HIGH)
            low.raise_to(NORMAL)
        assert queues.queued("model") == 0
        return done

    assert run_virtually(main()) == ["running", "raised", "normal", "low"]


# -------------------------------------------------------------------- deadlines


@pytest.mark.parametrize("tenants", [1, 4])
def test_what_was_admitted_meets_its_deadline_and_what_was_refused_could_not(
    tenants: int,
) -> None:
    async def main() -> tuple[int, int, int, int]:
        backend = TimedBackend(fixed_s=0.02, per_unit_s=0.001)
        queues, model = queues_of(backend, slots=2), model_on(backend)
        loop = asyncio.get_running_loop()
        chance = random.Random(11)
        for _ in range(20):
            await use(queues, model, Ticket("warm", tokens=chance.randint(20, 400)))
        met = late = 0
        errors: list[MeshError] = []

        async def ask(ticket: Ticket) -> None:
            nonlocal met, late
            try:
                await use(queues, model, ticket)
            except MeshError as error:
                errors.append(error)
                return
            assert ticket.deadline is not None
            if loop.time() <= ticket.deadline:
                met += 1
            else:
                late += 1

        # Half as much again as the backend can do, in sizes of 1 to 20.
        async with asyncio.TaskGroup() as tasks:
            for _ in range(1_500):
                size = chance.randint(20, 400)
                deadline = loop.time() + chance.uniform(0.5, 3.0)
                ticket = Ticket(f"t{chance.randrange(tenants)}", tokens=size, deadline=deadline)
                tasks.create_task(ask(ticket))
                await asyncio.sleep(chance.expovariate(1 / 0.077))
        assert {error.reason for error in errors} == {"QUEUE_DEADLINE"}
        assert all(error.retry_after_s and error.retry_after_s > 0 for error in errors)
        refused = sum(error.metadata["when"] == "arrival" for error in errors)
        return met, late, len(errors) - refused, refused

    met, late, let_go, refused = run_virtually(main())
    assert refused > 100, "the load was too small to show anything"
    assert late == 0
    # Others that come later with nearer deadlines, or of other tenants, make up for the rest.
    assert let_go <= 0.5 * refused
    # Two slots for 1,500 * 77 ms can serve about this many of 230 ms each.
    assert met >= 0.85 * (1_500 * 0.077 * 2 / 0.23)


def test_an_expired_deadline_is_refused_even_without_measurements() -> None:
    async def main() -> None:
        backend = TimedBackend()
        queues, model = queues_of(backend, slots=1), model_on(backend)
        asyncio.get_running_loop().create_task(use(queues, model, Ticket("acme", tokens=100)))
        await asyncio.sleep(0.05)
        with pytest.raises(MeshError) as refused:
            await use(queues, model, Ticket("acme", deadline=0.01))
        assert refused.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert refused.value.reason == "QUEUE_DEADLINE"

    run_virtually(main())


def test_the_deadline_of_a_shared_request_ends_no_wait() -> None:
    async def main() -> None:
        backend = TimedBackend()
        queues, model = queues_of(backend, slots=1), model_on(backend)
        loop = asyncio.get_running_loop()
        running = loop.create_task(use(queues, model, Ticket("acme", tokens=2_000)))
        await asyncio.sleep(0)
        await use(queues, model, Ticket("acme", deadline=1.0, shared=True))
        assert loop.time() == pytest.approx(2.001)
        await running

    run_virtually(main())


def test_a_wait_ends_at_the_queues_timeout() -> None:
    async def main() -> None:
        backend = TimedBackend()
        queues, model = queues_of(backend, slots=1), model_on(backend, queue={"timeout_s": 2.0})
        loop = asyncio.get_running_loop()
        running = loop.create_task(use(queues, model, Ticket("acme", tokens=10_000)))
        await asyncio.sleep(0.5)
        with pytest.raises(MeshError) as refused:
            await use(queues, model, Ticket("acme"))
        assert loop.time() == pytest.approx(2.5)
        assert refused.value.metadata["when"] == "waiting"
        assert queues.queued("model") == 0
        running.cancel()

    run_virtually(main())


def test_a_delayed_request_runs_when_nobody_else_waits() -> None:
    async def main() -> list[str]:
        backend = TimedBackend()
        options = {"timeout_s": 1.0, "timeout_action": "delay"}
        queues, model = queues_of(backend, slots=1), model_on(backend, queue=options)
        done: list[str] = []

        async def ask(name: str, size: int) -> None:
            await use(queues, model, Ticket("acme", tokens=size))
            done.append(name)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ask("running", 1_500))
            await asyncio.sleep(0.0)
            tasks.create_task(ask("delayed", 10))
            await asyncio.sleep(1.2)
            tasks.create_task(ask("newer", 10))
        return done

    assert run_virtually(main()) == ["running", "newer", "delayed"]


# -------------------------------------------------------------------- capacity


def test_several_backends_of_a_model_are_all_filled_and_none_beyond_its_limit() -> None:
    async def main() -> list[int]:
        backends = [TimedBackend("one"), TimedBackend("two"), TimedBackend("three")]
        queues, model = queues_of(*backends, slots=3), model_on(*backends)
        tickets = (Ticket("acme", tokens=50 + n) for n in range(60))
        await asyncio.gather(*(use(queues, model, ticket) for ticket in tickets))
        return [backend.peak for backend in backends]

    assert run_virtually(main()) == [3, 3, 3]


def test_models_that_share_a_backend_share_its_turns() -> None:
    async def main() -> tuple[int, list[str]]:
        backend = TimedBackend()
        queues = queues_of(backend, slots=2)
        done: list[str] = []

        async def ask(name: str) -> None:
            model = ModelSettings(name=name, backends=("gpu",))
            await use(queues, model, Ticket("acme", tokens=100))
            done.append(name)

        models = ["many"] * 40 + ["few"] * 4
        await asyncio.gather(*map(ask, models))
        return backend.peak, done

    peak, done = run_virtually(main())
    assert peak == 2
    assert done[:12].count("few") == 4


def test_a_backend_that_is_excluded_is_not_asked_and_blocks_nobody() -> None:
    async def main() -> tuple[list[int], str]:
        one, two = TimedBackend("one"), TimedBackend("two")
        queues, model = queues_of(one, two, slots=1), model_on(one, two)
        loop = asyncio.get_running_loop()
        only_two = model_on(two)
        busy = loop.create_task(use(queues, only_two, Ticket("acme", tokens=1_000)))
        await asyncio.sleep(0)

        async def retry() -> str:
            async with queues.turn(model, Ticket("acme"), frozenset({"one"})) as turn:
                return turn.member.backend.name

        waiting = loop.create_task(retry())
        await asyncio.sleep(0)
        await asyncio.gather(*(use(queues, model, Ticket("acme", tokens=10)) for _ in range(5)))
        assert not waiting.done()
        await busy
        return one.sizes, await waiting

    sizes, name = run_virtually(main())
    assert sizes == [10] * 5
    assert name == "two"


def test_a_turn_handed_to_a_caller_that_is_cancelled_in_that_step_goes_to_the_next() -> None:
    async def main() -> list[str]:
        backend = TimedBackend()
        queues, model = queues_of(backend, slots=1), model_on(backend)
        loop = asyncio.get_running_loop()
        done: list[str] = []

        async def ask(name: str) -> None:
            async with queues.turn(model, Ticket("acme")):
                done.append(name)

        async with queues.turn(model, Ticket("acme")):
            second, third = loop.create_task(ask("second")), loop.create_task(ask("third"))
            await asyncio.sleep(0)
        # Its turn is there, it has not run since.
        second.cancel()
        async with asyncio.timeout(1.0):
            await asyncio.wait([second, third])
        return done

    assert run_virtually(main()) == ["third"]


def test_with_no_backend_left_nobody_waits() -> None:
    async def main() -> None:
        backend = TimedBackend()
        queues, model = queues_of(backend), model_on(backend)
        with pytest.raises(UnavailableError) as refused:
            async with queues.turn(model, Ticket("acme"), frozenset({"gpu"})):
                pass
        assert refused.value.reason == "NO_BACKEND"

    run_virtually(main())


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 4),
    count=st.integers(1, 60),
    hasty=st.floats(0.0, 1.0),
)
def test_under_random_cancels_capacity_holds_and_nothing_is_lost_or_answered_twice(
    seed: int, slots: int, count: int, hasty: float
) -> None:
    async def main() -> None:
        chance = random.Random(seed)
        backends = [TimedBackend("one"), TimedBackend("two")]
        statistics = Statistics()
        queues = queues_of(*backends, slots=slots, statistics=statistics)
        model = model_on(*backends, queue={"timeout_s": 0.5, "starvation_s": 0.1})
        ended: list[int] = []
        loop = asyncio.get_running_loop()

        async def ask(number: int) -> None:
            ticket = Ticket(f"t{number % 3}", chance.randint(1, 3), chance.choice([1, 50, 50, 150]))
            with contextlib.suppress(MeshError):
                await use(queues, model, ticket)
            ended.append(number)

        tasks = [loop.create_task(ask(number)) for number in range(count)]

        def cancel(task: asyncio.Task[None]) -> None:
            task.cancel()

        for task in tasks:
            if chance.random() < hasty:
                # In the very step in which turns are handed on, too: all sizes end at 50 ms.
                loop.call_later(chance.choice([0.0, 0.05, 0.1, 0.13]), cancel, task)
        await asyncio.wait(tasks, timeout=60.0)
        cancelled = sum(task.cancelled() for task in tasks)
        assert len(ended) + cancelled == count
        assert len(set(ended)) == len(ended)
        assert all(backend.running == 0 for backend in backends)
        assert all(backend.peak <= slots for backend in backends)
        assert queues.queued("model") == 0
        counts = statistics.of("model")
        assert counts.pending == 0
        assert counts.successes + sum(counts.failures.values()) == count
        # All turns were given back: as many as there are slots go ahead at once.
        await asyncio.sleep(model.queue.keep_slot_s + 1.0)
        began = loop.time()
        await asyncio.gather(
            *(use(queues, model, Ticket("after", tokens=50)) for _ in range(2 * slots))
        )
        assert loop.time() - began == pytest.approx(0.05)

    run_virtually(main())


# -------------------------------------------------------------------- counts


def test_the_counts_tell_what_happened_to_requests() -> None:
    async def main() -> None:
        statistics = Statistics()
        backend = TimedBackend()
        queues = queues_of(backend, slots=1, statistics=statistics)
        model = model_on(backend, queue={"max_items": 2})
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(use(queues, model, Ticket("acme", tokens=100))) for _ in range(4)]
        await asyncio.sleep(0.01)
        counts = statistics.of("model")
        assert (counts.pending, queues.queued("model")) == (2, 2)
        tasks[2].cancel()
        await asyncio.wait(tasks)
        assert counts.failures == {"QUEUE_FULL": 1, "CANCELLED": 1}
        assert (counts.successes, counts.executions, counts.inferences) == (2, 2, 2)
        backend.faults.append(UnavailableError("it broke", reason="UPSTREAM_BROKE"))
        with pytest.raises(UnavailableError):
            await use(queues, model, Ticket("acme"))
        assert counts.failures["UPSTREAM_BROKE"] == 1

    run_virtually(main())


def test_trouble_lowers_the_limit_and_the_queue_goes_by_it() -> None:
    async def main() -> None:
        backend = TimedBackend()
        aimd = ConcurrencySettings(mode="aimd", maximum=10, backoff=0.5)
        queues, model = queues_of(backend, concurrency=aimd), model_on(backend)
        backend.faults = [
            MeshError(grpc.StatusCode.RESOURCE_EXHAUSTED, "UPSTREAM_RATE_LIMITED", "too many")
        ]
        results = await asyncio.gather(
            *(use(queues, model, Ticket("acme", tokens=100)) for _ in range(10)),
            return_exceptions=True,
        )
        assert sum(isinstance(result, MeshError) for result in results) == 1
        backend.peak = 0
        await asyncio.gather(*(use(queues, model, Ticket("acme", tokens=10)) for _ in range(10)))
        # Half of ten, and one more for each round of answers.
        assert 5 <= backend.peak <= 7

    run_virtually(main())
