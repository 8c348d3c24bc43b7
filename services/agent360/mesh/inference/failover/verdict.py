"""What an error says: about the request, about the backend, and where to go from there."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

import grpc

from agent360.client.errors import MeshError


class Cure(Enum):
    """What can help."""

    NOTHING = "nothing"
    """The request itself is at fault: any backend would say so."""
    ELSEWHERE = "elsewhere"
    """Another backend or model; this one would say the same again."""
    AGAIN = "again"
    """Another backend or model, or later this one."""


_CURES: Final[Mapping[grpc.StatusCode, Cure]] = {
    grpc.StatusCode.UNAVAILABLE: Cure.AGAIN,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Cure.AGAIN,
    grpc.StatusCode.ABORTED: Cure.AGAIN,
    grpc.StatusCode.FAILED_PRECONDITION: Cure.ELSEWHERE,
    grpc.StatusCode.UNIMPLEMENTED: Cure.ELSEWHERE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Cure.ELSEWHERE,
}

_ILL: Final = frozenset({"UPSTREAM_UNAUTHENTICATED", "UPSTREAM_UNPAID"})
"""Reasons besides UNAVAILABLE that concern all requests to a backend."""

_WORKED: Final = frozenset({"UPSTREAM_STALLED", "UPSTREAM_TIMEOUT"})
"""Reasons of failures in which the server probably read the prompt before it was left."""


def cure(error: MeshError) -> Cure:
    """What can help after an error."""
    return _CURES.get(error.code, Cure.NOTHING)


def is_ill(error: MeshError) -> bool:
    """Whether an error counts against the backend that it came from."""
    return error.code is grpc.StatusCode.UNAVAILABLE or error.reason in _ILL


def used_the_model(error: MeshError) -> bool:
    """Whether the model probably worked on the request before this error."""
    return error.reason in _WORKED
