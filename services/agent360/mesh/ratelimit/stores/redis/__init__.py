"""Counts that all replicas share, in Redis or a Redis Cluster."""

from agent360.mesh.ratelimit.stores.redis.limit_table import RedisLimitTable
from agent360.mesh.ratelimit.stores.redis.store import RedisStore
from agent360.mesh.ratelimit.stores.redis.usage_table import RedisUsageTable

__all__ = ["RedisLimitTable", "RedisStore", "RedisUsageTable"]
