"""What can be set of the metrics service, with its defaults."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Final

from pydantic import Field, field_validator, model_validator

from agent360.mesh.metrics.alerts.settings import AlertSettings
from agent360.mesh.metrics.queries.settings import QuerySettings
from agent360.mesh.metrics.resolution import Retention
from agent360.mesh.metrics.stores.cassandra.settings import CassandraSettings
from agent360.mesh.metrics.stores.urls import check_store_url
from agent360.mesh.runtime.settings import ServerSettings, Settings

_HOUR_S: Final = 3_600.0
_DAY_S: Final = 86_400.0


class RetentionSettings(Settings):
    """How long things are kept."""

    fine_s: float = Field(default=2 * _DAY_S, gt=0)
    """Rollups of 10 s, in seconds."""
    minute_s: float = Field(default=14 * _DAY_S, gt=0)
    """Those of a minute, in seconds."""
    hour_s: float = Field(default=400 * _DAY_S, gt=0)
    """Those of an hour, in seconds. A series without data for as long is forgotten."""
    logs_s: float = Field(default=14 * _DAY_S, gt=0)
    """Log records, in seconds; whole days are dropped."""
    audit_days: int | None = Field(default=None, gt=0)
    """Audit events: how many days beside the one they were recorded on; None: for ever. Whole days
    are dropped."""

    def policy(self) -> Retention:
        """What holds for rollups, as a domain value."""
        return Retention(self.fine_s, self.minute_s, self.hour_s)


class IntakeSettings(Settings):
    """How samples are taken in."""

    journal: Path | None = None
    """Directory of the journal; None: beside the SQLite file, else below ``var``. Every replica
    needs its own."""
    commit_every_s: float = Field(default=30.0, gt=0)
    """How often rollups go from memory to the store. What is acknowledged is in the journal."""
    max_waiting_bytes: int = Field(default=32 << 20, gt=0)
    """Samples that wait for the journal; beyond that reporters wait."""
    max_memory_bytes: int = Field(default=256 << 20, gt=0)
    """Rollups in memory; at half of it they are stored early, at all of it reporters wait."""
    late_s: float = Field(default=25 * _HOUR_S, gt=0)
    """Samples that are older are refused."""
    early_s: float = Field(default=600.0, gt=0)
    """Samples that are further in the future are refused."""
    reporter_memory_s: float = Field(default=_DAY_S, gt=0)
    """A reporter that sent nothing for as long is forgotten: if it then sent a message again that
    had been taken, it would count twice."""


class OtlpSettings(Settings):
    """What is taken over OTLP."""

    resource_labels: tuple[str, ...] = (
        "service.name",
        "service.namespace",
        "service.version",
        "deployment.environment.name",
    )
    """Attributes of a resource that become labels, with ``_`` for what labels cannot have. Not
    ``service.instance.id``: it is new with every process, and so would all series be."""
    max_cumulative: int = Field(default=100_000, gt=0)
    """Cumulative series that are followed; points of further ones are refused."""


class MetricsSettings(ServerSettings):
    """What can be set of the metrics service.

    Example:
        >>> MetricsSettings(store="sqlite:////var/lib/agent360/metrics.db")
    """

    service: ClassVar[str] = "metrics"
    default_port: ClassVar[int] = 7363

    store: str = "sqlite:///var/metrics.db"
    """Where measurements are kept: ``sqlite:///path``, ``sqlite:///:memory:``, or
    ``cassandra://user:password@h1:9042,h2/keyspace?consistency=LOCAL_QUORUM&dc=dc1&tls=true``."""
    cassandra: CassandraSettings = CassandraSettings()
    """Connections to Cassandra, if the store is one."""
    max_series_per_tenant: int = Field(default=10_000, gt=0)
    """Series that a tenant may have; samples of further ones are refused."""
    retention: RetentionSettings = RetentionSettings()
    """How long rollups are kept."""
    intake: IntakeSettings = IntakeSettings()
    """How samples are taken in."""
    query: QuerySettings = QuerySettings()
    """What queries may cost."""
    alerts: AlertSettings = AlertSettings()
    """Alerts."""
    otlp: OtlpSettings = OtlpSettings()
    """What is taken over OTLP."""

    @field_validator("store")
    @classmethod
    def _supported(cls, url: str) -> str:
        return check_store_url(url)

    @model_validator(mode="after")
    def _late_ones_find_their_hour(self) -> MetricsSettings:
        if self.intake.late_s + _HOUR_S > self.retention.fine_s:
            raise ValueError("retention.fine_s must be an hour more than intake.late_s, or longer")
        return self
