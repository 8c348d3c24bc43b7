"""The four services inside the caller's process, for the tests and notebooks of its users."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

from agent360.client import Mesh, SyncMesh
from agent360.client.portal import Portal
from agent360.mesh.free_ports import free_ports
from agent360.mesh.runtime.server import Server
from agent360.mesh.services import NAMES, service_kind

_EMBEDDED: Mapping[str, Any] = {"ephemeral_ports": True, "grace_s": 1.0}


@asynccontextmanager
async def embedded(
    *,
    tenant: str = "default",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> AsyncIterator[Mesh]:
    """Runs the four services on free loopback ports and hands back a connected Mesh.

    Example:
        >>> async with embedded(tenant="acme") as mesh:
        ...     await mesh.cache.set("greeting", b"hello")

    Args:
        tenant: the tenant of the Mesh.
        settings: settings by service, as in the configuration file; metrics are kept in memory
            unless ``metrics.store`` says otherwise, and inference has no models unless
            ``inference`` names some.
    """
    given = settings or {}
    unknown = sorted(set(given) - set(NAMES))
    if unknown:
        raise ValueError(f"there is no service {unknown[0]!r}; known: {', '.join(NAMES)}")
    service_key = secrets.token_urlsafe(32)
    servers: dict[str, Server] = {}
    ports = dict(zip(NAMES, free_ports(len(NAMES)), strict=True))
    addresses: dict[str, Any] = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    addresses["api_key"] = service_key
    try:
        for name in NAMES:
            kind = service_kind(name)
            defaults = {**_EMBEDDED, "port": ports[name], **_DEFAULTS.get(name, {})}
            values = {**defaults, **given.get(name, {})}
            values["mesh"] = {**addresses, **values.get("mesh", {})}
            server = Server(kind.settings.model_validate(values), kind.servicer)
            await server.start()
            servers[name] = server
        async with Mesh.connect(
            inference=servers["inference"].address,
            cache=servers["cache"].address,
            ratelimit=servers["ratelimit"].address,
            metrics=servers["metrics"].address,
            tenant=tenant,
            api_key="",
        ) as mesh:
            yield mesh
    finally:
        await asyncio.gather(*(server.stop() for server in reversed(servers.values())))


@contextmanager
def embedded_sync(
    *,
    tenant: str = "default",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[SyncMesh]:
    """Runs the four services on a thread and hands back a connected SyncMesh.

    Example:
        >>> with embedded_sync(tenant="acme") as mesh:
        ...     mesh.cache.set("greeting", b"hello")

    Args:
        tenant: as in ``embedded``.
        settings: as in ``embedded``.
    """
    services = embedded(tenant=tenant, settings=settings)
    with Portal() as portal:
        mesh = portal.run(_entered(services))
        try:
            yield SyncMesh(mesh, portal)
        finally:
            portal.run(_left(services))


async def _entered(services: AbstractAsyncContextManager[Mesh]) -> Mesh:
    return await services.__aenter__()


async def _left(services: AbstractAsyncContextManager[Mesh]) -> None:
    await services.__aexit__(None, None, None)


_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "metrics": {"store": "sqlite:///:memory:"},
    "inference": {"backends": ()},
}
