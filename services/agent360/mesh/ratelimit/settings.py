"""What can be set of the ratelimit service, with its defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Final

from pydantic import AfterValidator, Field

from agent360.mesh.runtime.redis import RedisSettings, check_redis_url
from agent360.mesh.runtime.settings import ServerSettings

MEMORY: Final = "memory://"


def _check_store_url(url: str) -> str:
    return url if url == MEMORY else check_redis_url(url)


class RateLimitSettings(ServerSettings):
    """What can be set of the ratelimit service.

    Example:
        >>> RateLimitSettings(limits=Path("limits.toml"))
    """

    service: ClassVar[str] = "ratelimit"
    default_port: ClassVar[int] = 7362

    store: Annotated[str, AfterValidator(_check_store_url)] = MEMORY
    """Where counts are kept: ``memory://``, in this process; or shared by all replicas:
    ``redis://HOST:PORT/DB``, ``rediss://...`` with TLS, ``redis+cluster://HOST:PORT,HOST:PORT``,
    ``rediss+cluster://...``."""
    limits: Path | None = None
    """TOML file with limits, read again when it changes; None: only those that are set."""
    prefix: str = Field(default="agent360:ratelimit", pattern=r"^[^{}\s]{1,64}$")
    """Of all keys in a shared store: services with different prefixes share nothing."""
    max_counters: int = Field(default=200_000, gt=0)
    """Counts kept at a time in memory; what is whole again goes first."""
    max_reservations: int = Field(default=200_000, gt=0)
    """Reservations remembered at a time in memory, and as many leases."""
    reservation_ttl_s: float = Field(default=600.0, gt=0)
    """When an unsettled reservation counts as spent, where the request does not say, in seconds."""
    reservations_kept_s: float = Field(default=3_600.0, ge=0)
    """How long after that it can still be settled, in seconds."""
    slot_ttl_s: float = Field(default=60.0, gt=0)
    """When slots come back by themselves, where the request does not say, in seconds."""
    lease_ttl_s: float = Field(default=1.0, gt=0, le=60.0)
    """How long leased tokens may be spent at most, in seconds. A token bucket admits up to this
    much longer at its rate where it is leased from."""
    answer_s: float = Field(default=0.04, gt=0)
    """How long a shared store is waited for before a limit's failure mode decides, in seconds."""
    envoy_tenant: str = Field(default="envoy", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """The tenant of Envoy's questions that name none; see docs/ratelimit.md."""
    redis: RedisSettings = RedisSettings(timeout_s=0.1, wait_timeout_s=0.1)
    """Connections to a shared store."""
