"""Batches of several callers' items; time is virtual, and a batch of n takes a + b * n."""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.polling import eventually
from support.virtual_time import run_virtually

from agent360.client.errors import MeshError, UnavailableError
from agent360.mesh.inference.batching.batcher import Batcher
from agent360.mesh.inference.batching.settings import BatchSettings
from agent360.mesh.inference.queueing.settings import QueueSettings
from agent360.mesh.inference.queueing.statistics import ModelStatistics
from agent360.mesh.inference.queueing.ticket import Ticket

FIXED_S, EACH_S = 0.020, 0.001


@dataclass
class Machine:
    """Works on one batch after the other, each for ``fixed_s + each_s * size``."""

    fixed_s: float = FIXED_S
    each_s: float = EACH_S
    batches: list[list[int]] = field(default_factory=list)
    poison: frozenset[int] = frozenset()
    faults: list[Exception] = field(default_factory=list)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, items: Sequence[int], _: Ticket) -> list[int]:
        async with self.lock:
            self.batches.append(list(items))
            await asyncio.sleep(self.fixed_s + self.each_s * len(items))
        if self.faults:
            raise self.faults.pop()
        if self.poison & set(items):
            raise MeshError(grpc.StatusCode.INVALID_ARGUMENT, "UPSTREAM_REFUSED", "a bad item")
        return [-item for item in items]


def batcher_of(
    machine: Machine,
    *,
    slots: int = 1,
    queue: QueueSettings | None = None,
    counts: ModelStatistics | None = None,
    **options: object,
) -> Batcher[int, int]:
    return Batcher(
        machine.run,
        BatchSettings.model_validate(options),
        queue or QueueSettings(timeout_s=None),
        lambda: slots,
        counts or ModelStatistics("model", None),
        asyncio.get_running_loop().time,
    )


async def closed_loop(
    callers: int, seconds: float, call: Callable[[int], object], gap_s: float = 0.0
) -> float:
    """How many calls a second so many callers get done that come back after ``gap_s``."""
    loop = asyncio.get_running_loop()
    chance = random.Random(5)
    warm, end, done = loop.time() + seconds / 4, loop.time() + seconds, 0

    async def caller(number: int) -> None:
        nonlocal done
        while loop.time() < end:
            await call(number)  # type: ignore[misc]
            if warm <= loop.time() < end:
                done += 1
            if gap_s:
                await asyncio.sleep(chance.uniform(0, gap_s))

    await asyncio.gather(*map(caller, range(callers)))
    return done / (end - warm)


# -------------------------------------------------------------------- throughput


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("callers", [64, 40, 32, 20, 5, 2, 1])
@pytest.mark.parametrize("gap_s", [0.0, 0.002])
def test_throughput_is_95_percent_of_the_best_that_batches_of_these_callers_allow(
    callers: int, gap_s: float, slots: int
) -> None:
    most = 32

    async def main() -> float:
        machine = Machine()
        batcher = batcher_of(machine, slots=slots, max_size=most, max_queue_delay_s=0.01)

        async def call(number: int) -> None:
            await batcher.submit(number, 1, Ticket(f"t{number % 3}"))

        return await closed_loop(callers, 20.0, call, gap_s)

    together = min(callers, most)
    # The machine never rests while callers wait; if all fit into a batch it waits for the last one.
    gap = gap_s if callers <= most else 0.0
    best = together / (FIXED_S + EACH_S * together + gap)
    assert run_virtually(main()) >= 0.95 * best


def test_a_backend_that_works_on_several_batches_gets_several() -> None:
    async def main() -> float:
        async def run(items: Sequence[int], _: Ticket) -> list[int]:
            await asyncio.sleep(FIXED_S + EACH_S * len(items))
            return list(items)

        batcher: Batcher[int, int] = Batcher(
            run,
            BatchSettings(max_size=32),
            QueueSettings(timeout_s=None),
            lambda: 4,
            ModelStatistics("model", None),
            asyncio.get_running_loop().time,
        )

        async def call(number: int) -> None:
            await batcher.submit(number, 1, Ticket("acme"))

        return await closed_loop(256, 20.0, call)

    assert run_virtually(main()) >= 0.95 * 4 * 32 / (FIXED_S + EACH_S * 32)


def test_throughput_is_95_percent_of_the_best_within_a_bound_of_the_service_time() -> None:
    bound_s = 0.036
    largest = 16  # 0.020 + 0.001 * 16

    async def main() -> tuple[float, list[int]]:
        machine = Machine()
        batcher = batcher_of(machine, max_size=64, max_service_s=bound_s)

        async def call(number: int) -> None:
            await batcher.submit(number, 1, Ticket("acme"))

        rate = await closed_loop(100, 30.0, call)
        return rate, [len(batch) for batch in machine.batches]

    rate, sizes = run_virtually(main())
    assert rate >= 0.95 * largest / (FIXED_S + EACH_S * largest)
    late = [size for size in sizes[20:] if size > largest]
    assert not late, "batches grew beyond what can be done in time"


@pytest.mark.parametrize("load", [0.3, 0.8])
def test_arrivals_at_random_are_kept_up_with_and_wait_no_longer_than_two_batches(
    load: float,
) -> None:
    most, delay_s = 32, 0.01

    async def main() -> list[float]:
        machine = Machine()
        batcher = batcher_of(machine, max_size=most, max_queue_delay_s=delay_s)
        loop, chance = asyncio.get_running_loop(), random.Random(9)
        rate = load * most / (FIXED_S + EACH_S * most)
        taken: list[float] = []

        async def call(number: int) -> None:
            came = loop.time()
            await batcher.submit(number, 1, Ticket("acme"))
            taken.append(loop.time() - came)

        async with asyncio.TaskGroup() as tasks:
            for number in range(4_000):
                tasks.create_task(call(number))
                await asyncio.sleep(chance.expovariate(rate))
        return sorted(taken)

    taken = run_virtually(main())
    assert len(taken) == 4_000
    assert taken[int(0.99 * len(taken))] <= 2 * (FIXED_S + EACH_S * most) + delay_s


def test_a_lone_caller_is_not_held_back() -> None:
    async def main() -> float:
        machine = Machine()
        batcher = batcher_of(machine, max_queue_delay_s=1.0)
        loop = asyncio.get_running_loop()
        for number in range(10):
            came = loop.time()
            await batcher.submit(number, 1, Ticket("acme"))
            taken = loop.time() - came
            await asyncio.sleep(0.5)
        return taken

    assert run_virtually(main()) == pytest.approx(FIXED_S + EACH_S)


def test_nobody_is_held_back_for_longer_than_a_call_costs() -> None:
    async def main() -> float:
        machine = Machine()
        batcher = batcher_of(machine, max_queue_delay_s=10.0)
        loop = asyncio.get_running_loop()
        for size in (10, 20, 10, 20, 10, 20):
            await asyncio.gather(*(batcher.submit(n, 1, Ticket("acme")) for n in range(size)))
        came = loop.time()
        await batcher.submit(1, 1, Ticket("acme"))
        return loop.time() - came

    # Twenty came together lately, one comes now: it is waited for them, for a fixed part only.
    assert run_virtually(main()) == pytest.approx(FIXED_S + FIXED_S + EACH_S, abs=0.002)


def test_the_next_batch_begins_when_a_slot_is_free_and_not_when_all_are() -> None:
    async def main() -> list[tuple[float, int]]:
        loop = asyncio.get_running_loop()
        began: list[tuple[float, int]] = []

        async def run(items: Sequence[float], _: Ticket) -> list[float]:
            began.append((loop.time(), len(items)))
            await asyncio.sleep(items[0])
            return list(items)

        batcher: Batcher[float, float] = Batcher(
            run,
            BatchSettings(max_size=1),
            QueueSettings(),
            lambda: 2,
            ModelStatistics("model", None),
            loop.time,
        )
        for _ in range(5):
            await batcher.submit(0.0, 1, Ticket("acme"))
        began.clear()
        times = (1.0, 0.2, 0.2, 0.2)
        await asyncio.gather(*(batcher.submit(each, 1, Ticket("acme")) for each in times))
        return began

    starts = [start for start, _ in run_virtually(main())]
    assert starts == pytest.approx([0.0, 0.0, 0.2, 0.4])


# -------------------------------------------------------------------- sizes


def test_batches_keep_to_the_bounds_of_items_and_tokens() -> None:
    async def main() -> list[list[int]]:
        machine = Machine()
        batcher = batcher_of(machine, max_size=8, max_tokens=100)
        tickets = [Ticket("acme", tokens=30)] * 6 + [Ticket("acme", tokens=500)]
        tickets += [Ticket("acme", tokens=1)] * 20
        await asyncio.gather(
            *(batcher.submit(number, 1, ticket) for number, ticket in enumerate(tickets))
        )
        return machine.batches

    assert [len(batch) for batch in run_virtually(main())] == [3, 3, 1, 8, 8, 4]


def test_items_that_hold_several_inferences_count_as_many() -> None:
    async def main() -> list[list[int]]:
        machine = Machine()
        batcher = batcher_of(machine, max_size=10)
        sizes = [4, 4, 4, 10, 2, 2]
        await asyncio.gather(
            *(batcher.submit(number, size, Ticket("acme")) for number, size in enumerate(sizes))
        )
        return machine.batches

    assert run_virtually(main()) == [[0, 1], [2], [3], [4, 5]]


def test_a_preferred_size_goes_at_once_and_less_waits_for_the_delay() -> None:
    async def main() -> list[tuple[float, int]]:
        machine = Machine()
        loop = asyncio.get_running_loop()
        batcher = batcher_of(machine, preferred_sizes=(4, 8), max_queue_delay_s=0.5)
        done: list[tuple[float, int]] = []

        async def burst(size: int) -> None:
            await asyncio.gather(*(batcher.submit(n, 1, Ticket("acme")) for n in range(size)))
            done.append((round(loop.time(), 3), size))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(burst(8))
            await asyncio.sleep(1.0)
            tasks.create_task(burst(3))
        assert [len(batch) for batch in machine.batches] == [8, 3]
        return done

    assert run_virtually(main()) == [(0.028, 8), (1.523, 3)]


# -------------------------------------------------------------------- fairness


def test_within_batches_tenants_share_by_tokens() -> None:
    async def main() -> list[list[int]]:
        machine = Machine()
        batcher = batcher_of(machine, max_size=8)
        calls = [batcher.submit(0, 1, Ticket("flood", tokens=10)) for _ in range(200)]
        calls += [batcher.submit(1, 1, Ticket("calm", tokens=10)) for _ in range(8)]
        await asyncio.gather(*calls)
        return machine.batches

    batches = run_virtually(main())
    assert sum(batches[0] + batches[1]) == 8


# -------------------------------------------------------------------- errors and cancels


def test_an_item_that_is_refused_fails_alone() -> None:
    async def main() -> tuple[list[object], int]:
        machine = Machine(poison=frozenset({7}))
        batcher = batcher_of(machine, max_size=16)
        results = await asyncio.gather(
            *(batcher.submit(number, 1, Ticket("acme")) for number in range(16)),
            return_exceptions=True,
        )
        return list(results), len(machine.batches)

    results, calls = run_virtually(main())
    assert isinstance(results.pop(7), MeshError)
    assert results == [-number for number in range(16) if number != 7]
    assert calls <= 1 + 2 * 4, "the batch was halved, not taken apart"


def test_an_error_of_the_backend_is_told_to_each_caller_as_its_own() -> None:
    async def main() -> list[object]:
        machine = Machine(faults=[UnavailableError("it broke", reason="UPSTREAM_BROKE")])
        batcher = batcher_of(machine)
        return list(
            await asyncio.gather(
                *(batcher.submit(number, 1, Ticket("acme")) for number in range(4)),
                return_exceptions=True,
            )
        )

    errors = run_virtually(main())
    assert [error.reason for error in errors if isinstance(error, MeshError)] == [
        "UPSTREAM_BROKE"
    ] * 4
    assert len(set(map(id, errors))) == 4


def test_a_batch_with_a_result_too_few_is_an_error_and_loses_nobody() -> None:
    async def main() -> list[object]:
        async def run(items: Sequence[int], _: Ticket) -> list[int]:
            return list(items[1:])

        batcher: Batcher[int, int] = Batcher(
            run,
            BatchSettings(),
            QueueSettings(),
            lambda: 1,
            ModelStatistics("model", None),
            asyncio.get_running_loop().time,
        )
        async with asyncio.timeout(5.0):
            return list(
                await asyncio.gather(
                    *(batcher.submit(number, 1, Ticket("acme")) for number in range(3)),
                    return_exceptions=True,
                )
            )

    assert all(isinstance(error, ValueError) for error in run_virtually(main()))


def test_a_caller_that_leaves_while_it_waits_is_not_in_the_batch() -> None:
    async def main() -> list[list[int]]:
        machine = Machine()
        batcher = batcher_of(machine, max_size=4)
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(batcher.submit(n, 1, Ticket("acme"))) for n in range(10)]
        await asyncio.sleep(0.01)
        tasks[5].cancel()
        await asyncio.wait(tasks)
        return machine.batches

    assert run_virtually(main()) == [[0, 1, 2, 3], [4, 6, 7, 8], [9]]


def test_a_batch_stops_when_its_last_caller_leaves() -> None:
    async def main() -> None:
        machine = Machine(fixed_s=100.0)
        batcher = batcher_of(machine, max_size=4)
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(batcher.submit(n, 1, Ticket("acme"))) for n in range(2)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        await asyncio.sleep(0.01)
        assert machine.lock.locked(), "one of them still waits for it"
        tasks[1].cancel()
        await asyncio.wait(tasks)
        await asyncio.sleep(0)
        assert not machine.lock.locked()
        assert batcher.idle

    run_virtually(main())


def test_what_waits_when_the_batcher_closes_is_told_so() -> None:
    async def main() -> list[object]:
        machine = Machine(fixed_s=100.0)
        batcher = batcher_of(machine, max_size=2)
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(batcher.submit(n, 1, Ticket("acme"))) for n in range(5)]
        await asyncio.sleep(0.01)
        await batcher.close()
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    errors = run_virtually(main())
    assert [error.reason for error in errors if isinstance(error, MeshError)] == ["STOPPING"] * 5


def test_a_batch_does_not_run_in_the_context_of_its_first_caller() -> None:
    trace: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="none")

    async def main() -> list[str]:
        seen: list[str] = []

        async def run(items: Sequence[int], _: Ticket) -> list[int]:
            seen.append(trace.get())
            return list(items)

        batcher: Batcher[int, int] = Batcher(
            run,
            BatchSettings(),
            QueueSettings(),
            lambda: 1,
            ModelStatistics("model", None),
            asyncio.get_running_loop().time,
        )
        trace.set("that of one caller")
        await batcher.submit(1, 1, Ticket("acme"))
        return seen

    assert run_virtually(main()) == ["none"]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 3),
    count=st.integers(1, 80),
    hasty=st.floats(0.0, 1.0),
    poisoned=st.sets(st.integers(0, 79), max_size=3),
)
def test_under_random_cancels_and_faults_nothing_is_lost_or_answered_for_another(
    seed: int, slots: int, count: int, hasty: float, poisoned: set[int]
) -> None:
    async def main() -> None:
        chance, loop = random.Random(seed), asyncio.get_running_loop()
        machine = Machine(poison=frozenset(poisoned))
        counts = ModelStatistics("model", None)
        queue = QueueSettings(timeout_s=0.2)
        batcher = batcher_of(machine, slots=slots, max_size=8, queue=queue, counts=counts)
        answers: dict[int, int] = {}
        refused: dict[int, str] = {}

        async def call(number: int) -> None:
            await asyncio.sleep(chance.choice([0.0, 0.0, 0.01, 0.028]))
            ticket = Ticket(f"t{number % 3}", chance.randint(1, 3), chance.randint(1, 50))
            try:
                answers[number] = await batcher.submit(number, 1, ticket)
            except MeshError as error:
                refused[number] = error.reason

        tasks = [loop.create_task(call(number)) for number in range(count)]

        def cancel(task: asyncio.Task[None]) -> None:
            task.cancel()

        for task in tasks:
            if chance.random() < hasty:
                loop.call_later(chance.choice([0.0, 0.01, 0.028, 0.05]), cancel, task)
        await asyncio.wait(tasks)
        cancelled = {number for number, task in enumerate(tasks) if task.cancelled()}
        assert all(answers[number] == -number for number in answers)
        assert set(refused.values()) <= {"UPSTREAM_REFUSED", "QUEUE_DEADLINE"}
        assert {n for n, why in refused.items() if why == "UPSTREAM_REFUSED"} <= poisoned
        assert len(answers) + len(refused) + len(cancelled) == count
        await eventually(lambda: batcher.idle, timeout_s=1.0)
        assert counts.pending == 0
        assert all(len(batch) <= 8 for batch in machine.batches)

    run_virtually(main())


@pytest.mark.parametrize("tenants", [("acme", "zeta"), ("acme", "acme")])
def test_what_a_backend_says_of_a_shared_batch_is_told_to_no_other_tenant(
    tenants: tuple[str, str],
) -> None:
    async def main() -> list[BaseException | int]:
        machine = Machine()
        batcher = batcher_of(machine, max_queue_delay_s=0.01, preferred_sizes=(2,))
        said = "backend gpu answered with HTTP status 500: cannot process 'a secret'"
        facts = {"backend": "gpu", "http_status": "500", "said": "a secret"}
        machine.faults.append(UnavailableError(said, reason="UPSTREAM_FAILED", metadata=facts))
        calls = (batcher.submit(at, 1, Ticket(tenant)) for at, tenant in enumerate(tenants))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert machine.batches == [[0, 1]]
        return results

    for error in run_virtually(main()):
        assert isinstance(error, UnavailableError)
        assert error.reason == "UPSTREAM_FAILED"
        assert (error.metadata["backend"], error.metadata["http_status"]) == ("gpu", "500")
        told = f"{error} {error.args} {error.metadata}"
        assert ("a secret" in told) is (tenants[0] == tenants[1])
