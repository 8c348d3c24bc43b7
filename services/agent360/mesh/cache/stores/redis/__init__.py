"""Entries that all replicas share, in Redis or a Redis Cluster."""

from agent360.mesh.cache.stores.redis.store import RedisStore

__all__ = ["RedisStore"]
