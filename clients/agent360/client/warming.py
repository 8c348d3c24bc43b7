"""Putting entries in place before they are asked for."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sized,
)
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import grpc

from agent360.cache.v1 import cache_pb2
from agent360.client.cache_operations import size_of_entry
from agent360.client.coalescer import Coalescer
from agent360.client.entries import Entry, Invalidated, Warmed
from agent360.client.errors import MeshError, from_rpc_error
from agent360.client.loading import LoadingClient, load_failed
from agent360.client.serializers import Serializer

T = TypeVar("T")
R = TypeVar("R")

MAX_ERRORS: Final = 100
"""Errors that are kept; the others are only counted."""
MAX_ENTRIES: Final = 1_000
"""Entries that one invalidation may put in place."""


@dataclass(frozen=True, slots=True)
class Plan(Generic[T]):
    """What to load, and how to store it."""

    namespace: str
    load: Callable[[str], Awaitable[T]]
    serializer: Serializer[T]
    ttl: float | None
    stale_ttl: float | None
    content_type: str | None
    tags: tuple[str, ...]
    fill_timeout: float | None
    timeout: float | None
    tenant: str

    async def entry(self, key: str) -> Entry:
        """The entry of a key, loaded."""
        value = await self.load(key)
        content_type = self.content_type
        return Entry(
            key,
            self.serializer.encode(value),
            self.ttl,
            self.stale_ttl,
            self.serializer.content_type if content_type is None else content_type,
            self.tags,
        )


async def warm(
    client: LoadingClient,
    keys: Iterable[str],
    plan: Plan[Any],
    concurrency: int,
    per_second: float | None,
) -> AsyncGenerator[Warmed, None]:
    """Loads what is missing; yields how far it is."""
    taken = warmed = skipped = failed = 0
    errors: list[tuple[str, Exception]] = []
    known = len(keys) if isinstance(keys, Sized) else None

    def counted() -> Iterator[str]:
        nonlocal taken
        for key in keys:
            taken += 1
            yield key

    async def fill(key: str) -> bool | None:
        return await _fill_missing(client, key, plan)

    async with aclosing(each_of(counted(), fill, concurrency, per_second)) as results:
        async for key, result in results:
            if isinstance(result, Exception):
                failed += 1
                if len(errors) < MAX_ERRORS:
                    errors.append((key, result))
            elif result is None:
                skipped += 1
            elif result:
                warmed += 1
            else:
                failed += 1
            total = taken if known is None else known
            yield Warmed(warmed, skipped, failed, total, tuple(errors))


async def invalidate_and_warm(
    client: LoadingClient, keys: Iterable[str], plan: Plan[Any], concurrency: int, room: int
) -> Invalidated:
    """Loads entries, then moves a namespace to its next version with these in place.

    Args:
        client: of the cache.
        keys: what to load.
        plan: how.
        concurrency: how many loads at a time.
        room: bytes that one message may take.
    """
    entries = []
    async with aclosing(each_of(keys, plan.entry, concurrency, None)) as results:
        async for _, result in results:
            if isinstance(result, Exception):
                raise result
            entries.append(result)
    first = size = 0
    while first < len(entries) and first < MAX_ENTRIES:
        size += size_of_entry(entries[first]) + sum(len(tag) + 8 for tag in plan.tags)
        if size > room:
            break
        first += 1
    done = await client.invalidate(
        namespace=plan.namespace,
        warm=entries[:first],
        timeout=plan.timeout,
        tenant=plan.tenant,
    )
    warmed = done.warmed
    if rest := entries[first:]:
        writes = client.set_many(
            rest, namespace=plan.namespace, timeout=plan.timeout, tenant=plan.tenant
        )
        for stored in await writes:
            if isinstance(stored, Exception):
                raise stored
            warmed += stored.stored
    return Invalidated(done.removed, done.namespace_version, done.shared, warmed)


async def warm_by_service(
    coalescer: Coalescer,
    request: cache_pb2.WarmRequest,
    per_second: float | None,
    timeout: float | None,
    tenant: str,
) -> AsyncGenerator[Warmed, None]:
    """Lets the service put entries in place; yields how far it is."""
    if per_second is not None:
        request.entries_per_second = max(1, round(per_second))
    call = await coalescer.streaming(
        "Warm", request, cache_pb2.WarmResponse, timeout, tenant, lasting=timeout is None
    )
    try:
        async for progress in call:
            yield Warmed(progress.warmed, 0, progress.failed, progress.total)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    finally:
        call.cancel()


async def each_of(
    keys: Iterable[str],
    work: Callable[[str], Coroutine[Any, Any, R]],
    concurrency: int,
    per_second: float | None,
) -> AsyncGenerator[tuple[str, R | Exception], None]:
    """Does something for each key, several at a time; yields what became of it as it is done.

    Args:
        keys: taken as there is room.
        work: what to do.
        concurrency: how many at a time.
        per_second: how many to begin in a second; None: as many as there is room for.
    """
    running: dict[asyncio.Task[R], str] = {}
    begin_at = time.monotonic()
    left = iter(keys)
    more = True
    try:
        while more or running:
            pause_s = begin_at - time.monotonic() if per_second else 0.0
            if more and len(running) < concurrency and pause_s <= 0:
                try:
                    key = next(left)
                except StopIteration:
                    more = False
                else:
                    running[asyncio.create_task(work(key))] = key
                    if per_second:
                        begin_at = max(begin_at, time.monotonic()) + 1.0 / per_second
                continue
            waits_for_turn = more and len(running) < concurrency
            if not running:
                await asyncio.sleep(pause_s)
                continue
            done, _ = await asyncio.wait(
                running,
                timeout=pause_s if waits_for_turn else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                yield running.pop(task), _result(task)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _fill_missing(client: LoadingClient, key: str, plan: Plan[Any]) -> bool | None:
    """Loads and stores an entry; returns whether it is stored, None if there was one."""
    claim = await client.claim(
        key,
        namespace=plan.namespace,
        fill_timeout=plan.fill_timeout,
        timeout=plan.timeout,
        tenant=plan.tenant,
    )
    if not claim.fill_token:
        return None
    try:
        entry = await plan.entry(key)
    except asyncio.CancelledError:
        client.abandon(claim.fill_token, plan.tenant)
        raise
    except Exception as error:
        with contextlib.suppress(MeshError):
            await client.fail(claim.fill_token, load_failed(error), tenant=plan.tenant)
        raise
    stored = await client.fill(
        claim.fill_token,
        key,
        entry.value,
        namespace=plan.namespace,
        ttl=entry.ttl,
        stale_ttl=entry.stale_ttl,
        content_type=entry.content_type,
        tags=entry.tags,
        timeout=plan.timeout,
        tenant=plan.tenant,
    )
    return stored.stored


def _result(task: asyncio.Task[R]) -> R | Exception:
    if task.cancelled():
        return RuntimeError("loading was cancelled")
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, Exception):
        return error
    raise error
