"""Operations: what the coalescer gathers into messages, and how their answers find back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from agent360.client.errors import MeshError, from_status

T = TypeVar("T")
R = TypeVar("R")


class Facts(NamedTuple):
    """The part of a call context that items of one message can share."""

    tenant: str
    priority: int
    traceparent: str
    request_id: str


class Operation(Protocol):
    """Something that becomes one or more items of a Pipeline message.

    Invariant: every item is answered, failed or withdrawn exactly once; what comes later for its
    id is dropped.
    """

    facts: Facts
    """Tenant and the like."""
    deadline: float
    """On the event loop's clock."""
    size_bytes: int
    """About what it takes in a message."""

    @property
    def repeatable(self) -> bool:
        """Whether sending it again after a broken stream is harmless."""

    @property
    def ended(self) -> bool:
        """Whether nobody waits any more."""

    @property
    def item_count(self) -> int:
        """How many items are still to be answered."""

    def write(self, add: Callable[[], Any], first_id: int, ids: list[int]) -> None:
        """Adds its items to a message, with ids from ``first_id``, and notes these in ``ids``."""

    def answered(self, result: Any) -> bool:
        """Takes a result; returns whether more results of the same id follow."""

    def fail(self, error: MeshError) -> None:
        """Ends with an error whatever of it is not answered yet."""

    def ids(self) -> Sequence[int]:
        """The ids it was last written with and that are not answered yet."""


class SingleOperation(Generic[T]):
    """One awaited call. A subclass writes the request and reads the answer of one method."""

    __slots__ = ("deadline", "facts", "future", "item_id", "size_bytes")

    field: str
    """Field of the operation in PipelineItem and of the outcome in PipelineResult."""
    repeatable: bool = True
    item_count: int = 1

    def __init__(self, size_bytes: int = 128) -> None:
        self.size_bytes = size_bytes
        self.item_id = 0
        self.facts: Facts
        self.deadline: float
        self.future: asyncio.Future[T]

    def fill(self, request: Any) -> None:
        """Fills the request message in place."""
        raise NotImplementedError

    def read(self, response: Any) -> T:
        """Turns the response message into the result."""
        raise NotImplementedError

    @property
    def ended(self) -> bool:
        """See ``Operation.ended``."""
        return self.future.done()

    def write(self, add: Callable[[], Any], first_id: int, ids: list[int]) -> None:
        """See ``Operation.write``."""
        item = add()
        item.id = self.item_id = first_id
        ids.append(first_id)
        request = getattr(item, self.field)
        request.SetInParent()
        self.fill(request)

    def answered(self, result: Any) -> bool:
        """See ``Operation.answered``."""
        future = self.future
        if not future.done():
            if result.HasField("error"):
                future.set_exception(from_status(result.error))
            else:
                future.set_result(self.read(getattr(result, self.field)))
        return False

    def fail(self, error: MeshError) -> None:
        """See ``Operation.fail``."""
        if not self.future.done():
            self.future.set_exception(error)

    def ids(self) -> Sequence[int]:
        """See ``Operation.ids``."""
        return (self.item_id,)


class ManyOperation(Generic[R, T]):
    """Up to one message full of calls of the same method, answered into a queue.

    Invariant: ``_pending`` holds the positions of the requests as last written, in the order of
    their ids; ``_answered`` marks those that have their result.
    """

    __slots__ = (
        "_answered",
        "_fill",
        "_first_id",
        "_first_index",
        "_left",
        "_pending",
        "_read",
        "_requests",
        "_sink",
        "deadline",
        "facts",
        "field",
        "repeatable",
        "size_bytes",
    )

    def __init__(
        self,
        field: str,
        first_index: int,
        requests: Sequence[R],
        *,
        fill: Callable[[Any, R], None],
        read: Callable[[Any], T],
        sink: Sink[T],
        repeatable: bool,
        size_bytes: int,
    ) -> None:
        """Makes the operation.

        Args:
            field: field of the operation in PipelineItem and of the outcome in PipelineResult.
            first_index: index of the first request; the others follow.
            requests: one for each call.
            fill: fills a request message in place.
            read: turns a response message into a result.
            sink: takes indexes with their results or errors, as they come.
            repeatable: whether sending calls again is harmless.
            size_bytes: about what all take in a message.
        """
        self.field = field
        self.facts: Facts
        self.deadline: float
        self.repeatable = repeatable
        self.size_bytes = size_bytes
        self._first_index = first_index
        self._requests = requests
        self._fill = fill
        self._read = read
        self._sink = sink
        self._answered = bytearray(len(requests))
        self._left = len(requests)
        self._pending: Sequence[int] = range(len(requests))
        self._first_id = 0

    @property
    def ended(self) -> bool:
        """See ``Operation.ended``."""
        return not self._left

    @property
    def item_count(self) -> int:
        """See ``Operation.item_count``."""
        return self._left

    def write(self, add: Callable[[], Any], first_id: int, ids: list[int]) -> None:
        """See ``Operation.write``."""
        field, fill, requests = self.field, self._fill, self._requests
        if self._left < len(self._pending):
            answered = self._answered
            self._pending = [position for position in self._pending if not answered[position]]
        self._first_id = item_id = first_id
        for position in self._pending:
            item = add()
            item.id = item_id
            item_id += 1
            message = getattr(item, field)
            message.SetInParent()
            fill(message, requests[position])
        ids.extend(range(first_id, item_id))

    def answered(self, result: Any) -> bool:
        """See ``Operation.answered``."""
        position = self._pending[result.id - self._first_id]
        if self._left and not self._answered[position]:
            self._answered[position] = 1
            self._left -= 1
            if result.HasField("error"):
                value: T | MeshError = from_status(result.error)
            else:
                value = self._read(getattr(result, self.field))
            sink = self._sink
            sink.ready.append((self._first_index + position, value))
            if sink.waiter is not None:
                sink.wake()
        return False

    def fail(self, error: MeshError) -> None:
        """See ``Operation.fail``."""
        for position, answered in enumerate(self._answered):
            if not answered:
                self._sink.ready.append((self._first_index + position, error))
        self._left = 0
        self._sink.wake()

    def withdraw(self) -> None:
        """Nobody waits for the rest any more."""
        self._left = 0

    def ids(self) -> Sequence[int]:
        """See ``Operation.ids``."""
        first, answered = self._first_id, self._answered
        return [
            first + offset
            for offset, position in enumerate(self._pending)
            if first and not answered[position]
        ]


class Sink(Generic[T]):
    """Where results of many calls wait for their reader."""

    __slots__ = ("ready", "waiter")

    def __init__(self) -> None:
        self.ready: deque[tuple[int, T | MeshError]] = deque()
        """Indexes with their results or errors, as they came."""
        self.waiter: asyncio.Future[None] | None = None
        """Set while the reader waits."""

    def wake(self) -> None:
        """Tells the reader that there is something."""
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        """Waits until there is something."""
        if not self.ready:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
