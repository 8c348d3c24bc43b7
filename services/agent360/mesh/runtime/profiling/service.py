"""The profiling service, which every service of the mesh serves beside its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any, Final, Protocol

import grpc
import structlog

from agent360.client.errors import InvalidRequestError, MeshError, Violation
from agent360.mesh.runtime.call import MESH_TENANT, Call
from agent360.mesh.runtime.profiling.allocations import profile_allocations
from agent360.mesh.runtime.profiling.cpu import profile_cpu
from agent360.mesh.runtime.profiling.stacks import Profile
from agent360.mesh.runtime.profiling.waits import profile_waits
from agent360.mesh.runtime.service import ServiceDefinition
from agent360.profiling.v1 import profiling_pb2 as pb

MAX_SECONDS: Final = 60.0
"""The longest profile."""

_PIECE_BYTES: Final = 256 * 2**10
_DESCRIPTOR: Final = pb.DESCRIPTOR.services_by_name["ProfilingService"]


class Take(Protocol):
    """Makes a profile of one kind."""

    def __call__(self, seconds: float, *, html: bool) -> Awaitable[Profile]:
        """Watches for so many seconds."""


_KINDS: Final[Mapping[int, Take]] = {
    pb.PROFILE_KIND_CPU: profile_cpu,
    pb.PROFILE_KIND_MEMORY: profile_allocations,
    pb.PROFILE_KIND_IO: profile_waits,
}


class ProfilingServicer:
    """Serves agent360.profiling.v1.ProfilingService for the process it is in.

    One profile at a time, for admins only, of at most ``MAX_SECONDS``.
    """

    def __init__(self, service: str, log: structlog.stdlib.BoundLogger) -> None:
        """Makes the servicer.

        Args:
            service: whose process it is.
            log: told of every profile.
        """
        self._service = service
        self._log = log
        self._running = False

    @property
    def definition(self) -> ServiceDefinition:
        """What the runtime serves."""
        return ServiceDefinition(
            _DESCRIPTOR,
            streaming={"Profile": self.profile},
            long_lived=frozenset({"Profile"}),
            default_tenant=MESH_TENANT,
        )

    async def profile(self, call: Call, request: Any) -> AsyncIterator[pb.ProfileResponse]:
        """Profiles the process, and answers in pieces."""
        if not call.principal.admin:
            raise MeshError(
                grpc.StatusCode.PERMISSION_DENIED,
                "ADMIN_ONLY",
                "profiles show what a service is at for all tenants: they are for admins",
            )
        seconds = _seconds(request)
        service = self._service
        if request.service not in ("", service):
            raise _invalid("service", f"this is {service}: ask {request.service} itself")
        if self._running:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "PROFILE_RUNNING",
                f"{service} is being profiled; one profile at a time",
                retry_after_s=seconds,
            )
        self._running = True
        kind = pb.ProfileKind.Name(request.kind)
        self._log.info("profiling", kind=kind, seconds=seconds, principal=call.principal.name)
        try:
            profile = await _KINDS[request.kind](
                seconds, html=request.format == pb.PROFILE_FORMAT_HTML
            )
        finally:
            self._running = False
        content, content_type = profile.content, profile.content_type
        for start in range(0, len(content), _PIECE_BYTES):
            yield pb.ProfileResponse(
                content_type=content_type if start == 0 else "",
                content=content[start : start + _PIECE_BYTES],
            )


def _invalid(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError([Violation(field, description)])


def _seconds(request: Any) -> float:
    """For how long to watch.

    Raises:
        InvalidRequestError: the kind or the duration cannot be.
    """
    if request.kind not in _KINDS:
        raise _invalid("kind", "name one: CPU, MEMORY or IO")
    seconds: float = request.duration.ToTimedelta().total_seconds()
    if not 0 < seconds <= MAX_SECONDS:
        raise _invalid("duration", f"must be above 0 and at most {MAX_SECONDS:g} s")
    return seconds
