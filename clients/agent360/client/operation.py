"""Operations: what the coalescer gathers into messages, and how their answers find back."""

from __future__ import annotations

import asyncio
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
    repeatable: bool
    """Whether sending it again after a broken stream is harmless."""
    size_bytes: int
    """About what it takes in a message."""

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
    """Up to one message full of calls of the same method, answered into a sink."""

    __slots__ = (
        "_fill",
        "_index_by_id",
        "_read",
        "_requests",
        "_sink",
        "_unanswered",
        "deadline",
        "facts",
        "field",
        "repeatable",
        "size_bytes",
    )

    def __init__(
        self,
        field: str,
        requests: Sequence[tuple[int, R]],
        *,
        fill: Callable[[Any, R], None],
        read: Callable[[Any], T],
        sink: Callable[[tuple[int, T | MeshError]], None],
        repeatable: bool,
        size_bytes: int,
    ) -> None:
        """Makes the operation.

        Args:
            field: field of the operation in PipelineItem and of the outcome in PipelineResult.
            requests: index and request of each call.
            fill: fills a request message in place.
            read: turns a response message into a result.
            sink: takes an index with its result or error, as they come.
            repeatable: whether sending calls again is harmless.
            size_bytes: about what all take in a message.
        """
        self.field = field
        self.facts: Facts
        self.deadline: float
        self.repeatable = repeatable
        self.size_bytes = size_bytes
        self._requests = requests
        self._fill = fill
        self._read = read
        self._sink = sink
        self._unanswered: dict[int, R] = dict(requests)
        self._index_by_id: dict[int, int] = {}

    @property
    def ended(self) -> bool:
        """See ``Operation.ended``."""
        return not self._unanswered

    @property
    def item_count(self) -> int:
        """See ``Operation.item_count``."""
        return len(self._unanswered)

    def write(self, add: Callable[[], Any], first_id: int, ids: list[int]) -> None:
        """See ``Operation.write``."""
        field, fill = self.field, self._fill
        new_ids = range(first_id, first_id + len(self._unanswered))
        for item_id, request in zip(new_ids, self._unanswered.values(), strict=True):
            item = add()
            item.id = item_id
            message = getattr(item, field)
            message.SetInParent()
            fill(message, request)
        ids.extend(new_ids)
        self._index_by_id = dict(zip(new_ids, self._unanswered, strict=True))

    def answered(self, result: Any) -> bool:
        """See ``Operation.answered``."""
        index = self._index_by_id.pop(result.id, None)
        if index is None:
            return False
        del self._unanswered[index]
        if result.HasField("error"):
            self._sink((index, from_status(result.error)))
        else:
            self._sink((index, self._read(getattr(result, self.field))))
        return False

    def fail(self, error: MeshError) -> None:
        """See ``Operation.fail``."""
        for index in self._unanswered:
            self._sink((index, error))
        self._unanswered.clear()
        self._index_by_id.clear()

    def withdraw(self) -> None:
        """Nobody waits for the rest any more."""
        self._unanswered.clear()

    def ids(self) -> Sequence[int]:
        """See ``Operation.ids``."""
        return tuple(self._index_by_id)
