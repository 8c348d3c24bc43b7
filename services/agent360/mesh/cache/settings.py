"""What can be set of the cache service, with its defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from agent360.mesh.cache.policy import Admission, NamespacePolicy, Rule
from agent360.mesh.cache.stores.urls import check_store_url
from agent360.mesh.runtime.redis import RedisSettings
from agent360.mesh.runtime.settings import ServerSettings, Settings

DAY_S = 86_400.0


class WatchSettings(Settings):
    """How invalidations are told to near caches."""

    journal_size: int = Field(default=4_096, gt=0)
    """Changes remembered for each tenant, for watches that are slow or come back."""
    max_per_tenant: int = Field(default=256, gt=0)
    """Watches that a tenant may have open."""
    heartbeat_s: float = Field(default=5.0, gt=0)
    """How often a watch gives a sign of life, in seconds."""


class ClaimSettings(Settings):
    """How missing entries are filled."""

    fill_timeout_s: float = Field(default=10.0, gt=0)
    """How long a fill may take where the claim does not say, in seconds."""
    max_fill_timeout_s: float = Field(default=300.0, gt=0)
    """A longer time is cut to this, in seconds."""
    max_open: int = Field(default=10_000, gt=0)
    """Keys of a tenant that may be being filled at a time."""


class PolicySettings(Settings):
    """What holds for the entries of a namespace."""

    admission: Literal["tinylfu", "always", "doorkeeper", "never"] = "tinylfu"
    """Which entries are let in. ``tinylfu``: all; in memory, those that are used more than what
    they would push out. ``always``: all, whatever they push out. ``doorkeeper``: those whose key
    was asked for ``doorkeeper_accesses`` times of late. ``never``: none."""
    doorkeeper_accesses: int = Field(default=2, gt=0)
    """How often a key is to be asked for before its entry is let in."""
    doorkeeper_window_s: float = Field(default=60.0, gt=0)
    """Within which time, in seconds; counts age with the window."""
    max_value_bytes: int = Field(default=0, ge=0)
    """A larger value is not let in; 0: the service's ``max_value_bytes`` alone counts."""
    content_types: tuple[str, ...] = ()
    """Patterns such as ``text/*`` of the media types that are let in; empty: all."""
    refused_content_types: tuple[str, ...] = ()
    """Patterns of media types that are not."""
    ttl_s: float = Field(default=0.0, ge=0)
    """How long an entry is fresh where its writer does not say; 0: the service's default."""
    ttl_by_content_type: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """The same by patterns of the media type; the first that fits counts."""
    ttl_jitter: float = Field(default=0.1, ge=0, lt=1)
    """Every TTL is made longer or shorter by chance, by at most this part of it, so that what was
    written together does not end together."""
    stale_ttl_s: float = Field(default=0.0, ge=0)
    """How long an entry may be served stale where its writer does not say, in seconds."""
    fail_safe_s: float = Field(default=0.0, ge=0)
    """How long after its TTL an entry may stand in when loading fails or the shared store is away,
    in seconds; 0: it does not."""
    fail_safe_pause_s: float = Field(default=1.0, ge=0)
    """How long after a failure the entry stands in before loading is tried again, in seconds."""
    eager_refresh: float = Field(default=0.0, ge=0, lt=1)
    """The part of its TTL after which the first who claims an entry refreshes it; 0: nobody."""
    when_away: Literal["miss", "error"] = "miss"
    """What a lookup gets that only the shared store could answer while that is away: a miss that
    says so, or UNAVAILABLE."""

    def policy(self, default_ttl_s: float) -> NamespacePolicy:
        """The policy in the domain's terms."""
        return NamespacePolicy(
            admission=Admission[self.admission.upper()],
            doorkeeper_accesses=self.doorkeeper_accesses,
            doorkeeper_window_s=self.doorkeeper_window_s,
            max_value_bytes=self.max_value_bytes or 1 << 62,
            content_types=self.content_types,
            refused_content_types=self.refused_content_types,
            ttl_s=self.ttl_s or default_ttl_s,
            ttl_by_content_type=self.ttl_by_content_type,
            ttl_jitter=self.ttl_jitter,
            stale_ttl_s=self.stale_ttl_s,
            fail_safe_s=self.fail_safe_s,
            fail_safe_pause_s=self.fail_safe_pause_s,
            eager_refresh=self.eager_refresh,
            error_when_away=self.when_away == "error",
        )


class NamespaceSettings(PolicySettings):
    """The policy of some namespaces."""

    namespaces: tuple[str, ...] = ("*",)
    """Names or patterns as in a shell; the first group that fits a namespace counts."""
    tenants: tuple[str, ...] = ("*",)
    """Of which tenants; names or patterns."""


class TenantQuota(Settings):
    """What the entries of one tenant may take of this replica's memory."""

    tenants: tuple[str, ...] = ("*",)
    """Of which tenants; names or patterns. The first group that fits a tenant counts."""
    max_bytes: int = Field(default=0, ge=0)
    """Bytes; 0: as many as the service has."""
    max_entries: int = Field(default=0, ge=0)
    """Entries; 0: as many as the service has."""


class SharedSettings(Settings):
    """The store that replicas share."""

    prefix: str = Field(default="agent360:cache", pattern=r"^[^{}\s]{1,64}$")
    """Of all keys and of the channel: services with different prefixes share nothing."""
    shards: int = Field(default=0, ge=0, le=256)
    """Into how many slots of a cluster each namespace is divided; the same for all replicas.
    0: 16 on a cluster, 1 on a single server."""
    compress_min_bytes: int = Field(default=4_096, ge=0)
    """Values from this size on are compressed with zstd, if that saves a tenth."""
    settle_s: float = Field(default=0.5, ge=0)
    """For how long after an outage entries from before its end are not believed, in seconds: until
    other replicas have made up for what they did meanwhile."""


class CacheSettings(ServerSettings):
    """What can be set of the cache service.

    Example:
        >>> CacheSettings(max_bytes=64 * 2**20, default_ttl_s=600)
    """

    service: ClassVar[str] = "cache"
    default_port: ClassVar[int] = 7361

    store: Annotated[str, AfterValidator(check_store_url)] = "memory://"
    """Where entries are kept: ``memory://``, in this process; or shared by all replicas, with
    copies in this process: ``redis://HOST:PORT/DB``, ``rediss://...`` with TLS,
    ``redis+cluster://HOST:PORT,HOST:PORT``, ``rediss+cluster://...``."""
    max_bytes: int = Field(default=256 * 2**20, ge=2**16)
    """Bytes of all entries in this process, keys and bookkeeping included."""
    max_entries: int = Field(default=1_000_000, gt=0)
    """Number of all entries in this process."""
    max_value_bytes: int = Field(default=8 * 2**20, gt=0)
    """Largest value; a larger one is refused."""
    max_namespaces_per_tenant: int = Field(default=1_000, gt=0)
    """Namespaces that a tenant may have."""
    default_ttl_s: float = Field(default=3_600.0, gt=0)
    """How long an entry is fresh where neither the request nor a policy says, in seconds."""
    max_ttl_s: float = Field(default=30 * DAY_S, gt=0)
    """Longer TTLs and stale TTLs are cut to this, in seconds."""
    default_policy: PolicySettings = PolicySettings()
    """The policy of namespaces that no element of ``policies`` is for."""
    policies: tuple[NamespaceSettings, ...] = ()
    """Policies of namespaces; the first that fits counts."""
    tenant_quotas: tuple[TenantQuota, ...] = ()
    """What tenants may take of this process's memory. Whatever is set here, a tenant never pushes
    out the entries of others that hold less than an equal share."""
    hottest_file: Path | None = None
    """Where ``memory://`` keeps the entries that were read most when the service stops, for warming
    the next run; None: nowhere. A shared store remembers their keys itself."""
    claims: ClaimSettings = ClaimSettings()
    """How missing entries are filled."""
    watch: WatchSettings = WatchSettings()
    """How invalidations are told to near caches."""
    shared: SharedSettings = SharedSettings()
    """The store that replicas share."""
    redis: RedisSettings = RedisSettings()
    """Connections to the store that replicas share."""

    def rules(self) -> tuple[Rule, ...]:
        """The policies of namespaces in the domain's terms."""
        return tuple(
            Rule(each.tenants, each.namespaces, each.policy(self.default_ttl_s))
            for each in self.policies
        )
