"""Failures of a model server as errors of the mesh."""

from __future__ import annotations

import email.utils
import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import grpc

from agent360.client.errors import MeshError, UnavailableError

_MAX_MESSAGE: Final = 500
_AT_FAULT: Final = frozenset({400, 413, 422})
_TOO_MANY: Final = 429
_TOO_LONG: Final = frozenset({"context_length_exceeded", "exceed_context_size_error"})
"""What OpenAI and llama.cpp call a prompt that does not fit."""
_TOO_LONG_WORDS: Final = re.compile(
    r"maximum context length|exceeds? the (available |model'?s? )?context|context window"
    r"|`?inputs`? (must have less than|tokens \+ `?max_new_tokens)|prompt is too long",
    re.IGNORECASE,
)
"""How servers that have no name for it, such as vLLM and TGI, say the same."""
_FILTERED: Final = frozenset({"content_filter", "content_policy_violation"})
"""What OpenAI and Azure call a prompt that they refuse for its content."""
_UNPAID: Final = frozenset(
    {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
)
"""Rate limits by name that no waiting cures."""
_STATUS_BY_TYPE: Final[Mapping[str, int]] = {
    "validation": 422,
    "overloaded": 503,
    "BadRequestError": 400,
    "invalid_request_error": 400,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
}
"""HTTP statuses of errors that come within a stream, whose own status was 200."""

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
    code, reason = _classified(status, said, kinds)
    message = f"backend {backend} answered with HTTP status {status}"
    if said and reason != "UPSTREAM_UNAUTHENTICATED":
        message += f": {without_secret(said, secret)}"
    return MeshError(
        code,
        reason,
        message,
        metadata={"backend": backend, "http_status": str(status)},
        retry_after_s=retry_after_s(headers, limited=reason == "UPSTREAM_RATE_LIMITED"),
    )


def from_answer(backend: str, error: Any, secret: str = "") -> MeshError:
    """The error that an answer holds whose HTTP status said success.

    Args:
        backend: who answered.
        error: the ``error`` object of the API, or what stands in its place.
        secret: what must not be shown.
    """
    said, kinds = _said_by(error)
    numbers = [int(kind) for kind in kinds if kind.isdecimal() and 400 <= int(kind) < 600]
    named = [_STATUS_BY_TYPE[kind] for kind in kinds if kind in _STATUS_BY_TYPE]
    status = next(iter(numbers + named), None)
    if status is None and not kinds & (_TOO_LONG | _FILTERED):
        return broke(backend, said, secret)
    code, reason = _classified(status or 400, said, kinds)
    return MeshError(
        code,
        reason,
        f"backend {backend} answered with an error: {without_secret(said, secret)}",
        metadata={"backend": backend},
    )


def _classified(status: int, said: str, kinds: set[str]) -> tuple[grpc.StatusCode, str]:
    """The code and reason of an error, from its HTTP status and from what it says."""
    if kinds & _TOO_LONG or (status in _AT_FAULT and _TOO_LONG_WORDS.search(said)):
        return grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_TOO_LONG"
    if status in _AT_FAULT and kinds & _FILTERED:
        return grpc.StatusCode.INVALID_ARGUMENT, "CONTENT_FILTERED"
    if status == _TOO_MANY and kinds & _UNPAID:
        return grpc.StatusCode.FAILED_PRECONDITION, "UPSTREAM_UNPAID"
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if 400 <= status < 500:
        return grpc.StatusCode.FAILED_PRECONDITION, "UPSTREAM_REFUSED"
    return grpc.StatusCode.UNAVAILABLE, "UPSTREAM_FAILED"


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


def retry_after_s(headers: Mapping[str, str], *, limited: bool = False) -> float | None:
    """The Retry-After of an answer in seconds (RFC 9110, section 10.2.3), also in milliseconds.

    Where a rate limit has none, what OpenAI says of its exhausted limits stands in.

    Args:
        headers: by name in lower case, or whatever the case.
        limited: whether the answer is that of a rate limit.
    """
    exact = _positive(headers.get("retry-after-ms"))
    if exact is not None:
        return exact / 1000
    value = headers.get("retry-after")
    seconds = _positive(value)
    if seconds is not None:
        return seconds
    if not value:
        return _reset_s(headers) if limited else None
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def without_secret(text: str, secret: str) -> str:
    """The text, cut short, with the secret blotted out."""
    return (text.replace(secret, "***") if secret else text)[:_MAX_MESSAGE]


def _said(body: bytes) -> tuple[str, set[str]]:
    """The message, and the code and type, in an error's body."""
    try:
        found = json.loads(body)
    except ValueError:
        return body[:_MAX_MESSAGE].decode(errors="replace").strip(), set()
    return _said_by(found)


def _said_by(found: Any) -> tuple[str, set[str]]:
    """The same of JSON: of OpenAI and vLLM (``error`` or its fields), TGI, Ollama and FastAPI."""
    if not isinstance(found, dict):
        return str(found), set()
    error = found.get("error") or found
    kinds = {str(found["error_type"])} if "error_type" in found else set()
    if not isinstance(error, dict):
        return str(error), kinds
    inner = error.get("innererror")
    for each in (error, inner if isinstance(inner, dict) else {}):
        kinds |= {str(each[name]) for name in ("code", "type") if each.get(name) is not None}
    said = error.get("message") or error.get("detail") or error
    return str(said), kinds


def _reset_s(headers: Mapping[str, str]) -> float | None:
    """When the last of the exhausted limits is refilled, in seconds."""
    resets = [
        seconds
        for limit in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{limit}") == "0"
        and (seconds := _duration_s(headers.get(f"x-ratelimit-reset-{limit}", ""))) is not None
    ]
    return max(resets, default=None)


_DURATION: Final = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?")


def _duration_s(text: str) -> float | None:
    """A time such as ``1m30.5s`` or ``250ms`` in seconds; None if it is none."""
    found = _DURATION.fullmatch(text)
    if found is None or not text:
        return None
    hours, minutes, seconds, milliseconds = (float(each or 0) for each in found.groups())
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000


def _positive(value: str | None) -> float | None:
    try:
        number = float(value) if value else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None
