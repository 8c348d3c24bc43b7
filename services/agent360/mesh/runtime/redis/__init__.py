"""A Redis client for the services: its own pool, routing and circuit breaker around redis-py."""

from agent360.mesh.runtime.redis.client import Redis
from agent360.mesh.runtime.redis.commands import Command
from agent360.mesh.runtime.redis.exposition import RedisCollector
from agent360.mesh.runtime.redis.failures import RedisAwayError
from agent360.mesh.runtime.redis.script import Script
from agent360.mesh.runtime.redis.settings import RedisSettings
from agent360.mesh.runtime.redis.subscription import Subscription
from agent360.mesh.runtime.redis.url import check_redis_url, redacted_url

__all__ = [
    "Command",
    "Redis",
    "RedisAwayError",
    "RedisCollector",
    "RedisSettings",
    "Script",
    "Subscription",
    "check_redis_url",
    "redacted_url",
]
