"""The access log and the RED metrics."""

from __future__ import annotations

from typing import Final

import grpc
import structlog

from agent360.mesh.runtime.batch import Group
from agent360.mesh.runtime.red import RedTable
from agent360.mesh.runtime.settings import LogSettings

_SERVER_FAULTS: Final = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


class AccessPolicy:
    """Counts every call and logs those that the settings ask for, one line for a group.

    Lines that are too many are left out by the log's sampling.
    """

    def __init__(
        self, settings: LogSettings, red: RedTable, log: structlog.stdlib.BoundLogger
    ) -> None:
        self._red = red
        self._log = log
        self._level = settings.access
        self._slow_s = settings.slow_s

    def before(self, group: Group) -> None:
        """Nothing."""

    def after(self, group: Group, code: grpc.StatusCode, count: int, duration_s: float) -> None:
        """Counts and logs ``count`` items of the group."""
        call = group.call
        self._red.add(call.method, call.tenant, code, call.streamed, count, duration_s)
        if self._level == "off":
            return
        failed = code is not grpc.StatusCode.OK and code is not grpc.StatusCode.CANCELLED
        if not (failed or duration_s > self._slow_s or self._level == "all"):
            return
        write = self._log.warning if code in _SERVER_FAULTS else self._log.info
        write(
            "call",
            method=call.method,
            code=code.name,
            tenant=call.tenant,
            principal=call.principal.name,
            peer=call.peer,
            request_id=call.request_id,
            trace_id=call.traceparent[3:35],
            span_id=call.traceparent[36:52],
            duration_ms=round(duration_s * 1e3, 3),
            **({"count": count} if count > 1 else {}),
            **call.facts,
        )
