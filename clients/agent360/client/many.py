"""Many calls at once: split into messages, answered as they come, with their indexes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar

from agent360.client.coalescer import Coalescer
from agent360.client.errors import MeshError
from agent360.client.operation import ManyOperation

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
        self._requests: Iterator[tuple[int, R]] = enumerate(requests)
        self._fill = fill
        self._read = read
        self._size = size
        self._repeatable = repeatable
        self._timeout = timeout
        self._tenant = tenant
        self._ready: deque[tuple[int, T | MeshError]] = deque()
        self._outstanding = 0
        self._operations: list[ManyOperation[R, T]] = []
        self._held: tuple[int, R] | None = None
        self._exhausted = False
        self._waiter: asyncio.Future[None] | None = None

    async def __aiter__(self) -> AsyncIterator[tuple[int, T | MeshError]]:
        """Yields each result with the index of its request, in the order they arrive."""
        ready = self._ready
        try:
            while True:
                await self._send_more()
                while ready:
                    taken = len(ready)
                    for _ in range(taken):
                        yield ready.popleft()
                    self._answered(taken)
                if self._outstanding:
                    await self._wait()
                elif self._exhausted:
                    return
        finally:
            self._withdraw()

    def __await__(self) -> Generator[Any, None, list[T | MeshError]]:
        """All results in the order of the requests."""
        return self._gather().__await__()

    async def _gather(self) -> list[T | MeshError]:
        found: dict[int, T | MeshError] = {}
        try:
            while True:
                await self._send_more()
                while self._ready:
                    taken = len(self._ready)
                    found.update(self._ready)
                    self._ready.clear()
                    self._answered(taken)
                    await self._send_more()
                if self._outstanding:
                    await self._wait()
                elif self._exhausted:
                    break
        finally:
            self._withdraw()
        return [found[index] for index in range(len(found))]

    async def _send_more(self) -> None:
        """Sends messages of calls as long as two are not yet waiting for answers."""
        bounds = self._coalescer.bounds
        window = min(2 * bounds.message_items, bounds.in_flight)
        while not self._exhausted and self._outstanding < window:
            chunk, size = self._next_chunk()
            if not chunk:
                return
            operation = ManyOperation(
                self._field,
                chunk,
                fill=self._fill,
                read=self._read,
                sink=self._take,
                repeatable=self._repeatable,
                size_bytes=size,
            )
            self._coalescer.prepare(operation, self._timeout, self._tenant)
            await self._coalescer.take_turn(operation.deadline)
            self._outstanding += len(chunk)
            self._coalescer.note_in_flight(len(chunk))
            self._operations = [each for each in self._operations if not each.ended]
            self._operations.append(operation)
            self._coalescer.dispatch(operation)

    def _next_chunk(self) -> tuple[list[tuple[int, R]], int]:
        bounds = self._coalescer.bounds
        chunk: list[tuple[int, R]] = []
        total = 0
        if self._held is not None:
            chunk.append(self._held)
            total = self._size_of(self._held[1])
            self._held = None
        for numbered in self._requests:
            size = self._size_of(numbered[1])
            if chunk and total + size > bounds.message_bytes:
                self._held = numbered
                return chunk, total
            chunk.append(numbered)
            total += size
            if len(chunk) == bounds.message_items:
                return chunk, total
        self._exhausted = True
        return chunk, total

    def _size_of(self, request: R) -> int:
        return _ITEM_OVERHEAD_BYTES + (self._size(request) if self._size is not None else 0)

    def _take(self, numbered: tuple[int, T | MeshError]) -> None:
        self._ready.append(numbered)
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def _answered(self, count: int) -> None:
        self._outstanding -= count
        self._coalescer.note_in_flight(-count)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _withdraw(self) -> None:
        """Tells the service that the rest is not wanted, if any is left."""
        for operation in self._operations:
            if not operation.ended:
                self._coalescer.withdraw(operation)
                operation.withdraw()
        if self._outstanding:
            self._answered(self._outstanding)
