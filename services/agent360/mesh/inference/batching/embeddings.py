"""Texts of several callers turned into vectors by one call of a backend."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from agent360.client.errors import MeshError
from agent360.mesh.inference import tokens
from agent360.mesh.inference.answers import Usage
from agent360.mesh.inference.batching.batcher import Batcher
from agent360.mesh.inference.billing import Bill
from agent360.mesh.inference.conversation import EmbeddingInputs
from agent360.mesh.inference.queueing.queues import Queues
from agent360.mesh.inference.queueing.ticket import Ticket
from agent360.mesh.inference.routing import Route

if TYPE_CHECKING:
    from agent360.mesh.inference.upstream import RanEmbeddings

_MOST_KINDS: Final = 8
"""Kinds of texts of one model that share calls, each among themselves; further ones share none."""


class _Key(NamedTuple):
    """What texts must have in common to share a call."""

    model: str
    dimensions: int
    rule: str


@dataclass(frozen=True, slots=True)
class _Part:
    """Texts of one caller."""

    texts: tuple[str, ...]
    tokens: int
    bill: Bill


class Embed(Protocol):
    """Runs a request, with retries and fallbacks."""

    def __call__(
        self, ticket: Ticket, request: EmbeddingInputs, route: Route, *, bill: Bill
    ) -> Awaitable[RanEmbeddings]:
        """See ``Upstream.embed``."""


class EmbeddingBatches:
    """Gathers texts for the same model and length of vectors into batches.

    Each caller gets its own vectors, and is charged its own share, by tokens, of what they took.
    Who asks for ever other lengths makes no more lines than a few: what is left waits in the
    model's own, as large as its settings say.

    Example:
        >>> batches = EmbeddingBatches(embed_alone, queues)
        >>> ran = await batches.embed(ticket, request, route, bill=bill)
    """

    def __init__(self, embed: Embed, queues: Queues) -> None:
        """Makes batches.

        Args:
            embed: runs a batch.
            queues: say how many calls of a model there may be at a time.
        """
        self._embed = embed
        self._queues = queues
        self._shared: dict[_Key, _SharedCalls] = {}

    async def embed(
        self, ticket: Ticket, request: EmbeddingInputs, route: Route, *, bill: Bill
    ) -> RanEmbeddings:
        """Vectors of texts, in their order; as ``Upstream.embed``.

        Texts that are too many for one call are divided among several.
        """
        most, texts = route.model.batch.max_size, request.inputs
        if len(texts) <= most:
            return await self._embed_some(ticket, request, route, bill)
        pieces = [texts[at : at + most] for at in range(0, len(texts), most)]
        tasks = [
            asyncio.create_task(
                self._embed_some(
                    replace(ticket, tokens=tokens.estimate_inputs(piece)),
                    replace(request, inputs=piece),
                    route,
                    bill,
                )
            )
            for piece in pieces
        ]
        try:
            return _joined(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def close(self) -> None:
        """Turns those away that wait, and stops what is in flight."""
        await asyncio.gather(*(calls.batcher.close() for calls in self._shared.values()))

    async def _embed_some(
        self, ticket: Ticket, request: EmbeddingInputs, route: Route, bill: Bill
    ) -> RanEmbeddings:
        """Vectors of no more texts than a call takes."""
        calls = self._calls(request, route)
        if calls is None:
            return await self._embed(ticket, request, route, bill=bill)
        return await calls.submit(ticket, request.inputs, bill)

    def _calls(self, request: EmbeddingInputs, route: Route) -> _SharedCalls | None:
        """The calls that a request may share; None: there are too many kinds of its model."""
        key = _Key(route.model.name, request.dimensions, route.rule)
        calls = self._shared.get(key)
        if calls is None:
            kinds = [each for each in self._shared if each.model == key.model]
            if len(kinds) >= _MOST_KINDS:
                idle = next((each for each in kinds if self._shared[each].batcher.idle), None)
                if idle is None:
                    return None
                del self._shared[idle]
            calls = self._shared[key] = _SharedCalls(
                self._embed, self._queues, route, request.dimensions
            )
        elif calls.route.model is not route.model:
            # The catalogue was read anew.
            calls.follow(route)
        return calls


class _SharedCalls:
    """The calls that requests of one kind share."""

    def __init__(self, embed: Embed, queues: Queues, route: Route, dimensions: int) -> None:
        self.route = route
        self._embed = embed
        self._queues = queues
        self._dimensions = dimensions
        model = route.model
        self.batcher: Batcher[_Part, RanEmbeddings] = Batcher(
            self._run,
            model.batch,
            model.queue,
            self._slots,
            queues.statistics.of(model.name),
            queues.clock,
            weight_of=queues.weight_of,
        )

    def follow(self, route: Route) -> None:
        """Goes by other settings of the model from now on."""
        self.route = route
        self.batcher.follow(route.model.batch, route.model.queue)

    async def submit(self, ticket: Ticket, texts: tuple[str, ...], bill: Bill) -> RanEmbeddings:
        """Vectors of a few texts; ``ticket.tokens`` is how large they are."""
        came = self._queues.clock()
        part = _Part(texts, max(1, ticket.tokens), bill)
        ran = await self.batcher.submit(part, len(texts), ticket)
        return replace(ran, queue_s=max(0.0, ran.began - came))

    def _slots(self) -> int:
        model = self.route.model
        most = model.batch.max_in_flight * len(model.backends)
        try:
            return min(most, self._queues.capacity(model))
        except MeshError:
            # No backend is left: the batch that finds out tells its callers.
            return 1

    async def _run(self, parts: Sequence[_Part], ticket: Ticket) -> list[RanEmbeddings]:
        texts = tuple(text for part in parts for text in part.texts)
        request = EmbeddingInputs(self.route.model.name, texts, self._dimensions)
        bill = Bill()
        weights = [part.tokens for part in parts]
        try:
            ran = await self._embed(ticket, request, self.route, bill=bill)
        finally:
            for spent in bill.spent:
                for part, usage in zip(parts, _shares(spent.usage, weights), strict=True):
                    part.bill.spent.append(replace(spent, usage=usage))
        return [
            replace(ran, vectors=vectors, usage=usage)
            for vectors, usage in zip(
                _divided(ran.vectors, [len(part.texts) for part in parts]),
                _shares(ran.usage, weights),
                strict=True,
            )
        ]


def _divided(vectors: Sequence[array[float]], sizes: list[int]) -> list[Sequence[array[float]]]:
    ends = list(accumulate(sizes))
    return [vectors[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _shares(usage: Usage, weights: list[int]) -> list[Usage]:
    """Divides a usage in proportion to ``weights``; the shares add up to it."""
    total = max(1, sum(weights))
    ends = list(accumulate(weights))

    def share(amount: int, at: int) -> int:
        return amount * ends[at] // total - amount * (ends[at] - weights[at]) // total

    return [
        replace(
            usage,
            input_tokens=share(usage.input_tokens, at),
            output_tokens=share(usage.output_tokens, at),
            cached_input_tokens=share(usage.cached_input_tokens, at),
        )
        for at in range(len(weights))
    ]


def _joined(parts: Sequence[RanEmbeddings]) -> RanEmbeddings:
    """The vectors of a request that was divided, in order, and what they took together."""
    first = parts[0]
    usage = Usage(
        sum(part.usage.input_tokens for part in parts),
        sum(part.usage.output_tokens for part in parts),
        sum(part.usage.cached_input_tokens for part in parts),
        estimated=any(part.usage.estimated for part in parts),
    )
    return replace(
        first,
        vectors=[vector for part in parts for vector in part.vectors],
        usage=usage,
        queue_s=max(part.queue_s for part in parts),
        tries=max(part.tries for part in parts),
    )
