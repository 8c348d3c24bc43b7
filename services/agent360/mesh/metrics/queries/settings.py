"""What can be set of queries, with its defaults."""

from __future__ import annotations

from pydantic import Field

from agent360.mesh.runtime.settings import Settings


class QuerySettings(Settings):
    """What queries may cost."""

    max_rollups: int = Field(default=10_000_000, gt=0)
    """Series times buckets of time that one query may read."""
    max_points: int = Field(default=1_000_000, gt=0)
    """Groups times steps of one answer."""
    at_once: int = Field(default=4, gt=0)
    """Queries that are worked on at a time; others wait for their turn."""
    cache_bytes: int = Field(default=64 << 20, ge=0)
    """Memory for what was computed of steps that are over; 0: nothing is kept."""
    cache_tenant_bytes: int = Field(default=16 << 20, ge=0)
    """Of that, the most that one tenant may use."""
    cache_max_age_s: float = Field(default=60.0, gt=0)
    """Where replicas share a store, what was kept is read again after so many seconds: samples
    that come late to another replica are seen then. With SQLite they are seen at once."""
    max_watches: int = Field(default=200, gt=0)
    """Watches that may be open at a time."""
    max_tenant_watches: int = Field(default=50, gt=0)
    """Of these, the most that one tenant may have."""
