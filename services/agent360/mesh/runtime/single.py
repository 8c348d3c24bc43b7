"""Batch handlers driven by unary and server-streaming RPCs: a call is a batch of one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Final

from agent360.client.context import enter_scope
from agent360.mesh.runtime.batch import Group
from agent360.mesh.runtime.call import BatchHandler, Item

current_group: ContextVar[Group] = ContextVar("agent360_current_group")
"""The group that is handled: of one for a unary RPC, that of the item for work on an item alone."""

_CHUNKS_AHEAD: Final = 16


class SingleEmit:
    """The emitter of a unary RPC."""

    __slots__ = ("_error", "_response", "_response_class", "_work")

    def __init__(self, response_class: Any) -> None:
        self._response_class = response_class
        self._response: Any = None
        self._error: BaseException | None = None
        self._work: Coroutine[Any, Any, None] | None = None

    def reply(self, item: Item, size_bytes: int = 0) -> Any:
        """See ``Emit.reply``."""
        response = self._response_class()
        if item.open:
            item.open = False
            self._response = response
        return response

    def fail(self, item: Item, error: BaseException) -> None:
        """See ``Emit.fail``."""
        if item.open:
            item.open = False
            self._error = error

    async def chunk(self, item: Item, size_bytes: int = 0) -> Any:
        """Never called: a unary RPC has no pieces."""
        raise TypeError("a unary RPC is answered by reply() alone")

    def start(self, item: Item, work: Coroutine[Any, Any, None]) -> None:
        """See ``Emit.start``; the RPC's own task does the work after the handler has returned."""
        self._work = work

    @property
    def full(self) -> bool:
        """See ``Emit.full``."""
        return False

    async def room(self) -> None:
        """See ``Emit.room``."""

    async def outcome(self) -> Any:
        """The response, once there is one.

        Raises:
            BaseException: what the handler failed with.
        """
        if self._work is not None:
            await self._work
        if self._error is not None:
            raise self._error
        if self._response is None:
            raise RuntimeError("the handler left an item without an answer")
        return self._response


class StreamingEmit(SingleEmit):
    """The emitter of a server-streaming RPC: gRPC's own flow control takes the place of credits."""

    __slots__ = ("_queue",)

    def __init__(self, response_class: Any) -> None:
        super().__init__(response_class)
        self._queue: asyncio.Queue[Any] = asyncio.Queue(_CHUNKS_AHEAD)

    async def chunk(self, item: Item, size_bytes: int = 0) -> Any:
        """See ``Emit.chunk``."""
        response = self._response_class()
        if item.open:
            await self._queue.put(response)
        return response

    async def responses(self) -> AsyncIterator[Any]:
        """The pieces, as they come, and the final one.

        Raises:
            BaseException: what the handler failed with.
        """
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(self._finish())
            try:
                while (response := await self._queue.get()) is not _END:
                    yield response
            finally:
                work.cancel()
        if self._error is not None:
            raise self._error
        if self._response is None:
            raise RuntimeError("the handler left an item without an answer")
        yield self._response

    async def _finish(self) -> None:
        try:
            if self._work is not None:
                await self._work
        except Exception as error:  # noqa: BLE001 - raised to the runtime by responses()
            self._error = error
        await self._queue.put(_END)


_END: Final = object()


def unary_from_batch(
    handler: BatchHandler, response_class: Any
) -> Callable[[Any, Any], Awaitable[Any]]:
    """A unary RPC's behaviour that drives a batch handler."""

    async def behave(request: Any, _: Any) -> Any:
        item = _item(request)
        emit = SingleEmit(response_class)
        await handler((item,), emit)
        return await emit.outcome()

    return behave


def streaming_from_batch(
    handler: BatchHandler, response_class: Any
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    """A server-streaming RPC's behaviour that drives a batch handler."""

    async def behave(request: Any, _: Any) -> AsyncIterator[Any]:
        item = _item(request)
        emit = StreamingEmit(response_class)
        await handler((item,), emit)
        async for response in emit.responses():
            yield response

    return behave


def _item(request: Any) -> Item:
    group = current_group.get()
    enter_scope(group.scope())
    item = group.items[0]
    item.request = request
    return item
