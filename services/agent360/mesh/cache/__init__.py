"""The cache service: entries of many tenants, bounded, invalidated together, filled by one caller."""

from agent360.mesh.cache.servicer import CacheServicer
from agent360.mesh.cache.settings import CacheSettings

__all__ = ["CacheServicer", "CacheSettings"]
