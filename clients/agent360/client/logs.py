"""The client of the log service: what the services of the mesh logged."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Final, Literal

from agent360.client.coalescer import Coalescer, Wire
from agent360.logs.v1 import logs_pb2

WIRE: Final = Wire(
    "agent360.logs.v1.LogService",
    logs_pb2.WriteRequest,
    logs_pb2.WriteRequest,
    logs_pb2.WriteResponse,
    logs_pb2.WriteResponse,
)

LevelName = Literal["debug", "info", "warning", "error", "critical"]

LEVELS: Final = {
    "debug": logs_pb2.LOG_LEVEL_DEBUG,
    "info": logs_pb2.LOG_LEVEL_INFO,
    "warning": logs_pb2.LOG_LEVEL_WARNING,
    "error": logs_pb2.LOG_LEVEL_ERROR,
    "critical": logs_pb2.LOG_LEVEL_CRITICAL,
}
"""The levels of the contract by their names."""

MAX_RECORDS: Final = 1_000
"""Records in one message."""


class LogsClient:
    """Lists log records, and keeps those of other programs beside them.

    Example:
        >>> async for record in mesh.logs.list(service="inference", level="warning"):
        ...     print(record.record_time.ToDatetime(), record.message)
    """

    def __init__(self, coalescer: Coalescer) -> None:
        self._coalescer = coalescer

    async def write(
        self,
        records: Sequence[logs_pb2.LogRecord],
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> None:
        """Keeps records; those that have ids may be written again.

        Args:
            records: any number; more than a message holds are sent in several.
            timeout: seconds for each message.
            tenant: whose those are that name none; None: the current scope's, or the Mesh's.

        Raises:
            MeshError: a record is not valid, or the service could not be asked.
        """
        for start in range(0, len(records), MAX_RECORDS):
            request = logs_pb2.WriteRequest(records=records[start : start + MAX_RECORDS])
            await self._coalescer.unary("Write", request, logs_pb2.WriteResponse, timeout, tenant)

    async def list(
        self,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        level: LevelName | None = None,
        service: str = "",
        pattern: str = "",
        trace_id: str = "",
        page_size: int = 0,
        fields: Sequence[str] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[logs_pb2.LogRecord]:
        """Yields records, the newest first.

        Args:
            start: start of the range, included.
            end: end of the range, not included.
            level: the least one; None: any.
            service: only of this one.
            pattern: only with this one.
            trace_id: only of this trace.
            page_size: how many to fetch at a time; 0: the service's default.
            fields: only these fields of each; empty: all.
            timeout: seconds for each page.
            tenant: whose records; None: the current scope's, or the Mesh's. ``*``: all tenants',
                for admins.

        Raises:
            KeyError: there is no such level.
            MeshError: the caller may not see them, or the service could not be asked.
        """
        request = logs_pb2.ListRecordsRequest(page_size=page_size)
        wanted = request.filter
        if start is not None:
            wanted.start_time.FromDatetime(start)
        if end is not None:
            wanted.end_time.FromDatetime(end)
        if level is not None:
            wanted.level = LEVELS[level]
        wanted.service, wanted.pattern, wanted.trace_id = service, pattern, trace_id
        request.read_mask.paths.extend(fields)
        while True:
            page = await self._coalescer.unary(
                "ListRecords", request, logs_pb2.ListRecordsResponse, timeout, tenant
            )
            for record in page.records:
                yield record
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token
