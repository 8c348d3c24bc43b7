"""Model servers, the backends that ask them, and the part of the service that runs models."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog
from prometheus_client import CollectorRegistry

from agent360.mesh.inference.answers import Piece, merge
from agent360.mesh.inference.backends.openai import OpenAIBackend
from agent360.mesh.inference.billing import Bill
from agent360.mesh.inference.catalogue import Catalogue
from agent360.mesh.inference.conversation import EmbeddingInputs, Message, Prompt
from agent360.mesh.inference.failover.breaker import Breakers
from agent360.mesh.inference.failover.tally import Tally
from agent360.mesh.inference.fleet import Fleet
from agent360.mesh.inference.members import Member
from agent360.mesh.inference.queueing import Queues, Statistics, Ticket
from agent360.mesh.inference.routing import Route
from agent360.mesh.inference.selection import Selector
from agent360.mesh.inference.settings import BackendSettings, ModelSettings
from agent360.mesh.inference.upstream import Ran, RanEmbeddings, Upstream
from agent360.mesh.simulator import Simulator, SimulatorSettings

FAST: dict[str, Any] = {"port": 0, "first_token_s": 0.0, "inter_token_s": 0.0}


@dataclass
class UpstreamRig:
    """Simulators by the names of their backends, and the service's way to them."""

    simulators: Mapping[str, Simulator]
    upstream: Upstream
    registry: CollectorRegistry
    breakers: Breakers
    members: list[Member]
    bills: list[Bill] = field(default_factory=list)

    async def ask(
        self,
        content: str,
        route: Route,
        *,
        streamed: bool = True,
        deadline: float | None = None,
        tenant: str = "acme",
    ) -> tuple[str, Ran]:
        said: list[Piece] = []
        self.bills.append(bill := Bill())
        ran = await self.upstream.generate(
            Ticket(tenant, tokens=100, deadline=deadline),
            Prompt(model=route.model.name, messages=(Message("user", content),)),
            route,
            said.extend,
            streamed=streamed,
            bill=bill,
        )
        return merge(said).content, ran

    async def embed(self, text: str, route: Route) -> RanEmbeddings:
        self.bills.append(bill := Bill())
        request = EmbeddingInputs(route.model.name, (text,), dimensions=8)
        return await self.upstream.embed(Ticket("acme"), request, route, bill=bill)

    def requests(self, backend: str) -> int:
        load = self.simulators[backend].load
        return load.by_path["/v1/chat/completions"] + load.by_path["/v1/embeddings"]

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@contextlib.asynccontextmanager
async def upstream_rig(
    simulated: Mapping[str, Mapping[str, Any]],
    *,
    backends: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> AsyncIterator[UpstreamRig]:
    """One simulator and backend for each name, with these settings of the simulators.

    Args:
        simulated: settings of each simulator.
        backends: further settings of their backends.
        settings: ``retry`` and ``hedge`` of the Upstream.
    """
    async with contextlib.AsyncExitStack() as stack:
        simulators = {
            name: await stack.enter_async_context(Simulator(SimulatorSettings(**{**FAST, **more})))
            for name, more in simulated.items()
        }
        configured = [
            BackendSettings.model_validate(
                {"name": name, "url": simulator.url, **(backends or {}).get(name, {})}
            )
            for name, simulator in simulators.items()
        ]
        members = [Member(OpenAIBackend(each), probed=False) for each in configured]
        fleet = Fleet(
            members, Catalogue(), structlog.get_logger(), discover=False, probe_interval_s=60
        )
        for member in members:
            await member.backend.start()
            stack.push_async_callback(member.backend.close)
        breakers = Breakers({each.name: each.breaker for each in configured})
        registry = CollectorRegistry()
        queues = Queues(
            fleet,
            Selector(random.Random(1)).choose,
            {each.name: each.concurrency for each in configured},
            Statistics(),
        )
        stack.callback(queues.close)
        upstream = Upstream(queues, Tally(registry, breakers), breakers, **settings)
        stack.push_async_callback(upstream.close)
        yield UpstreamRig(simulators, upstream, registry, breakers, members)


def model(name: str, *backends: str, **more: Any) -> ModelSettings:
    """A chat model of the simulators."""
    return ModelSettings.model_validate(
        {"name": name, "backends": backends, "upstream_model": "sim-small", **more}
    )


def route(first: ModelSettings, *fallbacks: ModelSettings) -> Route:
    """A route to a model and its fallbacks."""
    return Route(first, "explicit", fallbacks=fallbacks)


async def all_settled(*work: Any) -> list[Any]:
    """The results, or the errors, of work done at the same time."""
    return await asyncio.gather(*work, return_exceptions=True)
