"""The inference service with its real neighbours: cache, limits, metrics, a simulated model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from support.servers import running

from agent360.client import Mesh
from agent360.mesh.runtime.server import Server
from agent360.mesh.simulator import Simulator, SimulatorSettings

MODELS: Final[Sequence[dict[str, Any]]] = (
    {
        "name": "small",
        "upstream_model": "sim-small",
        "input_usd_per_million": 1.0,
        "output_usd_per_million": 2.0,
    },
    {"name": "embedder", "upstream_model": "sim-embed", "capabilities": ["embeddings"]},
)


@dataclass
class InferenceMesh:
    """Running services, to be asked and looked at."""

    simulator: Simulator
    servers: Sequence[Server]
    """Replicas of the inference service."""
    mesh: Mesh
    """A client of all services, through the first replica."""
    addresses: dict[str, str]
    """Of the services beside inference."""

    @property
    def upstream_calls(self) -> int:
        """Chat requests that have come to the model."""
        return self.simulator.load.by_path["/v1/chat/completions"]

    def inside(self, replica: int = 0) -> Mesh:
        """The client that a replica asks its neighbours with."""
        return self.servers[replica]._mesh

    def connect(self, replica: int = 0, tenant: str = "acme") -> Mesh:
        """A client of one replica."""
        return Mesh.connect(
            inference=self.servers[replica].address, tenant=tenant, api_key="", **self.addresses
        )

    async def used(self, limit_id: str, tenant: str = "acme", **counted_by: str) -> int:
        """How much of a limit is used, reservations included."""
        usage = await self.mesh.ratelimit.get_usage(limit_id, counted_by=counted_by, tenant=tenant)
        return usage.used


@asynccontextmanager
async def inference_mesh(
    directory: Path,
    *,
    limits: str = "",
    replicas: Sequence[dict[str, Any]] = ({},),
    simulator: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[InferenceMesh]:
    """Runs the four services and a simulated model.

    Args:
        directory: for files.
        limits: the limits file's text.
        replicas: settings of each replica of the inference service alone.
        simulator: settings of the simulated model.
        settings: of all replicas.
    """
    file = directory / "limits.toml"
    file.write_text(limits)
    pace = {"port": 0, "first_token_s": 0.01, "inter_token_s": 0.0, **(simulator or {})}
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(Simulator(SimulatorSettings.model_validate(pace)))
        addresses = {
            name: (await stack.enter_async_context(running(name, **given))).address
            for name, given in {"cache": {}, "metrics": {}, "ratelimit": {"limits": file}}.items()
        }
        servers = [
            await stack.enter_async_context(
                running("inference", **_settings_of(model, addresses, {**settings, **own}))
            )
            for own in replicas
        ]
        made = InferenceMesh(model, servers, None, addresses)  # type: ignore[arg-type]  # set below
        made.mesh = await stack.enter_async_context(made.connect())
        yield made


def _settings_of(
    model: Simulator, addresses: dict[str, str], given: dict[str, Any]
) -> dict[str, Any]:
    """Settings of a replica; a busy machine must not make its neighbours seem away."""
    patient = {"timeout_s": 5.0}
    return {
        "backends": [{"url": model.url}],
        "models": MODELS,
        "mesh": addresses,
        **given,
        "cache": {**patient, **given.get("cache", {})},
        "limits": {**patient, **given.get("limits", {})},
    }
