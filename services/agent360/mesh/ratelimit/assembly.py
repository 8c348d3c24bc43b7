"""Puts the domain together from the settings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import structlog
from prometheus_client import CollectorRegistry

from agent360.mesh.ratelimit.book import LimitBook, LimitTable, MemoryLimitTable
from agent360.mesh.ratelimit.clock import wall_clock
from agent360.mesh.ratelimit.deadline import Deadline
from agent360.mesh.ratelimit.domain import Domain, LocalDomain
from agent360.mesh.ratelimit.limiter import Limiter
from agent360.mesh.ratelimit.replica_leases import ReplicaLeases
from agent360.mesh.ratelimit.settings import MEMORY, RateLimitSettings
from agent360.mesh.ratelimit.shared_domain import SharedDomain
from agent360.mesh.ratelimit.shared_usage import SharedUsage
from agent360.mesh.runtime.redis import Redis, RedisCollector


class Assembled(NamedTuple):
    """The parts of the service, not started."""

    domain: Domain
    """Decides."""
    limiter: Limiter
    """Decides in memory: the domain itself, or its stand-in while a shared store is away."""
    book: LimitBook
    """Has the limits."""
    connect: Callable[[], Awaitable[None]]
    """Returns when the store can be asked."""
    disconnect: Callable[[], Awaitable[None]]
    """Closes the connections to the store."""


def assemble(
    settings: RateLimitSettings,
    registry: CollectorRegistry,
    log: structlog.stdlib.BoundLogger,
    on_load: Callable[[str], None],
) -> Assembled:
    """The parts that settings ask for.

    Args:
        settings: of the service.
        registry: where Prometheus metrics are registered.
        log: of the service.
        on_load: told what was wrong whenever the limits file was read again.

    Raises:
        LimitsError: the limits file is wrong.
    """
    if settings.store == MEMORY:
        book = LimitBook(settings.limits, MemoryLimitTable(), log, on_load)
        limiter = _limiter(settings, book)
        return Assembled(LocalDomain(limiter), limiter, book, _nothing, _nothing)
    # Imported here: a service with counts of its own needs no Redis client.
    from agent360.mesh.ratelimit.stores.redis import (  # noqa: PLC0415
        RedisLimitTable,
        RedisStore,
        RedisUsageTable,
    )

    redis = Redis(settings.store, settings.redis, log)
    registry.register(RedisCollector(redis))
    table: LimitTable = RedisLimitTable(redis, settings.prefix, log)
    book = LimitBook(settings.limits, table, log, on_load)
    limiter = _limiter(settings, book)
    store = RedisStore(
        redis,
        log,
        prefix=settings.prefix,
        answer_s=settings.answer_s,
        lease_ttl_s=settings.lease_ttl_s,
        records_kept_s=settings.reservations_kept_s,
    )
    usage = SharedUsage(RedisUsageTable(redis, settings.prefix, log), log)
    leases = ReplicaLeases(store, usage)
    domain = SharedDomain(store, limiter, usage, leases, Deadline(settings.answer_s))
    return Assembled(domain, limiter, book, domain.start, domain.close)


def _limiter(settings: RateLimitSettings, book: LimitBook) -> Limiter:
    return Limiter(
        book.limits,
        wall_clock(),
        max_counters=settings.max_counters,
        max_reservations=settings.max_reservations,
        lease_ttl_s=settings.lease_ttl_s,
        reservations_kept_s=settings.reservations_kept_s,
    )


async def _nothing() -> None:
    """Memory needs no connection."""
