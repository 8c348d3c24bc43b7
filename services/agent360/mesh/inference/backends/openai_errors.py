"""Failures of a model server as errors of the mesh."""

from __future__ import annotations

import email.utils
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import grpc

from agent360.client.errors import MeshError, UnavailableError

_MAX_MESSAGE: Final = 500
_TOO_LONG: Final = frozenset({"context_length_exceeded", "exceed_context_size_error"})
"""What OpenAI and llama.cpp call a prompt that does not fit."""

_BY_STATUS: Final[Mapping[int, tuple[grpc.StatusCode, str]]] = {
    400: (grpc.StatusCode.INVALID_ARGUMENT, "UPSTREAM_REFUSED"),
    401: (grpc.StatusCode.FAILED_PRECONDITION, "UPSTREAM_UNAUTHENTICATED"),
    402: (grpc.StatusCode.FAILED_PRECONDITION, "UPSTREAM_UNPAID"),
    403: (grpc.StatusCode.FAILED_PRECONDITION, "UPSTREAM_UNAUTHENTICATED"),
    404: (grpc.StatusCode.FAILED_PRECONDITION, "UPSTREAM_MODEL_UNKNOWN"),
    408: (grpc.StatusCode.UNAVAILABLE, "UPSTREAM_TIMEOUT"),
    409: (grpc.StatusCode.ABORTED, "UPSTREAM_CONFLICT"),
    413: (grpc.StatusCode.INVALID_ARGUMENT, "UPSTREAM_REFUSED"),
    422: (grpc.StatusCode.INVALID_ARGUMENT, "UPSTREAM_REFUSED"),
    429: (grpc.StatusCode.RESOURCE_EXHAUSTED, "UPSTREAM_RATE_LIMITED"),
    501: (grpc.StatusCode.UNIMPLEMENTED, "UPSTREAM_LACKS_FEATURE"),
    504: (grpc.StatusCode.UNAVAILABLE, "UPSTREAM_TIMEOUT"),
}


def from_response(
    backend: str, status: int, headers: Mapping[str, str], body: bytes, secret: str
) -> MeshError:
    """The error for an HTTP answer other than success.

    The server's own words are passed on, cut short and without ``secret``, unless they are about
    this service's credentials: those are nobody else's business.
    """
    said, kinds = _said(body)
    if kinds & _TOO_LONG:
        code, reason = grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_TOO_LONG"
    elif status in _BY_STATUS:
        code, reason = _BY_STATUS[status]
    elif 400 <= status < 500:
        code, reason = grpc.StatusCode.FAILED_PRECONDITION, "UPSTREAM_REFUSED"
    else:
        code, reason = grpc.StatusCode.UNAVAILABLE, "UPSTREAM_FAILED"
    message = f"backend {backend} answered with HTTP status {status}"
    if said and reason != "UPSTREAM_UNAUTHENTICATED":
        message += f": {without_secret(said, secret)}"
    return MeshError(
        code,
        reason,
        message,
        metadata={"backend": backend, "http_status": str(status)},
        retry_after_s=retry_after_s(headers),
    )


def broke(backend: str, why: str, secret: str = "") -> UnavailableError:
    """The error of an answer that ended before its end."""
    return UnavailableError(
        f"backend {backend} broke off in the middle of its answer: {without_secret(why, secret)}",
        reason="UPSTREAM_BROKE",
        metadata={"backend": backend},
    )


def malformed(backend: str, why: str) -> UnavailableError:
    """The error of an answer that is not what the API promises."""
    return UnavailableError(
        f"backend {backend} sent an answer that cannot be read: {why[:_MAX_MESSAGE]}",
        reason="UPSTREAM_MALFORMED",
        metadata={"backend": backend},
    )


def unreachable(backend: str, why: str) -> UnavailableError:
    """The error of a server that no connection could be made to."""
    return UnavailableError(
        f"backend {backend} cannot be reached: {why[:_MAX_MESSAGE]}",
        reason="UPSTREAM_UNREACHABLE",
        metadata={"backend": backend},
    )


def stalled(backend: str, seconds: float) -> UnavailableError:
    """The error of a server that fell silent."""
    return UnavailableError(
        f"backend {backend} said nothing for {seconds:g} s",
        reason="UPSTREAM_STALLED",
        metadata={"backend": backend},
    )


def timed_out(backend: str, seconds: float) -> UnavailableError:
    """The error of a request that took longer than one may."""
    return UnavailableError(
        f"backend {backend} did not end its answer within {seconds:g} s",
        reason="UPSTREAM_TIMEOUT",
        metadata={"backend": backend},
    )


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The Retry-After of an answer in seconds (RFC 9110, section 10.2.3), also in milliseconds."""
    exact = _positive(headers.get("retry-after-ms"))
    if exact is not None:
        return exact / 1000
    value = headers.get("Retry-After")
    seconds = _positive(value)
    if seconds is not None or not value:
        return seconds
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def error_text(error: Any) -> str:
    """What an ``error`` object of the API says."""
    if isinstance(error, dict):
        return str(error.get("message") or error)
    return str(error)


def without_secret(text: str, secret: str) -> str:
    """The text, cut short, with the secret blotted out."""
    return (text.replace(secret, "***") if secret else text)[:_MAX_MESSAGE]


def _said(body: bytes) -> tuple[str, set[str]]:
    """The message, and the code and type, in an error's body."""
    try:
        found = json.loads(body)
    except ValueError:
        return body[:_MAX_MESSAGE].decode(errors="replace").strip(), set()
    if not isinstance(found, dict):
        return str(found), set()
    error = found.get("error", found)
    kinds = {str(error.get("code")), str(error.get("type"))} if isinstance(error, dict) else set()
    return error_text(error), kinds


def _positive(value: str | None) -> float | None:
    try:
        number = float(value) if value else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None
