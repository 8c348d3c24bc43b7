"""What a call inherits from the code that makes it: tenant, deadline, priority, trace."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from enum import IntEnum
from typing import Final, NamedTuple


class Priority(IntEnum):
    """How soon a call should be served when a service is short of capacity."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


class CallScope(NamedTuple):
    """What calls made here carry, unless they say otherwise.

    A tuple, because one is made for every call that a service handles.
    """

    tenant: str = ""
    """On whose behalf; empty: the Mesh's own tenant."""
    deadline: float | None = None
    """When the answer is no longer wanted, on ``time.monotonic()``; None: the Mesh's default."""
    priority: int = 0
    """A ``Priority``; 0: not given."""
    traceparent: str = ""
    """W3C trace context; empty: that of the current OpenTelemetry span, if any."""
    request_id: str = ""
    """Names the call in logs and audit records."""


_NO_SCOPE: Final = CallScope()
_scope: ContextVar[CallScope] = ContextVar("agent360_call_scope", default=_NO_SCOPE)

_INVALID_SPAN: Final = 0


def current_scope() -> CallScope:
    """The scope that calls made here inherit."""
    return _scope.get()


def enter_scope(scope: CallScope) -> None:
    """Makes ``scope`` that of the current task; a service does so before it handles a call."""
    _scope.set(scope)


@contextlib.contextmanager
def call_scope(
    *,
    tenant: str | None = None,
    timeout: float | None = None,
    priority: Priority | None = None,
    traceparent: str | None = None,
    request_id: str | None = None,
) -> Iterator[CallScope]:
    """Sets what calls made inside inherit. A timeout can only shorten one that is in force.

    Example:
        >>> with call_scope(tenant="acme", timeout=2.0):
        ...     await mesh.cache.get("plan:42")

    Args:
        tenant: on whose behalf.
        timeout: seconds that everything inside may take together.
        priority: how soon calls should be served.
        traceparent: W3C trace context of the caller's span.
        request_id: names the calls in logs and audit records.
    """
    outer = _scope.get()
    deadline = outer.deadline
    if timeout is not None:
        own = time.monotonic() + timeout
        deadline = own if deadline is None else min(own, deadline)
    inner = CallScope(
        tenant=outer.tenant if tenant is None else tenant,
        deadline=deadline,
        priority=outer.priority if priority is None else int(priority),
        traceparent=outer.traceparent if traceparent is None else traceparent,
        request_id=outer.request_id if request_id is None else request_id,
    )
    token = _scope.set(inner)
    try:
        yield inner
    finally:
        _scope.reset(token)


def traceparent_of_current_span() -> str:
    """W3C trace context of the current OpenTelemetry span; empty where there is none.

    OpenTelemetry is not a dependency: it is asked only if the program has imported it.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return ""
    context = trace.get_current_span().get_span_context()
    if context.trace_id == _INVALID_SPAN:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
