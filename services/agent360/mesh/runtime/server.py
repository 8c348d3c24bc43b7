"""The server of one service: its ports, its life from start to drained stop."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import grpc
import structlog
from aiohttp import web
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from agent360.client import Mesh, Tls
from agent360.client.channel import server_options
from agent360.logs.v1.logs_pb2 import LogRecord
from agent360.mesh.runtime.admin import AdminServer, Readiness
from agent360.mesh.runtime.call import MESH_TENANT
from agent360.mesh.runtime.handlers import HandlerFactory
from agent360.mesh.runtime.http_calls import HttpCalls
from agent360.mesh.runtime.interceptor import Compression, PolicyInterceptor
from agent360.mesh.runtime.logs import LogReport, current_hub
from agent360.mesh.runtime.memory import MemoryGuard, ShedsMemory, tune_garbage_collection
from agent360.mesh.runtime.policies import Policies, Policy
from agent360.mesh.runtime.policies.access import AccessPolicy
from agent360.mesh.runtime.policies.authentication import AuthenticationPolicy, Authenticator
from agent360.mesh.runtime.policies.deadline import DeadlinePolicy
from agent360.mesh.runtime.policies.quota import LocalLimiter, LocalQuotaPolicy, RemoteQuotaPolicy
from agent360.mesh.runtime.policies.shedding import SheddingPolicy
from agent360.mesh.runtime.policies.tracing import TracingPolicy
from agent360.mesh.runtime.profiling import ProfilingServicer
from agent360.mesh.runtime.red import RedTable
from agent360.mesh.runtime.resources import ResourceMonitor
from agent360.mesh.runtime.service import ServiceContext, ServiceDefinition, Servicer
from agent360.mesh.runtime.settings import ServerSettings, TlsSettings
from agent360.mesh.runtime.telemetry import Measurements, SelfReport, Tracing


@runtime_checkable
class LimitsItself(Protocol):
    """A servicer that decides its own quota: the ratelimit service."""

    limiter: LocalLimiter
    """Its own domain."""


@runtime_checkable
class MeasuresItself(Protocol):
    """A servicer that takes its own measurements: the metrics service."""

    measurements: Measurements
    """Its own intake."""


@runtime_checkable
class KeepsLogs(Protocol):
    """A servicer that keeps log records itself: the metrics service."""

    async def write_own_logs(self, records: Sequence[LogRecord]) -> None:
        """Keeps records of this process.

        Raises:
            MeshError: they cannot be kept now.
        """


@runtime_checkable
class KnowsReadiness(Protocol):
    """A servicer that may be hampered while it serves."""

    def readiness(self) -> Readiness:
        """Whether calls should be sent to it at present."""


@runtime_checkable
class Drains(Protocol):
    """A servicer with streams of its own that must be asked to end."""

    def drain(self) -> None:
        """Asks them to."""


@runtime_checkable
class ServesHttp(Protocol):
    """A servicer with an HTTP API of its own beside gRPC."""

    def http_routes(self, calls: HttpCalls) -> Sequence[web.RouteDef]:
        """What is served on the HTTP port beside metrics and health; empty: nothing."""


ServicerFactory = Callable[[Any, ServiceContext], Servicer]
"""Makes a servicer from its settings: the servicer's class."""

_HTTP_OFFSET: Final = 1000
_LOGS_TIMEOUT_S: Final = 5.0
_NOT_CALLS: Final = frozenset({"Pipeline", "Watch", "Report"})


class Server:
    """Serves one service.

    Example:
        >>> server = Server(CacheSettings(), CacheServicer)
        >>> await server.run_until_signal()
    """

    def __init__(
        self, settings: ServerSettings, factory: ServicerFactory, *, mesh: Mesh | None = None
    ) -> None:
        """Prepares a server.

        Args:
            settings: of the service.
            factory: makes the servicer.
            mesh: client of the other services; None: one is connected as the settings say.

        Raises:
            ValueError: it would listen beyond loopback without TLS and API keys.
        """
        refuse_open_listener(settings)
        self.settings = settings
        self.log: structlog.stdlib.BoundLogger = structlog.get_logger(service=settings.service)
        self.registry = CollectorRegistry()
        for collector in (GCCollector, PlatformCollector, ProcessCollector):
            collector(registry=self.registry)
        self._factory = factory
        self._given_mesh = mesh
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in __all__
        self._admin = AdminServer(self.registry, self._readiness, settings.max_message_bytes)
        self._tracing = Tracing(settings.tracing, settings.service)
        self._red = RedTable()
        self.registry.register(self._red)
        self._memory = MemoryGuard(settings.memory, self.log, self.registry)
        self.ready = False
        """Whether calls are served."""
        self.port = 0
        """The gRPC port in use, once started."""
        self._stopped = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def address(self) -> str:
        """``host:port`` of the gRPC port, once started."""
        return f"{self.settings.host}:{self.port}"

    @property
    def http_port(self) -> int:
        """The HTTP port in use, once started."""
        return self._admin.port

    async def start(self) -> None:
        """Listens, connects the backends, then serves.

        Raises:
            RuntimeError: a port is taken.
        """
        settings = self.settings
        self._mesh = self._given_mesh or connect_mesh(settings)
        context = ServiceContext(mesh=self._mesh, registry=self.registry, log=self.log)
        self._servicer = self._factory(settings, context)
        measurements: Measurements = (
            self._servicer.measurements
            if isinstance(self._servicer, MeasuresItself)
            else self._mesh.metrics
        )
        self._report = SelfReport(self._red, measurements, self._mesh.audit, settings.service)
        self._logs = LogReport(
            settings.service,
            settings.log.shipping,
            measurements,
            self._servicer.write_own_logs
            if isinstance(self._servicer, KeepsLogs)
            else self._write_logs,
            current_hub(),
        )
        monitor = ResourceMonitor(settings.service, measurements, Path.cwd())
        self.registry.register(monitor)
        if isinstance(self._servicer, ShedsMemory):
            self._memory.caches.append(self._servicer)
        self._definitions = (
            *self._servicer.definitions,
            ProfilingServicer(settings.service, self.log).definition,
        )
        policies = Policies(self._policies())
        self._handlers = HandlerFactory(settings, policies, self.log)
        authenticator = Authenticator(
            settings.authentication, settings.mesh.api_key.get_secret_value()
        )
        self._http_calls = HttpCalls(
            authenticator,
            policies,
            lambda: self.ready,
            self.log,
            certificates=settings.tls.client_ca is not None,
        )
        self._grpc = self._build(policies, authenticator)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        routes = (
            self._servicer.http_routes(self._http_calls)
            if isinstance(self._servicer, ServesHttp)
            else ()
        )
        await self._admin.start(
            settings.host,
            self._wanted(settings.http_port, _HTTP_OFFSET),
            routes,
            tls_context(settings.tls) if routes else None,
        )
        self.port = self._bind(f"{settings.host}:{self._wanted(settings.port, 0)}")
        await self._grpc.start()
        await self._servicer.start()
        for watch in (self._report, self._logs, monitor, self._memory):
            self._tasks.append(asyncio.create_task(watch.run()))
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self.ready = True
        self.log.info("serving", address=self.address, http_port=self.http_port)

    async def stop(self, grace_s: float | None = None) -> None:
        """Stops in order: not ready, streams drained, calls finished, backends closed.

        Args:
            grace_s: how long calls may go on; None: as configured. Stopping twice is harmless.
        """
        if self._stopped:
            return
        self._stopped = True
        grace = self.settings.grace_s if grace_s is None else grace_s
        self.ready = False
        self._http_calls.refuse()
        await self._health.enter_graceful_shutdown()
        self._handlers.open_streams.drain("shutdown", grace)
        if isinstance(self._servicer, Drains):
            self._servicer.drain()
        await asyncio.gather(self._grpc.stop(grace), self._http_calls.drain(grace))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._report.report()
        await self._logs.close()
        await self._servicer.close()
        if self._given_mesh is None:
            await self._mesh.close()
        await self._admin.close()
        await self._tracing.close()
        self.log.info("stopped")

    async def run_until_signal(self) -> None:
        """Starts and serves until SIGTERM or SIGINT, then stops in order.

        A signal while it starts stops it then; a second one exits at once.

        Raises:
            RuntimeError: a port is taken.
        """
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if asked.is_set():
                os._exit(1)
            self.log.info("stopping", grace_s=self.settings.grace_s)
            asked.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        waiting = asyncio.create_task(asked.wait())
        starting = asyncio.create_task(self.start())
        await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            tune_garbage_collection()
            await waiting
        else:
            starting.cancel()
            await asyncio.wait((starting,))
        await self.stop()

    def _readiness(self) -> Readiness:
        if self.ready and isinstance(self._servicer, KnowsReadiness):
            return self._servicer.readiness()
        return Readiness(self.ready)

    async def _write_logs(self, records: Sequence[LogRecord]) -> None:
        await self._mesh.logs.write(records, timeout=_LOGS_TIMEOUT_S, tenant=MESH_TENANT)

    # ---------------------------------------------------------------- building

    def _policies(self) -> list[Policy]:
        settings = self.settings
        self._authorization = AuthenticationPolicy(
            settings.tenants, self._methods(lambda definition: definition.all_tenants)
        )
        policies: list[Policy] = [AccessPolicy(settings.log, self._red, self.log)]
        if self._tracing.enabled:
            policies.append(TracingPolicy(self._tracing.tracer, settings.tracing.sample_ratio))
        policies += [
            self._authorization,
            DeadlinePolicy(settings.deadline),
            self._memory,
            SheddingPolicy(settings.shedding),
        ]
        if isinstance(self._servicer, LimitsItself):
            policies.append(LocalQuotaPolicy(self._servicer.limiter))
        elif settings.quota.enabled:
            policies.append(
                RemoteQuotaPolicy(
                    self._mesh.ratelimit,
                    when_away=settings.quota.when_away,
                    timeout_s=settings.quota.timeout_s,
                    log=self.log,
                )
            )
        return policies

    def _build(self, policies: Policies, authenticator: Authenticator) -> grpc.aio.Server:
        settings = self.settings
        compressed = settings.compression != "none"
        lasting = self._methods(lambda definition: _NOT_CALLS | definition.long_lived)
        server = grpc.aio.server(
            interceptors=[
                PolicyInterceptor(
                    authenticator,
                    policies,
                    self._authorization,
                    long_lived=lasting,
                    compression=Compression(grpc.Compression.Gzip, settings.compression_min_bytes)
                    if compressed
                    else None,
                    log=self.log,
                    default_tenants={
                        f"/{each.descriptor.full_name}/{method.name}": each.default_tenant
                        for each in self._definitions
                        for method in each.descriptor.methods
                    },
                )
            ],
            options=server_options(settings.max_message_bytes),
        )
        for definition in self._definitions:
            server.add_generic_rpc_handlers((self._handlers.generic_handler(definition),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [definition.descriptor.full_name for definition in self._definitions]
        if settings.channelz:
            channelz.add_channelz_servicer(server)
            names.append("grpc.channelz.v1.Channelz")
        if settings.reflection:
            reflection.enable_server_reflection(
                (*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server
            )
        return server

    def _methods(self, names: Callable[[ServiceDefinition], frozenset[str]]) -> frozenset[str]:
        """Full names of the RPCs that ``names`` gives of each service."""
        return frozenset(
            f"/{definition.descriptor.full_name}/{method}"
            for definition in self._definitions
            for method in names(definition)
        )

    def _bind(self, address: str) -> int:
        tls = self.settings.tls
        if tls.certificate is None or tls.key is None:
            port = self._grpc.add_insecure_port(address)
        else:
            ca = tls.client_ca.read_bytes() if tls.client_ca else None
            port = self._grpc.add_secure_port(
                address,
                grpc.ssl_server_credentials(
                    [(tls.key.read_bytes(), tls.certificate.read_bytes())],
                    root_certificates=ca,
                    require_client_auth=ca is not None,
                ),
            )
        if port == 0:
            raise RuntimeError(f"cannot listen on {address}")
        return int(port)

    def _wanted(self, port: int, offset: int) -> int:
        if port or self.settings.ephemeral_ports:
            return port
        return self.settings.default_port + offset

    async def _set_health(self, status: Any) -> None:
        for name in ("", *(d.descriptor.full_name for d in self._definitions)):
            await self._health.set(name, status)


def connect_mesh(settings: ServerSettings) -> Mesh:
    """Connects a service to the others, as the mesh's own principal."""
    others = settings.mesh
    return Mesh.connect(
        inference=others.inference,
        cache=others.cache,
        ratelimit=others.ratelimit,
        metrics=others.metrics,
        api_key=others.api_key.get_secret_value(),
        tls=Tls(ca=others.ca) if others.ca else None,
        near_cache=settings.near_cache(),
    )


def tls_context(tls: TlsSettings) -> ssl.SSLContext | None:
    """What an HTTP port with an API is secured with: the certificates of the gRPC port.

    Client certificates are asked for as there; whether one is required is for the API to check, as
    probes of health and metrics have none.
    """
    if tls.certificate is None or tls.key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.client_ca is not None:
        context.load_verify_locations(tls.client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def refuse_open_listener(settings: ServerSettings) -> None:
    """Checks that nobody is served unprotected from beyond loopback.

    Raises:
        ValueError: the settings ask for that without ``insecure``.
    """
    if settings.insecure or _is_loopback(settings.host):
        return
    missing = []
    if settings.tls.certificate is None:
        missing.append("tls.certificate and tls.key")
    if not settings.authentication.keys:
        missing.append("authentication.keys")
    if missing:
        raise ValueError(
            f"refusing to listen on {settings.host} without {' and '.join(missing)}; "
            "set them, listen on 127.0.0.1, or give --insecure"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
