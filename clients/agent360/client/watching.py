"""Watching what is written and invalidated: one Watch stream, or one that is resumed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

import grpc
from msgspec import Struct

from agent360.cache.v1 import cache_pb2
from agent360.client.coalescer import Coalescer
from agent360.client.errors import MeshError, UnavailableError, from_rpc_error

FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 1.0
MAX_SILENCE_S: Final = 15.0
"""A watch without an event for this long is broken: a service gives a sign of life every 5 s."""

_REFUSALS: Final = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}


class Invalidation(Struct, frozen=True, gc=False):
    """Entries were written or removed: what is meant is given by one of keys to all."""

    namespace: str
    """Where."""
    version: int
    """Copies up to this version are outdated; 0: all copies."""
    keys: tuple[str, ...] = ()
    """These keys."""
    prefix: str = ""
    """All keys that begin with this."""
    tags: tuple[str, ...] = ()
    """All entries with any of these tags."""
    all: bool = False
    """The whole namespace."""
    key_versions: tuple[int, ...] = ()
    """Of ``keys``, what ``version`` is for each of them; empty: it stands for all."""


class Reset(Struct, frozen=True, gc=False):
    """Events may have been missed: everything that was learned from entries may be outdated."""

    reason: str
    """Why."""


Event = Invalidation | Reset


async def open_watch(
    coalescer: Coalescer, namespaces: Sequence[str], tenant: str, resume_token: str = ""
) -> Any:
    """Opens a Watch stream and returns the call.

    Raises:
        MeshError: the service cannot be reached.
    """
    request = cache_pb2.WatchRequest(namespaces=namespaces, resume_token=resume_token)
    return await coalescer.streaming(
        "Watch", request, cache_pb2.WatchResponse, tenant=tenant, lasting=True
    )


async def next_response(call: Any, max_silence_s: float) -> Any:
    """The next response of a Watch stream.

    Raises:
        MeshError: the stream is over, or silent for too long.
    """
    try:
        async with asyncio.timeout(max_silence_s):
            response = await call.read()
    except TimeoutError:
        raise _broken("the watch gave no sign of life") from None
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    except (OSError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
        raise _broken(str(error)) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise _broken("the connection was closed") from None
    if response is grpc.aio.EOF:
        raise _broken("the service ended the watch")
    return response


def read_event(response: cache_pb2.WatchResponse) -> Event | None:
    """What a response tells; None: a sign of life."""
    kind = response.WhichOneof("event")
    if kind == "invalidation":
        message = response.invalidation
        scope = message.WhichOneof("scope")
        if scope is not None:
            return Invalidation(
                message.namespace,
                message.version,
                tuple(message.keys.keys) if scope == "keys" else (),
                message.prefix if scope == "prefix" else "",
                tuple(message.tags.tags) if scope == "tags" else (),
                scope == "all",
                tuple(message.key_versions),
            )
        return Reset("an invalidation of a kind that this client does not know")
    return Reset(response.reset.reason) if kind == "reset" else None


def is_refusal(error: MeshError) -> bool:
    """Whether the next attempt to watch would fail as well."""
    return error.code in _REFUSALS or error.reason == "CLIENT_CLOSED"


async def pause(attempt: int) -> None:
    """Waits before an attempt to open a watch again, longer from one to the next.

    Args:
        attempt: how many have failed.
    """
    backoff = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(attempt - 1, 10))
    await asyncio.sleep(backoff * random.uniform(0.5, 1.0))


class CacheWatch:
    """The changes of a tenant's entries, as they happen; a broken stream is resumed.

    Example:
        >>> async with mesh.cache.watch(namespaces=["plans"]) as events:
        ...     async for event in events:
        ...         print(event)
    """

    def __init__(self, coalescer: Coalescer, namespaces: Sequence[str], tenant: str) -> None:
        """Use ``CacheClient.watch``."""
        self._coalescer = coalescer
        self._namespaces = tuple(namespaces)
        self._tenant = tenant
        self._token = ""
        self._call: Any = None
        self._first: Event | None = None
        self._failures = 0
        self._closed = False

    async def __aenter__(self) -> Self:
        """Returns when the watch is open: from now on nothing is missed.

        Raises:
            MeshError: the service refused the watch or cannot be reached.
        """
        try:
            self._first = await self._next()
        except BaseException:
            self._drop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed = True
        self._drop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event; waits until there is one.

        Raises:
            MeshError: the service refuses to go on with the watch, or the client was closed.
        """
        event, self._first = self._first, None
        if event is not None:
            return event
        while not self._closed:
            if self._failures:
                await pause(self._failures)
            try:
                event = await self._next()
            except MeshError as error:
                self._drop()
                if is_refusal(error):
                    raise
                self._failures += 1
                continue
            if event is not None:
                return event
        raise StopAsyncIteration

    async def _next(self) -> Event | None:
        if self._call is None:
            self._call = await open_watch(
                self._coalescer, self._namespaces, self._tenant, self._token
            )
        response = await next_response(self._call, MAX_SILENCE_S)
        self._failures = 0
        self._token = response.resume_token
        return read_event(response)

    def _drop(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()


def _broken(message: str) -> MeshError:
    return UnavailableError(message, reason="WATCH_BROKEN")
