"""Reports measurements in the background, over one stream, until each is acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
import uuid
from array import array
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final, NamedTuple

import grpc

from agent360.client.errors import MeshError
from agent360.metrics.v1 import metrics_pb2

FLUSH_EVERY_S: Final = 1.0
"""How often what was measured is sent."""

MAX_BUFFERED: Final = 1_000_000
"""Values kept until they are acknowledged; the oldest beyond that are dropped and counted."""

DROPPED: Final = "mesh_dropped_samples"
"""Counter of each tenant: measurements of it that were given up by its reporters."""

_MESSAGE_ROWS: Final = 10_000
_MESSAGE_SERIES: Final = 500
_SOON_ROWS: Final = 50_000
_MAX_KNOWN: Final = 20_000
_MAX_REFS: Final = 500_000
_MAX_COUNT: Final = 2**32 - 1
_BACKOFF_S: Final = 1.0
_NAMED_REJECTIONS: Final = 10
_NEVER_TAKEN: Final = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)


class SeriesKey(NamedTuple):
    """What identifies a series."""

    tenant: str
    name: str
    labels: tuple[tuple[str, str], ...]
    """In the order in which the caller gave them."""
    kind: int
    unit: str


class Series:
    """What was measured of one series since it was last gathered."""

    __slots__ = ("counts", "key", "total", "values", "waits")

    def __init__(self, key: SeriesKey) -> None:
        self.key = key
        self.values: list[float] = []
        """Observations, or the last value of a gauge."""
        self.counts: dict[float, int] = {}
        """Observations that were given with a count, by value."""
        self.total = 0.0
        """The increase of a counter."""
        self.waits = False
        """Whether there is something to gather."""

    def gather(self) -> tuple[array[float], array[int]]:
        """Takes what was measured: values, and how many observations had each."""
        values, counts, total = self.values, self.counts, self.total
        self.values, self.counts, self.total, self.waits = [], {}, 0.0, False
        if self.key.kind == metrics_pb2.SERIES_KIND_COUNTER:
            return array("d", (total,)), array("I", (1,))
        if values:
            for value, count in Counter(values).items():
                counts[value] = counts.get(value, 0) + count
        return array("d", counts), array("I", (min(n, _MAX_COUNT) for n in counts.values()))


@dataclass(frozen=True, slots=True)
class _Batch:
    """A message's content; kept until it is acknowledged."""

    sequence: int
    time_s: float
    columns: list[tuple[SeriesKey, array[float], array[int]]]
    rows: int


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
            reporter_id: names this process to people; something random is added to it, because
                sequence numbers begin anew with each reporter.
        """
        self._channel = channel
        self._metadata = metadata
        self.reporter_id = "-".join(filter(None, (reporter_id[:90], uuid.uuid4().hex)))
        self._known: dict[SeriesKey, Series] = {}
        self._waiting: list[Series] = []
        self._buffered = 0
        self._unacknowledged: deque[_Batch] = deque()
        self._unacknowledged_rows = 0
        self._sequence = 0
        self._task: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()
        self._hurry = asyncio.Event()
        self._closing = False
        self.dropped = 0
        """Values that were given up because the service was away for too long."""
        self.rejected = 0
        """Values that the service refused."""
        self.rejections: deque[str] = deque(maxlen=_NAMED_REJECTIONS)
        """Why, for the last few that it named."""

    def series(
        self, tenant: str, name: str, labels: tuple[tuple[str, str], ...], kind: int, unit: str
    ) -> Series:
        """Where measurements of a series are buffered."""
        # A tuple is found under an equal SeriesKey, and takes a third of the time to make.
        found = self._known.get((tenant, name, labels, kind, unit))  # type: ignore[call-overload]
        return found or self._make_series(SeriesKey(tenant, name, labels, kind, unit))

    def count(self, series: Series, value: float) -> None:
        """Adds to a counter."""
        series.total += value
        if not series.waits:
            self._await_gathering(series)

    def gauge(self, series: Series, value: float) -> None:
        """Sets a gauge."""
        series.values = [value + 0.0]
        if not series.waits:
            self._await_gathering(series)

    def observe(self, series: Series, value: float, count: int) -> None:
        """Adds observations of one value to a distribution."""
        if count == 1:
            series.values.append(value + 0.0)  # what is not a number fails here, not later
        else:
            series.counts[value + 0.0] = series.counts.get(value, 0) + count
        self._buffered += 1
        if not series.waits or self._buffered >= _SOON_ROWS:
            self._await_gathering(series)

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
        self.dropped += self._unacknowledged_rows
        self._task.cancel()
        await asyncio.wait((self._task,))
        self._task = None
        self._closing = False

    # ---------------------------------------------------------------- sending

    def _make_series(self, key: SeriesKey) -> Series:
        if len(self._known) >= _MAX_KNOWN:
            self._known = {known.key: known for known in self._waiting}
        labels = tuple((str(label), str(value)) for label, value in key.labels)
        sent = key._replace(labels=labels)
        # What cannot be written fails here, where it was given, and not in the background.
        "".join((key.tenant, key.name, key.unit, *map("".join, labels))).encode()
        made = self._known[key] = Series(sent)
        return made

    def _await_gathering(self, series: Series) -> None:
        """Notes that a series has something; gathers at once where much is buffered."""
        if not series.waits:
            series.waits = True
            self._waiting.append(series)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(
                self._run(), context=contextvars.Context()
            )
        if self._buffered >= _SOON_ROWS:
            self._gather()
            self._hurry.set()

    def _gather(self) -> None:
        """Turns the buffer into messages to send."""
        waiting, self._waiting, self._buffered = self._waiting, [], 0
        time_s = time.time()
        columns: list[tuple[SeriesKey, array[float], array[int]]] = []
        rows = 0
        for series in waiting:
            values, counts = series.gather()
            for begin in range(0, len(values), _MESSAGE_ROWS):
                part = values[begin : begin + _MESSAGE_ROWS]
                if rows + len(part) > _MESSAGE_ROWS or len(columns) >= _MESSAGE_SERIES:
                    self._enqueue(time_s, columns, rows)
                    columns, rows = [], 0
                columns.append((series.key, part, counts[begin : begin + _MESSAGE_ROWS]))
                rows += len(part)
        if rows:
            self._enqueue(time_s, columns, rows)
        while self._unacknowledged_rows > MAX_BUFFERED:
            self._drop_oldest()

    def _enqueue(
        self, time_s: float, columns: list[tuple[SeriesKey, array[float], array[int]]], rows: int
    ) -> None:
        self._sequence += 1
        self._unacknowledged.append(_Batch(self._sequence, time_s, columns, rows))
        self._unacknowledged_rows += rows

    def _drop_oldest(self) -> None:
        """Gives up a message; its tenants' counters of such are increased."""
        batch = self._unacknowledged.popleft()
        self._unacknowledged_rows -= batch.rows
        self.dropped += batch.rows
        for key, values, _ in batch.columns:
            if key.name != DROPPED:
                counter = metrics_pb2.SERIES_KIND_COUNTER
                lost = self.series(key.tenant, DROPPED, (), counter, "1")
                self.count(lost, float(len(values)))

    async def _run(self) -> None:
        while True:
            await self._pause(FLUSH_EVERY_S)
            self._gather()
            if not self._unacknowledged:
                continue
            try:
                await self._session()
            except (grpc.RpcError, OSError, asyncio.InvalidStateError, MeshError) as error:
                self._give_up_refused(error)
                if self._closing:
                    self._progress.set()
                    return
                await self._pause(_BACKOFF_S)

    def _give_up_refused(self, error: Exception) -> None:
        """Drops a message that the service will never take: the first it has not acknowledged."""
        refused = isinstance(error, grpc.RpcError) and error.code() in _NEVER_TAKEN
        if refused and self._unacknowledged:
            self._drop_oldest()
            self._progress.set()

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
            while not reader.done() and len(refs) < _MAX_REFS:
                waiting = [batch for batch in self._unacknowledged if batch.sequence > sent]
                for batch in waiting:
                    await call.write(self._message(batch, refs))
                    sent = batch.sequence
                await self._pause(FLUSH_EVERY_S)
                self._gather()
            if reader.done():
                await reader
        finally:
            call.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, call: Any) -> None:
        """Takes acknowledgements until the stream ends or is drained."""
        while (response := await call.read()) is not grpc.aio.EOF:
            self.rejected += response.rejected
            self.rejections.extend(response.rejections)
            waiting = self._unacknowledged
            while waiting and waiting[0].sequence <= response.acknowledged:
                self._unacknowledged_rows -= waiting.popleft().rows
            self._progress.set()
            if response.drain:
                await call.done_writing()

    def _message(self, batch: _Batch, refs: dict[SeriesKey, int]) -> Any:
        message = metrics_pb2.ReportRequest(reporter_id=self.reporter_id, sequence=batch.sequence)
        message.base_time.FromNanoseconds(int(batch.time_s * 1e9))
        for key, values, counts in batch.columns:
            ref = refs.get(key)
            if ref is None:
                ref = refs[key] = len(refs) + 1
                definition = message.definitions.add(ref=ref, tenant=key.tenant)
                series = definition.series
                series.name, series.kind, series.unit = key.name, key.kind, key.unit  # type: ignore[assignment]  # an enum's number
                series.labels.update(dict(key.labels))
            message.refs.extend(repeat(ref, len(values)))
            message.values.extend(values)
            message.counts.extend(counts)
        return message
