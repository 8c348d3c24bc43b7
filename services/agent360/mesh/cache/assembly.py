"""Puts the service together from its settings."""

from __future__ import annotations

from fnmatch import fnmatchcase

import structlog
from prometheus_client import CollectorRegistry

from agent360.mesh.cache.admission import Bounds
from agent360.mesh.cache.exposition import StoreCollector
from agent360.mesh.cache.last_run import LastRun
from agent360.mesh.cache.policy import policies_by_rule
from agent360.mesh.cache.ports import AuditTrail, Clock
from agent360.mesh.cache.replica import Limits
from agent360.mesh.cache.service import CacheService
from agent360.mesh.cache.settings import CacheSettings
from agent360.mesh.cache.shared_service import SharedCacheService
from agent360.mesh.cache.sharing import SharedStore
from agent360.mesh.cache.stores.memory import MemoryStore
from agent360.mesh.cache.stores.urls import MEMORY, is_cluster

_SHARDS_ON_A_CLUSTER = 16


def assemble(
    settings: CacheSettings,
    clock: Clock,
    audit: AuditTrail,
    registry: CollectorRegistry,
    log: structlog.stdlib.BoundLogger,
) -> CacheService:
    """The service that settings ask for, not started.

    Args:
        settings: of the service.
        clock: that it goes by.
        audit: told of invalidations.
        registry: where its Prometheus metrics are registered.
        log: of the service.
    """
    bounds = Bounds(settings.max_entries, settings.max_bytes)
    policy_of = policies_by_rule(
        settings.rules(), settings.default_policy.policy(settings.default_ttl_s)
    )
    memory = MemoryStore(
        bounds,
        max_namespaces=settings.max_namespaces_per_tenant,
        now=clock.now(),
        quota_of=lambda tenant: _quota(settings, tenant),
        policy_of=policy_of,
    )
    registry.register(StoreCollector(memory, bounds))
    limits = Limits(
        max_value_bytes=settings.max_value_bytes,
        max_entry_bytes=settings.max_bytes,
        max_claims=settings.claims.max_open,
        journal_size=settings.watch.journal_size,
        max_watches=settings.watch.max_per_tenant,
    )
    if settings.store == MEMORY:
        file = settings.hottest_file
        last_run = None if file is None else LastRun(file, clock, log)
        return CacheService(memory, clock, limits, audit, last_run=last_run)
    return SharedCacheService(
        memory,
        _shared_store(settings, clock, registry, log),
        clock,
        limits,
        audit,
        settle_s=settings.shared.settle_s,
        log=log,
    )


def _shared_store(
    settings: CacheSettings,
    clock: Clock,
    registry: CollectorRegistry,
    log: structlog.stdlib.BoundLogger,
) -> SharedStore:
    # Imported here: a service with a store of its own needs neither redis-py nor zstandard.
    from agent360.mesh.cache.stores.redis import RedisStore  # noqa: PLC0415
    from agent360.mesh.cache.stores.redis.codec import Codec  # noqa: PLC0415
    from agent360.mesh.runtime.redis import Redis, RedisCollector  # noqa: PLC0415
    from agent360.mesh.runtime.redis.url import parse_redis_url  # noqa: PLC0415

    redis = Redis(settings.store, settings.redis, log)
    registry.register(RedisCollector(redis))
    shared = settings.shared
    shards = shared.shards or (_SHARDS_ON_A_CLUSTER if is_cluster(settings.store) else 1)
    return RedisStore(
        redis,
        clock,
        Codec(shared.compress_min_bytes),
        log,
        prefix=shared.prefix,
        database=parse_redis_url(settings.store).db,
        shards=shards,
        max_claim_s=settings.claims.max_fill_timeout_s,
    )


def _quota(settings: CacheSettings, tenant: str) -> Bounds:
    for each in settings.tenant_quotas:
        if any(fnmatchcase(tenant, pattern) for pattern in each.tenants):
            return Bounds(
                each.max_entries or settings.max_entries, each.max_bytes or settings.max_bytes
            )
    return Bounds(settings.max_entries, settings.max_bytes)
