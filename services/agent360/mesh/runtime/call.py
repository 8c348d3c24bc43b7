"""A call, the items of a batch of calls, and the emitter that a handler answers through."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, Protocol

ANY_TENANT: Final = "*"
"""In a principal's tenants: all of them. As the tenant of a call: see ``Call.all_tenants``."""

MESH_TENANT: Final = "agent360-mesh"
"""The tenant of what the mesh does and measures on nobody's behalf."""


class Priority(IntEnum):
    """How soon a call should be served; the numbers are those of agent360.call.v1.Priority."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a call, as found out by authentication."""

    name: str
    """Name of the API key or certificate; ``anonymous`` where no keys are configured."""
    tenants: frozenset[str]
    """The tenants it may speak for; ``*`` stands for all."""
    service: bool = False
    """True for the mesh's own services: exempt from quotas."""
    admin: bool = False
    """True for operators: may change what concerns all tenants."""

    @property
    def only_tenant(self) -> str:
        """The tenant of calls that name none; empty if the principal has not just one."""
        if len(self.tenants) != 1 or ANY_TENANT in self.tenants:
            return ""
        return next(iter(self.tenants))

    def may_speak_for(self, tenant: str) -> bool:
        """Whether the principal is bound to the tenant."""
        return tenant in self.tenants or ANY_TENANT in self.tenants


@dataclass(slots=True, eq=False)
class Call:
    """One call, or several items of a stream that share all of this.

    Policies fill it in; a handler only reads it.
    """

    method: str
    """Full name of the RPC, such as ``/agent360.cache.v1.CacheService/Get``."""
    principal: Principal
    """Who makes the call."""
    tenant: str
    """On whose behalf."""
    deadline: float
    """When the answer is no longer wanted, on the event loop's clock (seconds)."""
    priority: Priority = Priority.NORMAL
    """How soon it should be served."""
    traceparent: str = ""
    """W3C trace context of the caller's span; empty if not traced."""
    request_id: str = ""
    """Names the call in logs; empty if the caller gave none."""
    peer: str = ""
    """The caller's address."""
    all_tenants: bool = False
    """True if the caller asks about all tenants, and may: ``tenant`` is the mesh's then."""
    streamed: bool = False
    """True for items of a Pipeline stream."""
    waited_s: float = 0.0
    """How long it has waited for its quota, in seconds."""
    facts: dict[str, str] = field(default_factory=dict)
    """What a handler wants in the access log beside the above, such as ``model``."""


class Item:
    """One operation of a batch.

    ``open`` turns false when the item is answered, failed, cancelled or past its deadline; a
    handler that still works on it then may stop, and what it emits is dropped.
    """

    __slots__ = ("call", "credits", "group", "id", "open", "request", "room", "task")

    def __init__(self, id: int, call: Call, request: Any, group: Any) -> None:  # noqa: A002
        self.id = id
        self.call = call
        self.request = request
        self.group = group
        self.open = True
        self.task: asyncio.Task[None] | None = None
        self.credits = 0
        self.room: asyncio.Event | None = None


class Emit(Protocol):
    """Takes the answers of a batch of items, at different times and in any order.

    A handler asks for the response message and fills it in at once, before its next ``await``:

        response = emit.reply(item)
        response.lookup.outcome = cache_pb2.OUTCOME_MISS

    Filling in place spares a copy, which costs more than the rest of a small answer.
    """

    def reply(self, item: Item, size_bytes: int = 0) -> Any:
        """Ends the item successfully.

        Args:
            item: the item that is answered.
            size_bytes: size of the large fields about to be filled in, for bounding messages.

        Returns:
            The empty response message of the item's method, to be filled in before the next await.
        """

    def fail(self, item: Item, error: BaseException) -> None:
        """Ends the item with an error; one that is not a MeshError is reported as INTERNAL."""

    async def chunk(self, item: Item, size_bytes: int = 0) -> Any:
        """Waits until the caller will take one more piece of a streamed answer.

        Returns:
            The empty response message of the item's method, to be filled in before the next await.
        """

    def start(self, item: Item, work: Coroutine[Any, Any, None]) -> None:
        """Runs ``work`` as the item's own task, cancelled with the item; its error is the item's.

        Downstream calls made in ``work`` inherit the item's tenant, deadline, priority and trace.
        """

    @property
    def full(self) -> bool:
        """Whether more is waiting to be sent than should be; a handler then awaits ``room()``."""

    async def room(self) -> None:
        """Waits until enough has been sent."""


class BatchHandler(Protocol):
    """A hot method, written once for a batch; drives unary RPCs (a batch of one) and streams."""

    async def __call__(self, items: Sequence[Item], emit: Emit) -> None:
        """Answers every item, now or from tasks begun by ``emit.start``."""
