"""The HTTP side of a service: Prometheus metrics, liveness and readiness, and its own API."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_BACKLOG: Final = 1024
_SHUTDOWN_S: Final = 1.0
"""How long the last bytes of answers may take to go out when everything else has ended."""


class Readiness(NamedTuple):
    """Whether calls should be sent here."""

    ready: bool
    hindrance: str = ""
    """What hampers the service, though it may be ready; shown to everybody."""


class AdminServer:
    """Serves /metrics, /healthz and /readyz, and the routes of a service that has an HTTP API."""

    def __init__(
        self,
        registry: CollectorRegistry,
        readiness: Callable[[], Readiness],
        max_body_bytes: int,
    ) -> None:
        self._registry = registry
        self._readiness = readiness
        self._max_body_bytes = max_body_bytes
        self._runner: web.AppRunner | None = None
        self.port = 0
        """The port in use, once started."""

    async def start(
        self,
        host: str,
        port: int,
        routes: Sequence[web.RouteDef] = (),
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Listens; port 0 takes a free one.

        Args:
            host: address to listen on.
            port: HTTP port.
            routes: of the service's own API; a caller that goes away cancels its request.
            tls: what the port is secured with; None: nothing.
        """
        app = web.Application(client_max_size=self._max_body_bytes)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.add_routes(routes)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,
            shutdown_timeout=_SHUTDOWN_S,
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=tls, backlog=_BACKLOG)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Stops listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        ready, hindrance = self._readiness()
        text = ("ready" if ready else "not ready") + (f": {hindrance}" if hindrance else "")
        return web.Response(status=200 if ready else 503, text=f"{text}\n")
