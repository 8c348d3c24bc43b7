"""A session: one open Pipeline stream, and what is in flight on it."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc

from agent360.client.errors import InvalidRequestError, MeshError, Violation, from_rpc_error
from agent360.client.operation import Facts, Operation


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one message and one stream may hold."""

    message_items: int = 1_000
    """Items in one message of many calls made at once."""
    coalesced_items: int = 128
    """Calls of different tasks in one message, at most half of all that are under way: while one
    message is worked on, the next is on its way; larger messages make the two ends wait for each
    other (docs/performance.md)."""
    message_bytes: int = 2**20
    """About the bytes of one message; a larger item goes by the unary form."""
    in_flight: int = 10_000
    """Items of one service that wait for an answer; more callers wait their turn."""


class Session:
    """One stream. A lane opens the next when this one is drained or breaks.

    Invariant: ``open`` holds by id what was written and has no final answer.
    """

    def __init__(
        self,
        call: Any,
        pending: deque[Operation],
        request_class: type[Any],
        bounds: Bounds,
        *,
        on_answer: Callable[[], None],
    ) -> None:
        """Begins a session.

        Args:
            call: the open stream-stream call.
            pending: what the lane has to write; shared with the lane.
            request_class: the service's PipelineRequest.
            bounds: of messages.
            on_answer: told after each message of answers.
        """
        self._call = call
        self._pending = pending
        self._request_class = request_class
        self._bounds = bounds
        self._on_answer = on_answer
        self._loop = asyncio.get_running_loop()
        self.open: dict[int, Operation] = {}
        self._next_id = 1
        self._cancels: list[int] = []
        self._credits: dict[int, int] = {}
        self._wake = asyncio.Event()
        self.answered = False
        """Whether the service has answered anything on it."""
        self.superseded = asyncio.Event()
        """Set when no more operations are written to it."""
        self._closing = False

    def wake(self) -> None:
        """There is something to write."""
        self._wake.set()

    def withdraw(self, operation: Operation) -> None:
        """Tells the service that nobody waits for an operation any more."""
        for item_id in operation.ids():
            # The id may be another operation's here: each stream counts its own.
            if self.open.get(item_id) is operation:
                del self.open[item_id]
                self._cancels.append(item_id)
        self._wake.set()

    def give_credit(self, item_id: int, chunks: int) -> None:
        """Lets the service send more of a streamed answer."""
        if item_id in self.open:
            self._credits[item_id] = self._credits.get(item_id, 0) + chunks
            self._wake.set()

    def close(self) -> None:
        """Writes no more operations; ends when what is open is answered."""
        self._closing = True
        self.superseded.set()
        self._wake.set()

    async def run(self) -> MeshError | None:
        """Serves until the stream ends; returns why, or None if it ended in order."""
        writer = asyncio.create_task(self._write())
        try:
            return await self._read()
        finally:
            writer.cancel()
            await asyncio.wait((writer,))
            self.superseded.set()

    # ---------------------------------------------------------------- reading

    async def _read(self) -> MeshError | None:
        read, still_open = self._call.read, self.open
        try:
            while True:
                message = await read()
                if message is grpc.aio.EOF:
                    break
                self.answered = True
                for result in message.results:
                    item_id = result.id
                    operation = still_open.pop(item_id, None)
                    if operation is not None and operation.answered(result):
                        still_open[item_id] = operation
                if message.HasField("drain"):
                    self.close()
                if self._closing and not still_open:
                    self._wake.set()
                self._on_answer()
        except grpc.RpcError as error:
            return from_rpc_error(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
        return None

    # ---------------------------------------------------------------- writing

    async def _write(self) -> None:
        """Writes what waits; what comes while a message is being written goes out in the next."""
        call = self._call
        try:
            # What is taken from ``pending`` after this may have left; before, nothing has.
            await call.wait_for_connection()
            while True:
                await self._wake.wait()
                message = self._gather()
                if message is None:
                    if self._closing and not self.open:
                        await call.done_writing()
                        return
                    self._wake.clear()
                    continue
                await call.write(message)
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # the reader learns why

    def _gather(self) -> Any:
        """The next message; None if there is nothing to say."""
        message = self._request_class()
        said = False
        if not self._closing and self._pending:
            said = self._gather_operations(message)
        if self._cancels:
            message.cancels.extend(self._cancels)
            self._cancels.clear()
            said = True
        if self._credits:
            for item_id, chunks in self._credits.items():
                message.credits.add(id=item_id, chunks=chunks)
            self._credits.clear()
            said = True
        return message if said else None

    def _gather_operations(self, message: Any) -> bool:
        pending, bounds, still_open = self._pending, self._bounds, self.open
        now = self._loop.time()
        shared: Facts | None = None
        shared_timeout = 0.0
        count = size = 0
        counting: list[Operation] = []
        ids: list[int] = []
        # Two messages under way at a time keep both ends at work; one makes them take turns.
        half = (len(pending) + len(still_open)) // 2
        coalesced = min(bounds.coalesced_items, max(_LEAST_COALESCED, half))
        while pending:
            operation = pending[0]
            if operation.ended:
                pending.popleft()
                continue
            items = operation.item_count
            most = bounds.message_items if items > 1 else coalesced
            if count and (
                count + items > most or size + operation.size_bytes > bounds.message_bytes
            ):
                break
            pending.popleft()
            timeout = wire_timeout(operation.deadline - now)
            own_context = False
            if shared is None:
                shared, shared_timeout = operation.facts, timeout
                write_context(message.context, shared, timeout)
            elif timeout != shared_timeout or (
                operation.facts is not shared and operation.facts != shared
            ):
                own_context = True
            if not self._written(operation, message, count, ids):
                continue
            if own_context:
                for position in range(count, count + items):
                    write_context(message.items[position].context, operation.facts, timeout)
            self._next_id += items
            count += items
            size += operation.size_bytes
            if operation.counts_batch:
                counting.append(operation)
            if items == 1:
                still_open[ids[0]] = operation
            else:
                still_open.update(dict.fromkeys(ids, operation))
            ids.clear()
        for operation in counting:
            operation.batch_size = count
        return count > 0

    def _written(self, operation: Operation, message: Any, count: int, ids: list[int]) -> bool:
        """Adds an operation's items to a message that has ``count``; False: one is not fit for it.

        Such an item fails for itself; what is left of its operation is tried again.
        """
        try:
            operation.write(message.items.add, self._next_id, ids)
        except Exception as error:  # noqa: BLE001 - it is the item's caller's alone
            del message.items[count:]
            ids.clear()
            operation.refuse(_unwritable(error))
            if not operation.ended:
                self._pending.appendleft(operation)
            return False
        return True


def _unwritable(error: Exception) -> InvalidRequestError:
    """The error of a request that has something in it which its message cannot hold."""
    return InvalidRequestError([Violation("request", f"cannot be written: {error}")])


_LEAST_COALESCED: Final = 24
"""Calls that go out together whatever is under way: a message of fewer costs more than it gains."""

_STEPS: Final = ((1.0, 0.1), (0.1, 0.01), (0.0, 0.001))


def wire_timeout(remaining_s: float) -> float:
    """What remains of a timeout, rounded up by at most 10% so that items can share a context.

    The caller itself stops waiting at the exact time.
    """
    for bound, step in _STEPS:
        if remaining_s > bound:
            return math.ceil(remaining_s / step) * step
    return 0.001


def write_context(context: Any, facts: Facts, timeout_s: float) -> None:
    """Fills a CallContext in place."""
    tenant, priority, traceparent, request_id = facts
    context.tenant = tenant
    if priority:
        context.priority = priority
    if traceparent:
        context.traceparent = traceparent
    if request_id:
        context.request_id = request_id
    if timeout_s < math.inf:
        whole = int(timeout_s)
        timeout = context.timeout
        timeout.seconds = whole
        timeout.nanos = int((timeout_s - whole) * 1e9)
