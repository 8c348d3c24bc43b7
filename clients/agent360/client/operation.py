"""Operations: what the coalescer gathers into messages, and how their answers find back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

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
    counts_batch: bool
    """Whether it wants to know ``batch_size``."""
    batch_size: int
    """Items of the message that it was last written with, its own included."""

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

    def refuse(self, error: MeshError) -> None:
        """Ends the item that ``write`` raised at; what else there is may be written again."""

    def ids(self) -> Sequence[int]:
        """The ids it was last written with and that are not answered yet."""


class SingleOperation(Generic[T]):
    """One awaited call. A subclass writes the request and reads the answer of one method."""

    __slots__ = ("deadline", "facts", "future", "item_id", "size_bytes")

    field: str
    """Field of the operation in PipelineItem and of the outcome in PipelineResult."""
    repeatable: bool = True
    item_count: int = 1
    counts_batch: bool = False
    batch_size: int = 0

    def __init__(self, size_bytes: int = 128) -> None:
        self.size_bytes = size_bytes
        self.item_id = 0
        self.facts: Facts
        self.deadline: float
        self.future: asyncio.Future[T]

    def fill(self, request: Any) -> None:
        """Fills the request message in place; sets at least one of its fields."""
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
        self.fill(getattr(item, self.field))

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

    def refuse(self, error: MeshError) -> None:
        """See ``Operation.refuse``."""
        self.fail(error)

    def ids(self) -> Sequence[int]:
        """See ``Operation.ids``."""
        return (self.item_id,)


class ManyOperation(Generic[R, T]):
    """Up to one message full of calls of the same method, whose results a sink is told of.

    Invariant: ``values`` holds by position what is answered, and ``_OPEN`` for what is not, of
    which there are ``_left`` unless it was withdrawn; ``on_end`` is called once, when that gets to
    zero. ``arrived`` lists the positions that were answered and not yet taken. ``_pending`` holds
    the positions as last written, in the order of their ids; None: all.
    """

    __slots__ = (
        "_fill",
        "_first_id",
        "_left",
        "_on_end",
        "_pending",
        "_read",
        "_requests",
        "_sink",
        "_written_id",
        "arrived",
        "deadline",
        "facts",
        "field",
        "first_index",
        "repeatable",
        "size_bytes",
        "values",
    )

    counts_batch: bool = False
    batch_size: int = 0

    def __init__(
        self,
        field: str,
        first_index: int,
        requests: Sequence[R],
        *,
        fill: Callable[[Any, R], None],
        read: Callable[[Any], T],
        sink: Sink[R, T],
        on_end: Callable[[int], None],
        repeatable: bool,
        size_bytes: int,
    ) -> None:
        """Makes the operation.

        Args:
            field: field of the operation in PipelineItem and of the outcome in PipelineResult.
            first_index: index of the first request; the others follow.
            requests: one for each call.
            fill: fills a request message in place; sets at least one of its fields.
            read: turns a response message into a result.
            sink: told of results and errors, as they come.
            on_end: told of the number of requests when none waits any more.
            repeatable: whether sending calls again is harmless.
            size_bytes: about what all take in a message.
        """
        self.field = field
        self.facts: Facts
        self.deadline: float
        self.repeatable = repeatable
        self.size_bytes = size_bytes
        self.first_index = first_index
        self.values: list[Any] = [_OPEN] * len(requests)
        self.arrived: list[int] = []
        self._requests = requests
        self._fill = fill
        self._read = read
        self._sink = sink
        self._on_end = on_end
        self._left = len(requests)
        self._pending: list[int] | None = None
        self._first_id = 0
        self._written_id = 0

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
        if self._left < len(requests):
            values = self.values
            self._pending = [position for position, value in enumerate(values) if value is _OPEN]
            requests = [requests[position] for position in self._pending]
        self._first_id = self._written_id = item_id = first_id
        for request in requests:
            item = add()
            item.id = item_id
            item_id += 1
            fill(getattr(item, field), request)
            self._written_id = item_id
        ids.extend(range(first_id, item_id))

    def answered(self, result: Any) -> bool:
        """See ``Operation.answered``."""
        position = result.id - self._first_id
        if self._pending is not None:
            position = self._pending[position]
        if self._left and self.values[position] is _OPEN:
            self._end(
                position,
                from_status(result.error)
                if result.HasField("error")
                else self._read(getattr(result, self.field)),
            )
        return False

    def refuse(self, error: MeshError) -> None:
        """See ``Operation.refuse``."""
        position = self._written_id - self._first_id
        self._end(position if self._pending is None else self._pending[position], error)

    def _end(self, position: int, value: Any) -> None:
        self._left -= 1
        self.values[position] = value
        arrived = self.arrived
        if not arrived:
            self._sink.tell(self)
        arrived.append(position)
        if not self._left:
            self._on_end(len(self.values))

    def fail(self, error: MeshError) -> None:
        """See ``Operation.fail``."""
        values = self.values
        if self._left:
            for position, value in enumerate(values):
                if value is _OPEN:
                    values[position] = error
                    if not self.arrived:
                        self._sink.tell(self)
                    self.arrived.append(position)
        self.withdraw()

    def withdraw(self) -> None:
        """Nobody waits for the rest any more."""
        if self._left:
            self._left = 0
            self._on_end(len(self.values))

    def ids(self) -> Sequence[int]:
        """See ``Operation.ids``."""
        first, values = self._first_id, self.values
        positions = range(len(values)) if self._pending is None else self._pending
        return [
            first + offset
            for offset, position in enumerate(positions)
            if first and values[position] is _OPEN
        ]


_OPEN: Final = object()
"""Stands for a result that has not come."""


class Sink(Generic[R, T]):
    """Tells the reader of many calls which of them have results."""

    __slots__ = ("ready", "waiter")

    def __init__(self) -> None:
        self.ready: list[ManyOperation[R, T]] = []
        """The operations with results that the reader has not taken."""
        self.waiter: asyncio.Future[None] | None = None
        """Set while the reader waits."""

    def tell(self, operation: ManyOperation[R, T]) -> None:
        """Results of an operation arrive, of which the reader has taken all so far."""
        self.ready.append(operation)
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        """Waits until there is something."""
        if not self.ready:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
