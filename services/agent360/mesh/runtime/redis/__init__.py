"""A Redis client for the services: its own pool, routing and circuit breaker around redis-py.

Its parts are imported when they are asked for: only a service that uses Redis needs redis-py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
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

_HOMES: Final = {
    "Command": "commands",
    "Redis": "client",
    "RedisAwayError": "failures",
    "RedisCollector": "exposition",
    "RedisSettings": "settings",
    "Script": "script",
    "Subscription": "subscription",
    "check_redis_url": "url",
    "redacted_url": "url",
}


def __getattr__(name: str) -> Any:
    """Imports the module that has a name."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
