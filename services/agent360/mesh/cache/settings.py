"""What can be set of the cache service, with its defaults."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from agent360.mesh.cache.stores import check_store_url
from agent360.mesh.runtime.settings import ServerSettings, Settings

DAY_S = 86_400.0


class WatchSettings(Settings):
    """How invalidations are told to near caches."""

    journal_size: int = Field(default=4_096, gt=0)
    """Changes remembered for each tenant, for watches that are slow or come back."""
    max_per_tenant: int = Field(default=256, gt=0)
    """Watches that a tenant may have open."""
    heartbeat_s: float = Field(default=15.0, gt=0)
    """How often a watch gives a sign of life, in seconds."""


class ClaimSettings(Settings):
    """How missing entries are filled."""

    fill_timeout_s: float = Field(default=10.0, gt=0)
    """How long a fill may take where the claim does not say, in seconds."""
    max_fill_timeout_s: float = Field(default=300.0, gt=0)
    """A longer time is cut to this, in seconds."""
    max_open: int = Field(default=50_000, gt=0)
    """Keys that may be being filled at a time."""


class CacheSettings(ServerSettings):
    """What can be set of the cache service.

    Example:
        >>> CacheSettings(max_bytes=64 * 2**20, default_ttl_s=600)
    """

    service: ClassVar[str] = "cache"
    default_port: ClassVar[int] = 7361

    store: Annotated[str, AfterValidator(check_store_url)] = "memory://"
    """Where entries are kept: ``memory://``, in this process."""
    max_bytes: int = Field(default=256 * 2**20, ge=2**16)
    """Bytes of all entries, keys and bookkeeping included."""
    max_entries: int = Field(default=1_000_000, gt=0)
    """Number of all entries."""
    max_value_bytes: int = Field(default=8 * 2**20, gt=0)
    """Largest value; a larger one is refused."""
    max_namespaces_per_tenant: int = Field(default=1_000, gt=0)
    """Namespaces that a tenant may have."""
    default_ttl_s: float = Field(default=3_600.0, gt=0)
    """How long an entry is fresh where the request does not say, in seconds."""
    max_ttl_s: float = Field(default=30 * DAY_S, gt=0)
    """Longer TTLs and stale TTLs are cut to this, in seconds."""
    claims: ClaimSettings = ClaimSettings()
    """How missing entries are filled."""
    watch: WatchSettings = WatchSettings()
    """How invalidations are told to near caches."""
