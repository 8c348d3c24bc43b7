"""The RPCs of LogService, and the way of the metrics service's own records."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc

from agent360.client.errors import MeshError
from agent360.logs.v1 import logs_pb2 as pb
from agent360.mesh.metrics.logs.wire import read_filter, read_records, record_message, to_record
from agent360.mesh.metrics.ports import LogRecord, LogStore, Position, StoreError
from agent360.mesh.runtime.call import ANY_TENANT, MESH_TENANT, Call
from agent360.mesh.runtime.pages import (
    decode_place,
    encode_page_token,
    page_size,
    read_mask,
)
from agent360.mesh.runtime.redaction import Redactor

DESCRIPTOR: Final = pb.DESCRIPTOR.services_by_name["LogService"]
"""In the contract."""


class LogService:
    """Keeps log records and lists them.

    Example:
        >>> service = LogService(stores.logs, redactor, keep_s=14 * 86_400)
        >>> await service.write(call, pb.WriteRequest(records=records))
    """

    def __init__(
        self,
        store: LogStore,
        redactor: Redactor,
        *,
        keep_s: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Makes the service.

        Args:
            store: where records are kept.
            redactor: takes secrets out of them.
            keep_s: for how long; older ones are not taken.
            now: Unix time.
        """
        self._store = store
        self._redactor = redactor
        self._keep_s = keep_s
        self._now = now

    async def write(self, call: Call, request: Any) -> Any:
        """Keeps records."""
        await self._write(read_records(call, request, self._redactor))
        return pb.WriteResponse()

    async def write_own(self, records: Sequence[pb.LogRecord]) -> None:
        """Keeps records of this process, without a call.

        Raises:
            MeshError: UNAVAILABLE; the store cannot take them.
        """
        await self._write(
            [to_record(each, each.tenant or MESH_TENANT, self._redactor) for each in records]
        )

    async def list_records(self, call: Call, request: Any) -> Any:
        """Lists records, the newest first."""
        size = page_size(request.page_size)
        wanted = read_filter(call, request)
        query = request.filter.SerializeToString(deterministic=True)
        tenant = ANY_TENANT if call.all_tenants else call.tenant
        position = decode_place(tenant, query, request.page_token)
        masked = read_mask(request, pb.LogRecord)
        before = Position(*position) if position else None
        try:
            page = await self._store.records(wanted, before, size)
        except StoreError as error:
            raise MeshError(
                grpc.StatusCode.UNAVAILABLE,
                "STORE_AWAY",
                "records cannot be read now, as the store is away; repeat later",
                retry_after_s=1.0,
            ) from error
        response = pb.ListRecordsResponse()
        for record in page.records:
            message = record_message(record, whole=call.principal.admin)
            response.records.append(masked(message))
        if page.resume is not None:
            response.next_page_token = encode_page_token(tenant, query, list(page.resume))
        return response

    async def expire(self) -> None:
        """Drops what is past its retention.

        Raises:
            StoreError: it is to be repeated.
        """
        await self._store.drop(int((self._now() - self._keep_s) * 1e6))

    async def _write(self, records: Sequence[LogRecord]) -> None:
        oldest_us = (self._now() - self._keep_s) * 1e6
        kept = [record for record in records if record.time_us >= oldest_us]
        if not kept:
            return
        try:
            await self._store.write(kept, self._keep_s)
        except StoreError as error:
            raise MeshError(
                grpc.StatusCode.UNAVAILABLE,
                "LOG_STORE_FAILING",
                "records cannot be stored now; repeat with the same record_id",
                retry_after_s=1.0,
            ) from error
