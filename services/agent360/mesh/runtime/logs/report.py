"""Reports the log of one service: counts by level and pattern, and the records worth keeping."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time
import traceback
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Protocol

import grpc

from agent360.client.errors import MeshError
from agent360.logs.v1 import logs_pb2 as pb
from agent360.mesh.runtime.call import MESH_TENANT
from agent360.mesh.runtime.logs.hub import EventDict, LogHub, handing_on
from agent360.mesh.runtime.settings import LogShippingSettings
from agent360.mesh.runtime.validation import TENANT_PATTERN

Keep = Callable[[Sequence[pb.LogRecord]], Awaitable[None]]
"""Keeps records: a call of the log service, or what the metrics service does itself."""

COUNTS: Final = "mesh_log_records"
"""Counter of the mesh: records by ``service``, ``level`` and ``pattern``, also those left out."""
LOST: Final = "mesh_log_records_lost"
"""Counter of the mesh: records by ``service`` that should have been kept and were not."""

_COUNT_EVERY_S: Final = 5.0
_SHIP_EVERY_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 30.0
_BATCH: Final = 500
_FAREWELL_S: Final = 1.0
_PASSING: Final = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNAUTHENTICATED,
}
"""Errors after which it can succeed later."""
_MAX_MS: Final = 1e12
_MAX_ATTRIBUTES: Final = 32
_MAX_TEXT: Final = 16_384
_FIELDS: Final = {
    "tenant": TENANT_PATTERN,
    "service": re.compile(r".{1,64}"),
    "trace_id": re.compile(r"[0-9a-f]{32}"),
    "span_id": re.compile(r"[0-9a-f]{16}"),
    "request_id": re.compile(r".{1,200}"),
    "method": re.compile(r".{1,200}"),
    "code": re.compile(r".{1,64}"),
}
"""What becomes a field of its own if it looks like this; else it is an attribute."""
_OTHERS: Final = frozenset(
    {"event", "level", "timestamp", "duration_ms", "exception", "exc_info", "suppressed"}
)


class Counter(Protocol):
    """Takes counts; part of ``Measurements``."""

    def count(
        self,
        name: str,
        value: float = 1.0,
        labels: dict[str, str] | None = None,
        tenant: str = "",
    ) -> None:
        """Adds to a counter."""


class LogReport:
    """Hands a service's records on in the background; never waits for them, never fails.

    Invariant: what is logged while records are handed on is not handed on itself, and while the
    metrics service is away at most ``max_waiting`` records wait for it.

    Example:
        >>> report = LogReport("cache", settings.log.shipping, mesh.metrics, mesh.logs.write, hub)
        >>> task = asyncio.create_task(report.run())
    """

    def __init__(
        self,
        service: str,
        settings: LogShippingSettings,
        counter: Counter,
        keep: Keep,
        hub: LogHub | None,
    ) -> None:
        """Begins to take records.

        Args:
            service: whose.
            settings: which records are handed on.
            counter: takes the counts.
            keep: keeps records; raises MeshError if it cannot.
            hub: of the process's log; None: there is nothing to report.
        """
        self._service = service
        self._counter = counter
        self._keep = keep
        self._hub = hub
        self._max_waiting = settings.max_waiting
        self._waiting: deque[pb.LogRecord] = deque()
        self._lost = 0
        if hub is not None and settings.enabled:
            hub.sinks[service] = self

    def offer(self, event: EventDict, level: int, pattern: str) -> None:
        """See ``Sink.offer``."""
        if len(self._waiting) >= self._max_waiting:
            self._lost += 1
            return
        self._waiting.append(to_message(event, level, pattern))

    async def run(self) -> None:
        """Reports until cancelled."""
        if self._hub is None:
            return
        handing_on.set(True)
        pause_s = _SHIP_EVERY_S
        last_count_s = time.monotonic()
        while True:
            await asyncio.sleep(pause_s)
            if time.monotonic() - last_count_s >= _COUNT_EVERY_S:
                last_count_s = time.monotonic()
                self.count()
            pause_s = _SHIP_EVERY_S if await self._ship() else min(2 * pause_s, _LONGEST_PAUSE_S)

    def count(self) -> None:
        """Reports how many records there were since the last time."""
        if self._hub is None:
            return
        for (level, pattern), count in self._hub.drain(self._service).items():
            labels = {"service": self._service, "level": level, "pattern": pattern}
            self._counter.count(COUNTS, float(count), labels, tenant=MESH_TENANT)
        lost, self._lost = self._lost, 0
        if lost:
            self._counter.count(LOST, float(lost), {"service": self._service}, tenant=MESH_TENANT)

    async def close(self) -> None:
        """Reports what is left, if it can be done at once."""
        if self._hub is None:
            return
        if self._hub.sinks.get(self._service) is self:
            del self._hub.sinks[self._service]
        self.count()
        token = handing_on.set(True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await self._ship()
        handing_on.reset(token)

    async def _ship(self) -> bool:
        """Hands on what waits; False: it cannot be done now."""
        while self._waiting:
            batch = [self._waiting[n] for n in range(min(_BATCH, len(self._waiting)))]
            try:
                await self._keep(batch)
            except MeshError as error:
                if error.code in _PASSING:
                    return False
                self._lost += len(batch)  # they would be refused again
            for _ in batch:
                self._waiting.popleft()
        return True


def to_message(event: Mapping[str, Any], level: int, pattern: str) -> pb.LogRecord:
    """A record of the process's log as the contract has it."""
    record = pb.LogRecord(
        record_id=str(uuid.uuid4()),
        level=level,  # type: ignore[arg-type]  # an enum's number
        message=_text(event.get("event", "")) or "-",
        pattern=pattern,
    )
    record.record_time.FromNanoseconds(_nanoseconds(event.get("timestamp")))
    duration_ms, suppressed = event.get("duration_ms"), event.get("suppressed")
    if isinstance(duration_ms, int | float) and 0 <= duration_ms < _MAX_MS:
        record.duration.FromNanoseconds(int(duration_ms * 1e6))
    if isinstance(suppressed, int):
        record.suppressed = suppressed
    record.exception = _exception(event)
    for name, value in event.items():
        field = _FIELDS.get(name)
        if field is not None and isinstance(value, str) and field.fullmatch(value):
            setattr(record, name, value)
        elif name not in _OTHERS and name and len(record.attributes) < _MAX_ATTRIBUTES:
            record.attributes[_text(name)[:16]] = _text(value)
    return record


def _nanoseconds(timestamp: Any) -> int:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return int(datetime.fromisoformat(timestamp).timestamp() * 1e6) * 1_000
    return time.time_ns()


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text[:_MAX_TEXT].encode(errors="replace").decode()


def _exception(event: Mapping[str, Any]) -> str:
    if "exception" in event:
        return _text(event["exception"])
    error = event.get("exc_info")
    if error is True:
        error = sys.exception()
    if isinstance(error, tuple):
        error = error[1]
    if isinstance(error, BaseException):
        return "".join(traceback.format_exception(error))[-_MAX_TEXT:]
    return ""
