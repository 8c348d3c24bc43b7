"""Leases of a replica: tokens of hot limits that it has charged in advance, for plain checks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from time import monotonic
from typing import Any, Final
from weakref import WeakValueDictionary

from agent360.client.decisions import Decision as ClientDecision
from agent360.client.errors import MeshError
from agent360.client.leasing import Background, Lease, LeasePool
from agent360.mesh.ratelimit.decisions import Decision
from agent360.mesh.ratelimit.failures import store_away
from agent360.mesh.ratelimit.limits import Algorithm, Limit, LimitSet
from agent360.mesh.ratelimit.shared_usage import SharedUsage
from agent360.mesh.ratelimit.sharing import AWAY, SharedStore

_HOT_CHECKS: Final = 32
_HOT_S: Final = 0.1
"""So many checks that the store decided in so many seconds make a limit hot."""
_PART: Final = 16
"""No lease is more than this part of what is left."""
_LEAST_TOKENS: Final = 8
"""Where a lease would be smaller, the store decides each check: the last tokens go to who asks."""
_MAX_POOLS: Final = 10_000
_CLOSE_S: Final = 1.0

_LEASED: Final = (Algorithm.FIXED_WINDOW, Algorithm.SLIDING_WINDOW)
"""A token bucket's tokens flow back while a lease of them is spent, which would admit more than
burst + rate x time to plain checks."""


class HotLimits:
    """The limits that certain requests are charged to, and the tokens of them that are held."""

    __slots__ = ("__weakref__", "checks", "counts", "pool", "room", "since", "tenant")

    def __init__(self, tenant: str, counts: tuple[Any, ...]) -> None:
        self.tenant = tenant
        self.counts = counts
        self.pool: LeasePool | None = None
        self.room = 0
        """What was left of the tightest when the store was last asked."""
        self.checks = 0
        """Checks that the store has decided since ``since``, on the monotonic clock."""
        self.since = 0.0


class ReplicaLeases:
    """Decides checks of hot limits with tokens that are charged already, by the client's pools.

    Never denies: what the tokens do not suffice for is for the store to decide.
    """

    def __init__(self, store: SharedStore, usage: SharedUsage) -> None:
        """Makes one that holds nothing.

        Args:
            store: leases.
            usage: told of what is leased.
        """
        self._store = store
        self._usage = usage
        self._limits = LimitSet(())
        self._background = Background()
        self._known: WeakValueDictionary[tuple[str, ...], HotLimits] = WeakValueDictionary()
        """Those of plans in use, by their tenants and the names of their counts: usage is told of
        each tenant that shares a count."""
        self._hot: dict[tuple[str, ...], HotLimits] = {}
        """Those that have a pool, the oldest first."""

    @property
    def open(self) -> bool:
        """Whether tokens may be held of any limit."""
        return bool(self._hot)

    def of(self, tenant: str, counts: tuple[Any, ...]) -> HotLimits | None:
        """The limits of requests that are charged to some counts; None: these are not leased."""
        if not counts or not all(_may_be_leased(count.limit) for count in counts):
            return None
        if not self._store.in_one_place(counts):
            return None
        key = _key_of(tenant, counts)
        hot = self._known.get(key)
        if hot is None:
            hot = self._known[key] = HotLimits(tenant, counts)
        return hot

    def spend(self, hot: HotLimits, hits: int, now: float) -> Decision | None:
        """Decides a check with what is held; None: the store is to be asked.

        Args:
            hot: the limits that the check is charged to.
            hits: how much is charged.
            now: seconds on the monotonic clock.
        """
        decision = None if hot.pool is None else hot.pool.take(hits, now)
        if decision is None or not decision.allowed:
            return None
        return Decision(
            True,
            hits,
            hot.room + decision.remaining,
            decision.limit,
            decision.reset_after_s,
            None,
            decision.limit_id,
        )

    def note(self, hot: HotLimits, decided: Sequence[Decision]) -> None:
        """Notes what the store has decided, and has tokens leased if that was much."""
        now = monotonic()
        if now - hot.since > _HOT_S:
            hot.since, hot.checks = now, 0
        hot.checks += len(decided)
        last = decided[-1]  # a denial tells of the limit that denied, others may have less left
        hot.room = last.remaining if last.allowed else min(hot.room, last.remaining)
        if hot.checks < _HOT_CHECKS or hot.room // _PART < _LEAST_TOKENS:
            return
        pool = hot.pool or self._open(hot)
        if pool is not None and pool.idle:
            pool.ask(1)

    def replace_limits(self, limits: LimitSet) -> None:
        """Gives everything back: what is held may be of limits that have changed."""
        self._limits = limits
        self._known.clear()
        self._drop_all()

    async def close(self) -> None:
        """Gives everything back."""
        self._known.clear()
        self._drop_all()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self._background.settle()

    def _open(self, hot: HotLimits) -> LeasePool | None:
        """A pool for limits that have become hot; None if they have changed."""
        key = _key_of(hot.tenant, hot.counts)
        if self._known.get(key) is not hot:
            return None
        if len(self._hot) >= _MAX_POOLS:
            self._drop(self._hot.pop(next(iter(self._hot))))
        self._hot[key] = hot
        hot.pool = LeasePool(
            lambda tokens: self._lease(hot, tokens),
            lambda lease_id, unspent: self._store.return_lease(
                self._limits, hot.tenant, lease_id, unspent
            ),
            self._background,
        )
        return hot.pool

    def _drop_all(self) -> None:
        hot, self._hot = self._hot, {}
        for each in hot.values():
            self._drop(each)

    def _drop(self, hot: HotLimits) -> None:
        pool, hot.pool = hot.pool, None
        if pool is not None:
            self._background.spawn(_close(pool))

    async def _lease(self, hot: HotLimits, tokens: int) -> Lease:
        wanted = min(tokens, hot.room // _PART)
        if wanted < _LEAST_TOKENS:
            return Lease(_NOTHING, "", 0.0, strict=False)
        answer = await self._store.lease(hot.tenant, hot.counts, wanted)
        if answer is AWAY or answer is None:
            raise store_away()
        decision, lease_id, ttl_us = answer
        hot.room = decision.remaining
        if decision.granted:
            self._usage.note(
                hot.tenant,
                hot.counts,
                decision.granted,
                (),
                decision.limit_id,
                decision.limit - decision.remaining,
            )
        return Lease(ClientDecision(*decision), lease_id, ttl_us / 1e6, strict=False)


_NOTHING: Final = ClientDecision(
    allowed=False,
    granted=0,
    remaining=0,
    limit=0,
    reset_after_s=0.0,
    retry_after_s=0.0,
    limit_id="",
    degraded=False,
)


def _key_of(tenant: str, counts: tuple[Any, ...]) -> tuple[str, ...]:
    return (tenant, *(count.key for count in counts))


def _may_be_leased(limit: Limit) -> bool:
    return (
        limit.algorithm in _LEASED
        and not limit.strict
        and not limit.shadow
        and limit.amount >= _PART * _LEAST_TOKENS
    )


async def _close(pool: LeasePool) -> None:
    with contextlib.suppress(MeshError):  # what is not given back counts as spent
        await pool.close()
