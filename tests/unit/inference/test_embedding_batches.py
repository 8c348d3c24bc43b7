"""Texts of several callers in one call: whose vectors, whose tokens; time is virtual."""

from __future__ import annotations

import asyncio
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.timed_backends import TimedBackend, model_on, queues_of
from support.virtual_time import run_virtually

from agent360.client.errors import MeshError
from agent360.mesh.inference.answers import Usage
from agent360.mesh.inference.batching.embeddings import EmbeddingBatches
from agent360.mesh.inference.billing import Bill, Spent
from agent360.mesh.inference.conversation import EmbeddingInputs
from agent360.mesh.inference.queueing import Queues, Ticket
from agent360.mesh.inference.routing import EXPLICIT, Route
from agent360.mesh.inference.settings import ModelSettings
from agent360.mesh.inference.upstream import RanEmbeddings


class Plain:
    """Runs a batch at its backend, without retries; counts the tokens of a call as it likes."""

    def __init__(self, queues: Queues, tokens: int = 100) -> None:
        self.queues = queues
        self.tokens = tokens
        self.calls: list[tuple[str, ...]] = []

    async def __call__(
        self, ticket: Ticket, request: EmbeddingInputs, route: Route, *, bill: Bill
    ) -> RanEmbeddings:
        async with self.queues.turn(route.model, ticket) as turn:
            began = self.queues.clock()
            self.calls.append(request.inputs)
            vectors, _ = await turn.member.backend.embed(request, route.model.upstream_name)
            usage = Usage(self.tokens)
            bill.spent.append(Spent(route.model, turn.member.name, usage))
            return RanEmbeddings(
                vectors, usage, route.model, turn.member.name, route.rule, began, turn.queue_s, 1
            )


def embedder(*backends: TimedBackend) -> ModelSettings:
    return model_on(*backends, capabilities=["embeddings"], batch={"max_in_flight": 1})


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 500)), min_size=1, max_size=12),
    tokens=st.integers(0, 5_000),
)
def test_what_callers_pay_adds_up_to_what_the_backend_charged(
    sizes: list[tuple[int, int]], tokens: int
) -> None:
    async def main() -> None:
        backend = TimedBackend()
        plain = Plain(queues_of(backend), tokens)
        batches = EmbeddingBatches(plain, plain.queues)
        route = Route(embedder(backend), EXPLICIT)
        bills = [Bill() for _ in sizes]

        async def ask(number: int) -> RanEmbeddings:
            count, size = sizes[number]
            texts = tuple(f"{number} " * (place + 1) for place in range(count))
            request = EmbeddingInputs("model", texts)
            ran = await batches.embed(
                Ticket("acme", tokens=size), request, route, bill=bills[number]
            )
            assert list(ran.vectors) == [array("f", [float(len(text))]) for text in texts]
            assert ran.usage.input_tokens == bills[number].tokens
            return ran

        await asyncio.gather(*map(ask, range(len(sizes))))
        assert sum(bill.tokens for bill in bills) == tokens * len(plain.calls)

    run_virtually(main())


def test_the_wait_for_a_batch_is_told_as_time_in_the_queue() -> None:
    async def main() -> list[float]:
        backend = TimedBackend(fixed_s=1.0, per_unit_s=0.0)
        plain = Plain(queues_of(backend))
        batches = EmbeddingBatches(plain, plain.queues)
        route = Route(embedder(backend), EXPLICIT)

        async def ask(after_s: float) -> float:
            await asyncio.sleep(after_s)
            request = EmbeddingInputs("model", ("a text",))
            return (await batches.embed(Ticket("acme"), request, route, bill=Bill())).queue_s

        return await asyncio.gather(ask(0.0), ask(0.4))

    # The second was held back for a moment in case the first came back, too.
    assert run_virtually(main()) == pytest.approx([0.0, 0.6], abs=0.011)


def test_requests_for_vectors_of_different_lengths_do_not_share_a_call() -> None:
    async def main() -> list[tuple[str, ...]]:
        backend = TimedBackend()
        plain = Plain(queues_of(backend))
        batches = EmbeddingBatches(plain, plain.queues)
        route = Route(embedder(backend), EXPLICIT)
        requests = [EmbeddingInputs("model", (f"{n}",), dimensions=n) for n in (64, 64, 128)]
        await asyncio.gather(
            *(batches.embed(Ticket("acme"), each, route, bill=Bill()) for each in requests)
        )
        return plain.calls

    assert sorted(run_virtually(main())) == [("128",), ("64", "64")]


def test_ever_other_lengths_do_not_get_around_the_bound_of_the_queue() -> None:
    async def main() -> tuple[list[object], int, list[str]]:
        backend = TimedBackend(fixed_s=1.0, per_unit_s=0.0)
        plain = Plain(queues_of(backend, slots=1))
        batches = EmbeddingBatches(plain, plain.queues)
        options = {"capabilities": ["embeddings"], "queue": {"max_items": 20}}
        route = Route(model_on(backend, **options), EXPLICIT)

        async def ask(length: int, tenant: str = "acme") -> str:
            request = EmbeddingInputs("model", (f"{length}",), dimensions=length)
            await batches.embed(Ticket(tenant), request, route, bill=Bill())
            return "served"

        asked = [asyncio.create_task(ask(length)) for length in range(1, 501)]
        await asyncio.sleep(0.5)
        waiting = plain.queues.queued("model")
        calm = [await ask(64, "calm") for _ in range(3)]
        return await asyncio.gather(*asked, return_exceptions=True), waiting, calm

    results, waiting, calm = run_virtually(main())
    assert waiting <= 20 + 8
    errors = [each for each in results if isinstance(each, MeshError)]
    assert {error.reason for error in errors} == {"QUEUE_FULL"}
    assert len(errors) + results.count("served") == 500
    assert 20 <= results.count("served") <= 40
    assert calm == ["served"] * 3


def test_callers_of_a_model_whose_backends_are_gone_are_told_so() -> None:
    async def main() -> None:
        plain = Plain(queues_of(TimedBackend("other")))
        batches = EmbeddingBatches(plain, plain.queues)
        route = Route(embedder(TimedBackend("gone")), EXPLICIT)
        request = EmbeddingInputs("model", ("a text",))
        with pytest.raises(MeshError) as refused:
            await batches.embed(Ticket("acme"), request, route, bill=Bill())
        assert refused.value.reason == "NO_BACKEND"

    run_virtually(main())
