"""What can be set of the ratelimit service, with its defaults."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from agent360.mesh.runtime.settings import ServerSettings


class RateLimitSettings(ServerSettings):
    """What can be set of the ratelimit service.

    Example:
        >>> RateLimitSettings(limits=Path("limits.toml"))
    """

    service: ClassVar[str] = "ratelimit"
    default_port: ClassVar[int] = 7362

    store: str = "memory://"
    """Where counts are kept: ``memory://``, in this process."""
    limits: Path | None = None
    """TOML file with the limits; None: nothing is limited."""
    max_counters: int = Field(default=200_000, gt=0)
    """Counts kept at a time; what is whole again goes first."""
    max_reservations: int = Field(default=200_000, gt=0)
    """Reservations remembered at a time."""
    reservation_ttl_s: float = Field(default=600.0, gt=0)
    """When an unsettled reservation counts as spent, where the request does not say, in seconds."""

    @field_validator("store")
    @classmethod
    def _supported(cls, url: str) -> str:
        if url != "memory://":
            raise ValueError(f"the store {url!r} is not supported; supported: memory://")
        return url
