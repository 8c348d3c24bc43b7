"""The Report stream: reads messages of samples, acknowledges each once it is durable."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, NamedTuple

import numpy as np

from agent360.mesh.metrics.bins import Ints
from agent360.mesh.metrics.frame import Columns
from agent360.mesh.metrics.intake import Intake
from agent360.mesh.metrics.naming import admit
from agent360.mesh.metrics.ports import Mark
from agent360.mesh.metrics.rejections import Reason, Refused, Rejections
from agent360.mesh.metrics.series import Kind
from agent360.mesh.metrics.series_table import SeriesTable
from agent360.mesh.runtime.call import Call
from agent360.mesh.runtime.validation import TENANT_PATTERN, TENANT_RULE, Violations
from agent360.metrics.v1 import metrics_pb2

MAX_REF: Final = 1 << 20
"""References are below this: they are places in an array."""

_WINDOW: Final = 256
_NAMED_REJECTIONS: Final = 10
_NOT_INTRODUCED: Final = -1
_CAUSES: Final = 5
_DEFINITIONS_AT_ONCE: Final = 256
"""Definitions that are read before others have their turn on the event loop."""
_MAX_REFUSALS: Final = 20_000
"""Series of a stream whose refusal is told apart; further ones are told the last reason."""


class AcceptedTimes(NamedTuple):
    """Which samples are neither too old nor in the future, in seconds around now."""

    late_s: float
    early_s: float


class ReportReader:
    """Reads the messages of one Report stream; knows the series they introduced."""

    def __init__(
        self,
        call: Call,
        table: SeriesTable,
        times: AcceptedTimes,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._call = call
        self._table = table
        self._times = times
        self._now = now
        self._numbers = np.full(64, _NOT_INTRODUCED, np.int64)
        self._refusals: list[Refused] = []
        self.reporter_id = ""
        """Whose messages these are, once there was one."""

    async def read(self, request: Any) -> tuple[Columns, list[Refused]]:
        """The samples of a message, and why others are refused.

        Raises:
            InvalidRequestError: the message as a whole is malformed.
        """
        size = len(request.refs)
        self._check(request, size)
        for place, definition in enumerate(request.definitions, 1):
            self._introduce(definition)
            if place % _DEFINITIONS_AT_ONCE == 0:
                await asyncio.sleep(0)
        now_s = self._now()
        base_s = request.base_time.ToNanoseconds() / 1e9 if request.HasField("base_time") else now_s
        values = np.array(request.values, np.float64)
        numbers = self._numbers_of(np.array(request.refs, np.int64))
        times_s = np.full(size, base_s)
        if len(request.offsets_ms):
            times_s += np.array(request.offsets_ms, np.float64) / 1e3
        weights = np.ones(size, np.int64)
        kinds = self._table.kinds_of(np.maximum(numbers, 0)) if size else np.zeros(0, np.uint8)
        if len(request.counts):
            counts = np.array(request.counts, np.int64)
            weights = np.where(kinds == Kind.DISTRIBUTION, counts, weights)
        columns = Columns(numbers, times_s, values, weights)
        bad = (numbers < 0) | ~np.isfinite(values) | ((kinds == Kind.COUNTER) & (values < 0))
        bad |= (times_s < now_s - self._times.late_s) | (times_s > now_s + self._times.early_s)
        bad |= weights <= 0
        if not bad.any():
            return columns, []
        refused = self._refused(Columns(*(column[bad] for column in columns)), now_s)
        return Columns(*(column[~bad] for column in columns)), refused

    def _check(self, request: Any, size: int) -> None:
        faults = Violations()
        faults.text("reporter_id", request.reporter_id, max_bytes=128)
        self.reporter_id = self.reporter_id or request.reporter_id
        same = request.reporter_id == self.reporter_id
        faults.require("reporter_id", same, "must be the same in all messages of a stream")
        faults.require("sequence", request.sequence > 0, "must be positive")
        for field in ("values", "offsets_ms", "counts"):
            length = len(getattr(request, field))
            optional = field != "values" and not length
            faults.require(field, optional or length == size, f"must have {size:,} elements")
        faults.time("base_time", request.base_time)
        refs_fit = all(definition.ref < MAX_REF for definition in request.definitions)
        faults.require("definitions.ref", refs_fit, f"must be below {MAX_REF:,}")
        faults.raise_if_any()

    def _numbers_of(self, refs: Ints) -> Ints:
        known = np.minimum(refs, len(self._numbers) - 1)
        return np.where(refs < len(self._numbers), self._numbers[known], _NOT_INTRODUCED)

    def _introduce(self, definition: Any) -> None:
        ref = definition.ref
        if ref >= len(self._numbers):
            room = np.full(2 * ref - len(self._numbers) + 1, _NOT_INTRODUCED, np.int64)
            self._numbers = np.concatenate((self._numbers, room))
        found = self._define(definition)
        if isinstance(found, Refused):
            if len(self._refusals) < _MAX_REFUSALS:
                self._refusals.append(found)
            else:
                self._refusals[-1] = found
            self._numbers[ref] = _NOT_INTRODUCED - len(self._refusals)
        else:
            self._numbers[ref] = found

    def _define(self, definition: Any) -> int | Refused:
        series, call = definition.series, self._call
        tenant = definition.tenant or call.tenant or call.principal.only_tenant
        name = series.name
        if TENANT_PATTERN.fullmatch(tenant) is None:
            return Refused(Reason.TENANT, f"{name[:128]}: tenant {TENANT_RULE}")
        if not call.principal.may_speak_for(tenant):
            text = f"{name[:128]}: the reporter may not speak for tenant {tenant}"
            return Refused(Reason.TENANT, text)
        return admit(self._table, tenant, name, dict(series.labels), series.kind, series.unit)

    def _refused(self, columns: Columns, now_s: float) -> list[Refused]:
        """Why these samples are refused: those of one series for one reason together."""
        times_s, numbers = columns.times_s, columns.series
        causes = np.select(
            [
                numbers < 0,
                times_s < now_s - self._times.late_s,
                times_s > now_s + self._times.early_s,
                columns.weights <= 0,
            ],
            list(range(_CAUSES - 1)),
            _CAUSES - 1,
        )
        keys, firsts, counts = np.unique(
            numbers * _CAUSES + causes, return_index=True, return_counts=True
        )
        order = np.argsort(firsts)
        found = zip(*(each[order].tolist() for each in (keys, firsts, counts)), strict=True)
        return [
            self._refusal(key // _CAUSES, key % _CAUSES, columns.values[first], count)
            for key, first, count in found
        ]

    def _refusal(self, number: int, cause: int, value: float, count: int) -> Refused:
        if number == _NOT_INTRODUCED:
            return Refused(Reason.SERIES, "a reference was not introduced", samples=count)
        if number < 0:
            return self._refusals[_NOT_INTRODUCED - number - 1]._replace(samples=count)
        series = self._table.all[number]
        reason, text = (
            (Reason.TIME, f"is older than {self._times.late_s:,.0f} s"),
            (Reason.TIME, f"is over {self._times.early_s:,.0f} s in the future"),
            (Reason.VALUE, "has a count of 0"),
            (Reason.VALUE, f"{value} is not a value of its kind"),
        )[cause - 1]
        return Refused(reason, f"{series.name}: {text}", series.tenant, count)


class _Sent(NamedTuple):
    """A message whose acknowledgement is due when it is durable."""

    sequence: int
    refused: list[Refused]
    durable: asyncio.Future[None]


class ReportService:
    """Answers Report streams.

    A reporter's messages are known by its principal, its id and their sequence numbers; the last
    number is made durable together with the samples.
    """

    def __init__(
        self,
        intake: Intake,
        table: SeriesTable,
        times: AcceptedTimes,
        rejections: Rejections,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._intake = intake
        self._table = table
        self._times = times
        self._rejections = rejections
        self._now = now
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Asks reporters to go on with a new stream."""
        self._draining.set()

    async def report(self, call: Call, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Takes messages of samples; acknowledges them in their order, several at once if it can.

        Reading goes on while earlier messages become durable, but not without bound.
        """
        sent: deque[_Sent] = deque()
        changed = asyncio.Event()
        room = asyncio.Semaphore(_WINDOW)
        reading = asyncio.create_task(self._read(call, requests, sent, changed, room))
        reading.add_done_callback(lambda _: changed.set())
        draining = asyncio.create_task(self._draining.wait())
        draining.add_done_callback(lambda _: changed.set())
        try:
            while True:
                await changed.wait()
                changed.clear()
                while sent:
                    if not sent[0].durable.done():
                        await asyncio.wait((sent[0].durable,))
                    yield self._acknowledgement(sent, room)
                if draining.done():
                    yield metrics_pb2.ReportResponse(drain=True)
                    return
                if reading.done():
                    reading.result()
                    return
        finally:
            reading.cancel()
            draining.cancel()
            await asyncio.wait((reading, draining))

    async def _read(
        self,
        call: Call,
        requests: AsyncIterator[Any],
        sent: deque[_Sent],
        changed: asyncio.Event,
        room: asyncio.Semaphore,
    ) -> None:
        reader = ReportReader(call, self._table, self._times, self._now)
        async for request in requests:
            await room.acquire()
            columns, refused = await reader.read(request)
            source = f"report/{call.principal.name}/{reader.reporter_id}"
            durable = await self._take(source, request.sequence, columns)
            if durable is None:
                refused = []
                durable = asyncio.ensure_future(self._intake.settled())
            self._rejections.add(refused)
            sent.append(_Sent(request.sequence, refused, durable))
            changed.set()

    async def _take(
        self, source: str, sequence: int, columns: Columns
    ) -> asyncio.Future[None] | None:
        """Takes a message's samples; None if they were taken before."""
        await self._intake.room()
        known = self._intake.marks.get(source)
        if known is not None and sequence <= int.from_bytes(known.value, "big"):
            return None
        mark = Mark(sequence.to_bytes(8, "big"), self._now())
        return self._intake.take(columns, {source: mark})

    def _acknowledgement(self, sent: deque[_Sent], room: asyncio.Semaphore) -> Any:
        """Acknowledges all messages that are durable; there is one."""
        refused: list[Refused] = []
        while sent and sent[0].durable.done():
            last = sent.popleft()
            last.durable.result()
            refused += last.refused
            room.release()
        return metrics_pb2.ReportResponse(
            acknowledged=last.sequence,
            rejected=sum(each.samples for each in refused),
            rejections=list(dict.fromkeys(str(each) for each in refused))[:_NAMED_REJECTIONS],
        )
