"""Real servers on free ports, for tests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from agent360.client import Mesh
from agent360.mesh.runtime.server import Server
from agent360.mesh.services import NAMES, service_kind

NOBODY: Final = "127.0.0.1:1"
"""An address where nobody listens."""

_DEFAULTS: Final[dict[str, dict[str, Any]]] = {"metrics": {"store": "sqlite:///:memory:"}}


@asynccontextmanager
async def running(name: str, **settings: Any) -> AsyncIterator[Server]:
    """One service, started and stopped; it knows no other service but those it is told of."""
    kind = service_kind(name)
    defaults = {"ephemeral_ports": True, "grace_s": 1.0, **_DEFAULTS.get(name, {})}
    values = {**defaults, **settings}
    values["mesh"] = {**dict.fromkeys(NAMES, NOBODY), **settings.get("mesh", {})}
    server = Server(kind.settings.model_validate(values), kind.servicer)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connected(name: str, tenant: str = "acme", **settings: Any) -> AsyncIterator[Mesh]:
    """A client of one running service."""
    async with (
        running(name, **settings) as server,
        Mesh.connect(**{name: server.address}, tenant=tenant, api_key="") as mesh,
    ):
        yield mesh
