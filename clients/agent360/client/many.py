"""Many calls at once: split into messages, answered as they come, with their indexes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from contextlib import aclosing
from itertools import chain, islice
from typing import Any, Generic, TypeVar

from agent360.client.coalescer import Coalescer
from agent360.client.errors import MeshError
from agent360.client.operation import ManyOperation, Sink

R = TypeVar("R")
T = TypeVar("T")

_ITEM_OVERHEAD_BYTES = 64


class Results(Generic[T]):
    """The results of many calls, each with the index of its request.

    A failed call gives a MeshError in the place of a result: it says nothing about the others.
    Requests are taken from their iterable as results are consumed, so it may be endless.

    Example:
        >>> async for index, lookup in mesh.cache.get_many(keys):
        ...     print(keys[index], lookup)
        >>> lookups = await mesh.cache.get_many(keys)  # all, in the order of the requests
    """

    def __init__(
        self,
        coalescer: Coalescer,
        field: str,
        requests: Iterable[R],
        *,
        fill: Callable[[Any, R], None],
        read: Callable[[Any], T],
        size: Callable[[R], int] | None = None,
        repeatable: bool = True,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> None:
        """Prepares the calls; nothing is sent before the results are asked for.

        Args:
            coalescer: of the service.
            field: field of the operation in PipelineItem.
            requests: one for each call.
            fill: fills a request message in place.
            read: turns a response message into a result.
            size: about the bytes of a request; None: all are small.
            repeatable: whether sending a call again is harmless.
            timeout: seconds for each message of calls.
            tenant: on whose behalf.
        """
        self._coalescer = coalescer
        self._field = field
        self._requests: Iterator[Any] = iter(requests)
        self._fill = fill
        self._read = read
        self._size = size
        self._repeatable = repeatable
        self._timeout = timeout
        self._tenant = tenant
        self._sink: Sink[Any, T] = Sink()
        self._sent = 0
        self._outstanding = 0
        self._operations: list[ManyOperation[Any, T]] = []
        self._held: list[Any] = []
        self._exhausted = False

    async def __aiter__(self) -> AsyncGenerator[tuple[int, T | MeshError], None]:
        """Yields each result with the index of its request, in the order they arrive."""
        async with aclosing(self.batches()) as batches:
            async for batch in batches:
                for each in batch:
                    yield each

    async def batches(self) -> AsyncGenerator[list[tuple[int, T | MeshError]], None]:
        """Yields what has arrived since the last time, at least one result at a time."""
        try:
            while await self._arrived():
                for operation in self._take_ready():
                    first, values = operation.first_index, operation.values
                    arrived, operation.arrived = operation.arrived, []
                    yield [(first + position, values[position]) for position in arrived]
                    self._outstanding -= len(arrived)
        finally:
            self._withdraw()

    def __await__(self) -> Generator[Any, None, list[T | MeshError]]:
        """All results in the order of the requests."""
        return self._gather().__await__()

    async def _gather(self) -> list[T | MeshError]:
        # Results stay in their operations until the end: no index has to be kept with each.
        operations: list[ManyOperation[Any, T]] = []
        try:
            while await self._arrived(operations):
                for operation in self._take_ready():
                    self._outstanding -= len(operation.arrived)
                    operation.arrived.clear()
        finally:
            self._withdraw()
        return list(chain.from_iterable(operation.values for operation in operations))

    async def _arrived(self, sent: list[ManyOperation[Any, T]] | None = None) -> bool:
        """Sends what may be sent and waits for results; False when all have been taken."""
        while True:
            await self._send_more(sent)
            if self._sink.ready:
                return True
            if self._outstanding:
                await self._sink.wait()
            elif self._exhausted:
                return False

    def _take_ready(self) -> list[ManyOperation[Any, T]]:
        sink = self._sink
        ready, sink.ready = sink.ready, []
        return ready

    async def _send_more(self, sent: list[ManyOperation[Any, T]] | None) -> None:
        """Sends messages of calls as long as two are not yet waiting for answers.

        Waits for its turn only while there is nothing of its own to wait for or to hand out.
        """
        coalescer = self._coalescer
        bounds = coalescer.bounds
        window = min(2 * bounds.message_items, bounds.in_flight)
        while not self._exhausted and self._outstanding < window:
            if self._outstanding and coalescer.full:
                return
            chunk, size = self._next_chunk()
            if not chunk:
                return
            operation = ManyOperation(
                self._field,
                self._sent,
                chunk,
                fill=self._fill,
                read=self._read,
                sink=self._sink,
                on_end=coalescer.note_ended,
                repeatable=self._repeatable,
                size_bytes=size,
            )
            coalescer.prepare(operation, self._timeout, self._tenant)
            await coalescer.take_turn(operation.deadline, len(chunk))
            self._sent += len(chunk)
            self._outstanding += len(chunk)
            self._operations = [each for each in self._operations if not each.ended]
            self._operations.append(operation)
            if sent is not None:
                sent.append(operation)
            coalescer.dispatch(operation)

    def _next_chunk(self) -> tuple[list[Any], int]:
        """The requests of the next message and about their bytes."""
        bounds = self._coalescer.bounds
        if self._size is None:
            small = list(islice(self._requests, bounds.message_items))
            self._exhausted = len(small) < bounds.message_items
            return small, _ITEM_OVERHEAD_BYTES * len(small)
        chunk: list[Any] = []
        total = 0
        for request in chain(self._held, self._requests):
            size = _ITEM_OVERHEAD_BYTES + self._size(request)
            if chunk and total + size > bounds.message_bytes:
                self._held = [request]
                return chunk, total
            chunk.append(request)
            total += size
            if len(chunk) == bounds.message_items:
                self._held = []
                return chunk, total
        self._exhausted = True
        return chunk, total

    def _withdraw(self) -> None:
        """Tells the service that the rest is not wanted, if any is left."""
        for operation in self._operations:
            if not operation.ended:
                self._coalescer.withdraw(operation)
                operation.withdraw()
