"""Backends whose work takes a known time, for tests of queues and batches in virtual time."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from agent360.client.errors import MeshError
from agent360.mesh.inference.answers import Ending, Usage
from agent360.mesh.inference.catalogue import Catalogue
from agent360.mesh.inference.conversation import EmbeddingInputs, Prompt
from agent360.mesh.inference.fleet import Fleet
from agent360.mesh.inference.members import Member
from agent360.mesh.inference.ports import Sink
from agent360.mesh.inference.queueing import Queues, Statistics, Ticket
from agent360.mesh.inference.queueing.settings import ConcurrencySettings
from agent360.mesh.inference.selection import Selector
from agent360.mesh.inference.settings import ModelSettings


@dataclass
class TimedBackend:
    """Takes ``fixed_s + per_unit_s * size``; a text or a token is a unit."""

    name: str = "gpu"
    fixed_s: float = 0.0
    per_unit_s: float = 0.001
    running: int = 0
    peak: int = 0
    sizes: list[int] = field(default_factory=list)
    faults: list[MeshError] = field(default_factory=list)

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def list_models(self) -> list[str]:
        return ["model"]

    async def work(self, size: int) -> None:
        """One piece of work."""
        self.running += 1
        self.peak = max(self.peak, self.running)
        self.sizes.append(size)
        try:
            await asyncio.sleep(self.fixed_s + self.per_unit_s * size)
            if self.faults:
                raise self.faults.pop()
        finally:
            self.running -= 1

    async def generate(self, prompt: Prompt, model: str, sink: Sink, *, streamed: bool) -> Ending:
        size = prompt.sampling.max_tokens or 1
        await self.work(size)
        return Ending("stop", Usage(0, size))

    async def embed(
        self, request: EmbeddingInputs, model: str
    ) -> tuple[Sequence[array[float]], Usage | None]:
        await self.work(len(request.inputs))
        vectors = [array("f", [float(len(each))]) for each in request.inputs]
        return vectors, Usage(sum(map(len, request.inputs)))


def model_on(*backends: TimedBackend, **options: object) -> ModelSettings:
    """A model that these backends run."""
    return ModelSettings.model_validate(
        {"name": "model", "backends": tuple(each.name for each in backends), **options}
    )


def fleet_of(*backends: TimedBackend) -> Fleet:
    """The backends as a fleet that is not probed."""
    return Fleet(
        [Member(each, probed=False) for each in backends],
        Catalogue(),
        structlog.get_logger(),
        discover=False,
        probe_interval_s=10.0,
    )


def queues_of(
    *backends: TimedBackend,
    slots: int = 4,
    weights: dict[str, float] | None = None,
    concurrency: ConcurrencySettings | None = None,
    statistics: Statistics | None = None,
) -> Queues:
    """Queues before these backends, each with so many slots. Needs a running loop."""
    fixed = concurrency or ConcurrencySettings(mode="fixed", maximum=slots)
    return Queues(
        fleet_of(*backends),
        Selector(random.Random(7)).choose,
        {each.name: fixed for each in backends},
        statistics or Statistics(),
        weights=weights,
    )


async def use(queues: Queues, model: ModelSettings, ticket: Ticket) -> float:
    """Takes a turn and works as long as the ticket is large; returns the time it all took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with queues.turn(model, ticket) as turn:
        backend = turn.member.backend
        assert isinstance(backend, TimedBackend)
        await backend.work(ticket.tokens)
        turn.outcome(tokens=ticket.tokens)
    return loop.time() - began
