"""How a service declares its RPCs to the runtime."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog
from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import CollectorRegistry

from agent360.client import Mesh
from agent360.mesh.runtime.call import BatchHandler, Call

UnaryHandler = Callable[[Call, Any], Awaitable[Any]]
"""Answers one request of an RPC that is not hot: ``async def get_stats(self, call, request)``."""

StreamingHandler = Callable[[Call, Any], AsyncIterator[Any]]
"""Answers one request in pieces: an async generator ``async def watch(self, call, request)``."""

BidirectionalHandler = Callable[[Call, AsyncIterator[Any]], AsyncIterator[Any]]
"""Answers a stream other than Pipeline; ``call`` is that of the stream itself."""


@dataclass(frozen=True, slots=True)
class ServiceDefinition:
    """The RPCs of one gRPC service.

    Example:
        >>> ServiceDefinition(
        ...     descriptor=cache_pb2.DESCRIPTOR.services_by_name["CacheService"],
        ...     batch={"Get": self.get, "Set": self.set},
        ...     unary={"GetStats": self.get_stats},
        ...     streaming={"Watch": self.watch},
        ... )
    """

    descriptor: ServiceDescriptor
    """The service in the contract."""
    batch: Mapping[str, BatchHandler] = field(default_factory=dict)
    """Hot RPCs by name: served as unary (or server-streaming) RPCs and as items of Pipeline, whose
    operation is the RPC's name in snake_case."""
    unary: Mapping[str, UnaryHandler] = field(default_factory=dict)
    """Other unary RPCs by name."""
    streaming: Mapping[str, StreamingHandler] = field(default_factory=dict)
    """Other server-streaming RPCs by name."""
    bidirectional: Mapping[str, BidirectionalHandler] = field(default_factory=dict)
    """Streams other than Pipeline by name."""
    planned: Mapping[str, str] = field(default_factory=dict)
    """RPCs without a body yet, with the feature that will bring it: answered UNIMPLEMENTED."""
    default_tenant: str = ""
    """The tenant of calls that name none and whose principal has not just one; empty: refused."""
    all_tenants: frozenset[str] = frozenset()
    """RPCs that admins may call with tenant ``*``: these look at ``Call.all_tenants``."""
    long_lived: frozenset[str] = frozenset()
    """Streaming RPCs that are open until the caller leaves, such as Watch: no default deadline."""


class Servicer(Protocol):
    """The wire side of one process: its gRPC services and their life."""

    @property
    def definitions(self) -> tuple[ServiceDefinition, ...]:
        """The gRPC services that are served."""

    async def start(self) -> None:
        """Connects the backends; returns when calls can be answered."""

    async def close(self) -> None:
        """Closes the backends; called after the last call ended."""


@dataclass(frozen=True, slots=True)
class ServiceContext:
    """What the runtime hands to a servicer when it makes it."""

    mesh: Mesh
    """A client of the other services that acts as the mesh's own principal. Calls made while a call
    is handled inherit its tenant, deadline, priority and trace."""
    registry: CollectorRegistry
    """Where the service's own Prometheus metrics are registered."""
    log: structlog.stdlib.BoundLogger
    """The service's log."""
