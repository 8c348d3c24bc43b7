"""Reports measurements in the background, over one stream, until each is acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import grpc

from agent360.client.errors import MeshError
from agent360.metrics.v1 import metrics_pb2

FLUSH_EVERY_S: Final = 1.0
"""How often what was measured is sent."""

MAX_UNACKNOWLEDGED: Final = 600
"""Messages kept for sending again; the oldest beyond that is dropped and counted."""

_MAX_ROWS: Final = 100_000
_BACKOFF_S: Final = 1.0


class SeriesKey(NamedTuple):
    """What identifies a series."""

    tenant: str
    name: str
    labels: tuple[tuple[str, str], ...]
    kind: int
    unit: str


@dataclass(slots=True)
class _Batch:
    """A message's content; kept until it is acknowledged."""

    sequence: int
    time_s: float
    rows: list[tuple[SeriesKey, float, int]] = field(default_factory=list)


class Reporter:
    """Buffers measurements and sends them every second; never blocks or fails its caller.

    Counters are added up and equal observations counted together until they are sent. A message
    that was not acknowledged is sent again with its sequence number after a reconnect, so none is
    lost or counted twice.
    """

    def __init__(
        self,
        channel: Callable[[], Awaitable[grpc.aio.Channel]],
        metadata: Callable[[], Sequence[tuple[str, str]]],
        *,
        reporter_id: str = "",
    ) -> None:
        """Makes a reporter; its task begins with the first measurement.

        Args:
            channel: gives a channel to the metrics service.
            metadata: gives the stream's metadata.
            reporter_id: names this process; empty: a random one.
        """
        self._channel = channel
        self._metadata = metadata
        self.reporter_id = reporter_id or uuid.uuid4().hex
        self._sums: dict[SeriesKey, float] = {}
        self._gauges: dict[SeriesKey, float] = {}
        self._observed: dict[tuple[SeriesKey, float], int] = {}
        self._unacknowledged: deque[_Batch] = deque()
        self._sequence = 0
        self._task: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()
        self._hurry = asyncio.Event()
        self._closing = False
        self.dropped = 0
        """Measurements that were given up because the service was away for too long."""
        self.rejected = 0
        """Measurements that the service refused."""

    def count(self, key: SeriesKey, value: float) -> None:
        """Adds to a counter."""
        self._sums[key] = self._sums.get(key, 0.0) + value
        if self._task is None:
            self._begin()

    def gauge(self, key: SeriesKey, value: float) -> None:
        """Sets a gauge."""
        self._gauges[key] = value
        if self._task is None:
            self._begin()

    def observe(self, key: SeriesKey, value: float, count: int) -> None:
        """Adds observations of one value to a distribution."""
        row = (key, value)
        known = self._observed.get(row)
        if known is None and len(self._observed) >= _MAX_ROWS:
            self.dropped += count
            return
        self._observed[row] = (known or 0) + count
        if self._task is None:
            self._begin()

    async def flush(self) -> None:
        """Sends what is buffered and waits until it is durable."""
        self._gather()
        while self._unacknowledged and self._task is not None and not self._task.done():
            self._hurry.set()
            self._progress.clear()
            await self._progress.wait()

    async def close(self, grace_s: float = 1.0) -> None:
        """Sends what is left, for ``grace_s`` at most and while the service answers, and ends."""
        if self._task is None:
            return
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self.flush()
        self.dropped += sum(len(batch.rows) for batch in self._unacknowledged)
        self._task.cancel()
        await asyncio.wait((self._task,))
        self._task = None
        self._closing = False

    # ---------------------------------------------------------------- sending

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(
            self._run(), context=contextvars.Context()
        )

    def _gather(self) -> None:
        """Turns the buffer into a message to send."""
        if not (self._sums or self._gauges or self._observed):
            return
        self._sequence += 1
        batch = _Batch(self._sequence, time.time())
        batch.rows += [(key, value, 1) for key, value in self._sums.items()]
        batch.rows += [(key, value, 1) for key, value in self._gauges.items()]
        batch.rows += [(key, value, count) for (key, value), count in self._observed.items()]
        self._sums, self._gauges, self._observed = {}, {}, {}
        self._unacknowledged.append(batch)
        while len(self._unacknowledged) > MAX_UNACKNOWLEDGED:
            self.dropped += len(self._unacknowledged.popleft().rows)

    async def _run(self) -> None:
        while True:
            await self._pause(FLUSH_EVERY_S)
            self._gather()
            if not self._unacknowledged:
                continue
            try:
                await self._session()
            except (grpc.RpcError, OSError, asyncio.InvalidStateError, MeshError):
                if self._closing:
                    self._progress.set()
                    return
                await self._pause(_BACKOFF_S)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        self._hurry.clear()

    async def _session(self) -> None:
        """Sends over one stream until it is drained or breaks."""
        channel = await self._channel()
        rpc: Any = channel.stream_stream(
            "/agent360.metrics.v1.MetricsService/Report",
            request_serializer=metrics_pb2.ReportRequest.SerializeToString,
            response_deserializer=metrics_pb2.ReportResponse.FromString,
        )
        call = rpc(metadata=self._metadata())
        refs: dict[SeriesKey, int] = {}
        sent = 0
        # It reads at all times: a call with an unread message would never quite end.
        reader = asyncio.create_task(self._read(call))
        reader.add_done_callback(lambda _: self._hurry.set())
        try:
            while not reader.done():
                waiting = [batch for batch in self._unacknowledged if batch.sequence > sent]
                for batch in waiting:
                    await call.write(self._message(batch, refs))
                    sent = batch.sequence
                await self._pause(FLUSH_EVERY_S)
                self._gather()
            await reader
        finally:
            call.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, call: Any) -> None:
        """Takes acknowledgements until the stream ends or is drained."""
        while (response := await call.read()) is not grpc.aio.EOF:
            self.rejected += response.rejected
            waiting = self._unacknowledged
            while waiting and waiting[0].sequence <= response.acknowledged:
                waiting.popleft()
            self._progress.set()
            if response.drain:
                await call.done_writing()

    def _message(self, batch: _Batch, refs: dict[SeriesKey, int]) -> Any:
        message = metrics_pb2.ReportRequest(reporter_id=self.reporter_id, sequence=batch.sequence)
        message.base_time.FromNanoseconds(int(batch.time_s * 1e9))
        for key, value, count in batch.rows:
            ref = refs.get(key)
            if ref is None:
                ref = refs[key] = len(refs) + 1
                definition = message.definitions.add(ref=ref, tenant=key.tenant)
                series = definition.series
                series.name, series.kind, series.unit = key.name, key.kind, key.unit  # type: ignore[assignment]  # an enum's number
                series.labels.update(dict(key.labels))
            message.refs.append(ref)
            message.values.append(value)
            message.counts.append(count)
        return message
