"""Watches: a query that is answered again as time goes on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from typing import Final, NamedTuple

import grpc

from agent360.client.errors import MeshError
from agent360.mesh.metrics.ports import StoreError
from agent360.mesh.metrics.queries.engine import QueryEngine
from agent360.mesh.metrics.queries.query import Group, Query
from agent360.mesh.runtime.pages import MAX_PAGE_SIZE

SIGN_OF_LIFE_S: Final = 10.0
"""A watch says something at least this often."""


class News(NamedTuple):
    """What a watch tells."""

    groups: list[Group]
    complete_until_s: int
    """Steps before are over, and what was reported of them has had time to arrive."""


@dataclasses.dataclass(frozen=True, slots=True)
class WatchLimits:
    """Bounds of watches."""

    max_watches: int
    """Open at a time."""
    max_per_tenant: int
    """Of these, of one tenant."""
    max_age_s: float
    """After which one ends, so that load spreads over replicas: its caller opens it again."""


class Watches:
    """The watches that are open.

    Example:
        >>> async for news in watches.watch("acme", lambda now_s: read_query(...), 10.0):
        ...     print(news.groups)
    """

    def __init__(
        self,
        engine: QueryEngine,
        limits: WatchLimits,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._now = now
        self._open: dict[str, int] = {}
        self._draining = asyncio.Event()

    @property
    def size(self) -> int:
        """How many are open."""
        return sum(self._open.values())

    def drain(self) -> None:
        """Ends all watches."""
        self._draining.set()

    async def watch(
        self, tenant: str, read: Callable[[float], Query], interval_s: float, *, steps: bool
    ) -> AsyncIterator[News]:
        """Answers now and after each interval until it is drained or too old.

        Args:
            tenant: whose watch it is.
            read: the query as it is at a time.
            interval_s: seconds between answers.
            steps: the query has steps; those that are over are told once.

        Raises:
            MeshError: RESOURCE_EXHAUSTED; there are too many watches, or the answer is too large.
        """
        self._admit(tenant)
        try:
            end_s = time.monotonic() + self._limits.max_age_s
            told_until_s = 0
            while not self._draining.is_set():
                now_s = self._now()
                news = await self._ask(read(now_s), told_until_s if steps else 0, now_s)
                if news is not None:
                    told_until_s = news.complete_until_s
                    yield news
                due_s = (now_s // interval_s + 1) * interval_s
                while (wait_s := due_s - self._now()) > 0:
                    if await self._drained(min(wait_s, SIGN_OF_LIFE_S)):
                        return
                    if due_s > self._now():
                        yield News([], told_until_s)
                if time.monotonic() >= end_s:
                    return
        finally:
            self._leave(tenant)

    async def _ask(self, query: Query, told_until_s: int, now_s: float) -> News | None:
        """What is new; None while the store cannot be read: it is asked again."""
        start_s = max(query.start_s, min(told_until_s, query.end_s - query.step_s))
        start_s = query.start_s + (start_s - query.start_s) // query.step_s * query.step_s
        try:
            groups = await self._engine.answer(dataclasses.replace(query, start_s=start_s))
        except StoreError:
            return None
        if len(groups) > MAX_PAGE_SIZE:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "QUERY_TOO_LARGE",
                f"{len(groups):,} groups; a watch may have {MAX_PAGE_SIZE:,}: group by fewer "
                "labels, or set top_k",
            )
        over_s = now_s - self._engine.settled_s
        return News(groups, int(over_s // query.step_s) * query.step_s)

    async def _drained(self, wait_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._draining.wait()
        return self._draining.is_set()

    def _admit(self, tenant: str) -> None:
        limits, total = self._limits, self.size
        if total >= limits.max_watches or self._open.get(tenant, 0) >= limits.max_per_tenant:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "WATCHES_EXHAUSTED",
                f"{total:,} watches are open, {self._open.get(tenant, 0):,} of them of the tenant; "
                f"at most are {limits.max_watches:,} (query.max_watches) and "
                f"{limits.max_per_tenant:,} (query.max_tenant_watches)",
                retry_after_s=10.0,
            )
        self._open[tenant] = self._open.get(tenant, 0) + 1

    def _leave(self, tenant: str) -> None:
        self._open[tenant] -= 1
        if not self._open[tenant]:
            del self._open[tenant]
