"""Errors of the mesh as those of the OpenAI API, so that its clients raise their own classes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import grpc
import msgspec

from agent360.client.errors import MeshError

_BY_CODE: Final[Mapping[grpc.StatusCode, tuple[int, str]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error"),
    grpc.StatusCode.OUT_OF_RANGE: (400, "invalid_request_error"),
    grpc.StatusCode.FAILED_PRECONDITION: (400, "invalid_request_error"),
    grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error"),
    grpc.StatusCode.NOT_FOUND: (404, "not_found_error"),
    grpc.StatusCode.ALREADY_EXISTS: (409, "conflict_error"),
    grpc.StatusCode.ABORTED: (409, "conflict_error"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    grpc.StatusCode.CANCELLED: (499, "cancelled_error"),
    grpc.StatusCode.UNIMPLEMENTED: (501, "server_error"),
    grpc.StatusCode.UNAVAILABLE: (503, "server_error"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "timeout_error"),
}
_BY_REASON: Final[Mapping[str, tuple[int, str]]] = {
    "OVERLOADED": (503, "overloaded_error"),
    "QUEUE_FULL": (503, "overloaded_error"),
    "MESSAGE_TOO_LARGE": (413, "invalid_request_error"),
    "ANSWER_TOO_LONG": (502, "server_error"),
    "UPSTREAM_UNAUTHENTICATED": (502, "server_error"),
    "UPSTREAM_UNPAID": (502, "server_error"),
    "UPSTREAM_MODEL_UNKNOWN": (502, "server_error"),
}
"""Where the code alone would blame the caller, or say less than HTTP can."""

_CODES: Final[Mapping[str, str]] = {
    "MODEL_UNKNOWN": "model_not_found",
    "CONTEXT_TOO_LONG": "context_length_exceeded",
    "RATE_LIMITED": "rate_limit_exceeded",
    "API_KEY_MISSING": "invalid_api_key",
    "API_KEY_MALFORMED": "invalid_api_key",
    "API_KEY_UNKNOWN": "invalid_api_key",
    "MESSAGE_TOO_LARGE": "request_too_large",
}
"""Reasons that the API has a name of its own for; the others go out in lower case."""

_FINAL: Final = frozenset({504, 502})
"""Statuses whose repetition would only do the same work again; clients are told so."""

_PARAMETERS: Final = (
    (re.compile(r"^sampling\.max_tokens"), "max_tokens"),
    (re.compile(r"^sampling\."), ""),
    (re.compile(r"^cache_control\.ttl"), "agent360.cache.ttl_s"),
    (re.compile(r"^cache_control\."), "agent360.cache."),
    (re.compile(r"^hints\.max_latency"), "agent360.hints.max_latency_s"),
    (re.compile(r"^hints\.queue_timeout"), "agent360.hints.queue_timeout_s"),
    (re.compile(r"^hints\."), "agent360.hints."),
    (re.compile(r"^inputs"), "input"),
    (re.compile(r"^tool_choice\..*"), "tool_choice"),
    (re.compile(r"^(tools\[\d+\])\.(?!function)"), r"\1.function."),
    (re.compile(r"^(messages\[\d+\])\.parts"), r"\1.content"),
    (re.compile(r"^metadata "), "header "),
)
"""The contract's names of fields, and the API's."""


class Failure(NamedTuple):
    """An error as the API has it."""

    status: int
    """HTTP status."""
    body: bytes
    """JSON with an ``error``."""
    headers: Mapping[str, str]
    """Retry-After and the like."""


def failure_of(error: MeshError) -> Failure:
    """The error for the wire."""
    status, kind = _BY_REASON.get(error.reason) or _BY_CODE.get(error.code, (500, "server_error"))
    found = [(parameter_of(each.field), each.description) for each in error.violations]
    described = {
        "message": "; ".join(f"{name}: {text}" for name, text in found) or error.message,
        "type": kind,
        "param": found[0][0] if found else _PARAMETER_BY_REASON.get(error.reason),
        "code": _CODES.get(error.reason, error.reason.lower()),
        "agent360": {"reason": error.reason, "metadata": dict(error.metadata)},
    }
    return Failure(status, msgspec.json.encode({"error": described}), _headers(status, error))


def parameter_of(field: str) -> str:
    """The API's name of a field of the contract."""
    for pattern, replacement in _PARAMETERS:
        renamed, count = pattern.subn(replacement, field)
        if count:
            return renamed
    return field


_PARAMETER_BY_REASON: Final = {
    "MODEL_UNKNOWN": "model",
    "MODEL_LACKS_CAPABILITY": "model",
    "CONTEXT_TOO_LONG": "messages",
}


def _headers(status: int, error: MeshError) -> dict[str, str]:
    headers: dict[str, Any] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after_s * 1000)))
    if status in _FINAL:
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers
