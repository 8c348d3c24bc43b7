"""The cache service: bounded entries of many tenants, filled by one caller at a time."""

from agent360.mesh.cache.servicer import CacheServicer
from agent360.mesh.cache.settings import CacheSettings

__all__ = ["CacheServicer", "CacheSettings"]
