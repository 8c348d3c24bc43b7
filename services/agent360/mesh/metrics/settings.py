"""What can be set of the metrics service, with its defaults."""

from __future__ import annotations

from typing import ClassVar, Final

from pydantic import Field, field_validator

from agent360.mesh.runtime.settings import ServerSettings

SCHEME: Final = "sqlite:///"


class MetricsSettings(ServerSettings):
    """What can be set of the metrics service.

    Example:
        >>> MetricsSettings(store="sqlite:////var/lib/agent360/metrics.db")
    """

    service: ClassVar[str] = "metrics"
    default_port: ClassVar[int] = 7363

    store: str = "sqlite:///var/metrics.db"
    """Where measurements are kept: ``sqlite:///path``, or ``sqlite:///:memory:``."""
    max_series_per_tenant: int = Field(default=10_000, gt=0)
    """Series that a tenant may have; samples of further ones are refused."""
    retention_s: float = Field(default=30 * 86_400.0, gt=0)
    """How long measurements are kept, in seconds; audit events are kept for ever."""

    @field_validator("store")
    @classmethod
    def _supported(cls, url: str) -> str:
        if not url.startswith(SCHEME) or url == SCHEME:
            raise ValueError(f"the store {url!r} is not supported; supported: {SCHEME}path")
        return url
