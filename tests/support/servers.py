"""Real servers on free ports, for tests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from agent360.client import Mesh
from agent360.mesh.runtime.server import Server
from agent360.mesh.services import service_kind


@asynccontextmanager
async def running(name: str, **settings: Any) -> AsyncIterator[Server]:
    """One service, started and stopped."""
    kind = service_kind(name)
    values = {"ephemeral_ports": True, "grace_s": 1.0, **settings}
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
