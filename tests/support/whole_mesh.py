"""All four services on free ports, wired to each other, with the simulator as their model."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from support.servers import running

from agent360.client import CheckRequest, Mesh, metric_query
from agent360.mesh.runtime.server import Server
from agent360.mesh.services import NAMES
from agent360.mesh.simulator import Simulator, SimulatorSettings

_MODELS: Final = [
    {"name": "small", "upstream_model": "sim-small"},
    {"name": "embedder", "upstream_model": "sim-embed", "capabilities": ["embeddings"]},
]


@asynccontextmanager
async def whole_mesh(
    **settings: Mapping[str, Any],
) -> AsyncIterator[tuple[dict[str, Server], Mesh]]:
    """The servers by name, and a client of all; ``settings`` are by service."""
    async with AsyncExitStack() as stack:
        instant = SimulatorSettings(port=0, first_token_s=0.0, inter_token_s=0.0)
        simulator = await stack.enter_async_context(Simulator(instant))
        own: dict[str, dict[str, Any]] = {
            "inference": {"backends": [{"url": simulator.url}], "models": _MODELS}
        }
        servers: dict[str, Server] = {}
        for name in NAMES:
            others = {known: server.address for known, server in servers.items()}
            values = {**own.get(name, {}), **settings.get(name, {}), "mesh": others}
            servers[name] = await stack.enter_async_context(running(name, **values))
        addresses: dict[str, Any] = {name: server.address for name, server in servers.items()}
        yield (
            servers,
            await stack.enter_async_context(Mesh.connect(tenant="acme", api_key="", **addresses)),
        )


async def use_everything(mesh: Mesh) -> None:
    """Calls every service, so that all of them have something to show."""
    await mesh.cache.set("k", b"v")
    await mesh.cache.get("k")
    await mesh.cache.get("absent")
    await mesh.ratelimit.check("plans")
    async for _ in mesh.ratelimit.check_many([CheckRequest("plans")] * 3):
        pass
    await mesh.inference.generate("Say hello.", model="small")
    mesh.metrics.count("plans")
    await mesh.metrics.flush()
    async for _ in mesh.metrics.query(metric_query("plans", "sum")):
        pass
