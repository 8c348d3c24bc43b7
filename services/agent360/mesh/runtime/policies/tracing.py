"""Tracing: spans for unary RPCs and for stream items whose caller is being traced."""

from __future__ import annotations

from typing import Any, Final

import grpc
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import StatusCode

from agent360.mesh.runtime.batch import Group

_TRACEPARENT_LENGTH: Final = 55
_NOT_FAILURES: Final = {
    grpc.StatusCode.OK,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
}


class TracingPolicy:
    """Opens a span for a group whose traceparent says sampled, or by ratio for untraced unary RPCs.

    Semantic conventions for RPC spans of OpenTelemetry; items of a stream add
    ``agent360.batch.size``.
    """

    def __init__(self, tracer: trace.Tracer, sample_ratio: float) -> None:
        self._tracer = tracer
        self._roots = sample_ratio > 0

    def before(self, group: Group) -> None:
        """Opens the group's span and makes calls made on its behalf its children."""
        call = group.call
        parent = parse_traceparent(call.traceparent)
        if parent is not None:
            if not parent.trace_flags & TraceFlags.SAMPLED:
                return
        elif call.streamed or not self._roots:
            return
        service, _, method = call.method[1:].rpartition("/")
        span = self._tracer.start_span(
            f"{service}/{method}",
            context=trace.set_span_in_context(NonRecordingSpan(parent)) if parent else None,
            kind=SpanKind.SERVER,
            attributes={
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": method,
                "agent360.batch.size": group.size,
            },
        )
        group.span = span
        context = span.get_span_context()
        if context.is_valid:
            call.traceparent = format_traceparent(context)

    def after(self, group: Group, code: grpc.StatusCode, count: int, duration_s: float) -> None:
        """Ends the span with the group's last item."""
        span: Any = group.span
        if span is None:
            return
        if code is not grpc.StatusCode.OK:
            span.set_attribute("rpc.grpc.status_code", code.value[0])
            if code not in _NOT_FAILURES:
                span.set_status(StatusCode.ERROR, code.name)
        if group.left <= 0:
            # Only now is it known for sure: a key of one tenant need not name it.
            span.set_attribute("agent360.tenant", group.call.tenant)
            span.end()


def parse_traceparent(text: str) -> SpanContext | None:
    """The span context of a W3C traceparent; None if it is empty or malformed."""
    if len(text) < _TRACEPARENT_LENGTH:
        return None
    try:
        version, trace_id, span_id, flags = text[:_TRACEPARENT_LENGTH].split("-")
        context = SpanContext(
            int(trace_id, 16),
            int(span_id, 16),
            is_remote=True,
            trace_flags=TraceFlags(int(flags, 16)),
        )
    except ValueError:
        return None
    return context if context.is_valid and version != "ff" else None


def format_traceparent(context: SpanContext) -> str:
    """The W3C traceparent of a span context."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
