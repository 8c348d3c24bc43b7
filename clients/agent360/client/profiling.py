"""Profiles of running services, on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import grpc

from agent360.client.coalescer import Coalescer, ConnectOptions
from agent360.client.errors import from_rpc_error
from agent360.profiling.v1 import profiling_pb2 as pb

Kind = Literal["cpu", "memory", "io"]
"""Where time goes, where memory is allocated, or what the event loop waits for and does."""

Format = Literal["speedscope", "html"]
"""JSON for speedscope, or a page for a browser."""

_PROFILE: Final = "/agent360.profiling.v1.ProfilingService/Profile"
_MARGIN_S: Final = 60.0
"""Beyond the profile itself: to start it, to write it and to send it."""

_KINDS: Final[Mapping[Kind, pb.ProfileKind.ValueType]] = {
    "cpu": pb.PROFILE_KIND_CPU,
    "memory": pb.PROFILE_KIND_MEMORY,
    "io": pb.PROFILE_KIND_IO,
}
_FORMATS: Final[Mapping[Format, pb.ProfileFormat.ValueType]] = {
    "speedscope": pb.PROFILE_FORMAT_SPEEDSCOPE,
    "html": pb.PROFILE_FORMAT_HTML,
}


@dataclass(frozen=True, slots=True)
class ProfileFile:
    """A profile of a service."""

    content_type: str
    """Media type of the content."""
    content: bytes
    """What to write to a file."""


class ProfilingClient:
    """Profiles one of the services; for admins.

    Example:
        >>> profile = await mesh.profiling.profile("inference", "cpu", seconds=10)
        >>> Path("inference.speedscope.json").write_bytes(profile.content)
    """

    def __init__(self, services: Mapping[str, Coalescer], options: ConnectOptions) -> None:
        self._services = services
        self._options = options

    async def profile(
        self,
        service: str,
        kind: Kind = "cpu",
        *,
        seconds: float = 10.0,
        output: Format = "speedscope",
    ) -> ProfileFile:
        """Profiles a replica of a service for a while.

        Args:
            service: inference, cache, ratelimit or metrics.
            kind: what is looked at.
            seconds: for how long, at most 60.
            output: how the profile is written.

        Raises:
            ValueError: there is no such service, kind or output.
            MeshError: PERMISSION_DENIED, if the caller is no admin; RESOURCE_EXHAUSTED, while
                another profile is made; or the service could not be asked.
        """
        for name, value, known in (
            ("service", service, self._services),
            ("kind", kind, _KINDS),
            ("output", output, _FORMATS),
        ):
            if value not in known:
                raise ValueError(f"{name}: {value!r} is none of {', '.join(known)}")
        request = pb.ProfileRequest(service=service, kind=_KINDS[kind], format=_FORMATS[output])
        request.duration.FromNanoseconds(round(seconds * 1e9))
        channel = await self._services[service].channel()
        rpc = channel.unary_stream(
            _PROFILE,
            request_serializer=pb.ProfileRequest.SerializeToString,
            response_deserializer=pb.ProfileResponse.FromString,
        )
        content_type, content = "", bytearray()
        try:
            async for piece in rpc(
                request, timeout=seconds + _MARGIN_S, metadata=self._options.metadata()
            ):
                content_type = content_type or piece.content_type
                content += piece.content
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return ProfileFile(content_type, bytes(content))
