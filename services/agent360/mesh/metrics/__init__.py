"""The metrics service: measurements rolled up and queried, and audit events, on SQLite."""

from agent360.mesh.metrics.servicer import MetricsServicer
from agent360.mesh.metrics.settings import MetricsSettings

__all__ = ["MetricsServicer", "MetricsSettings"]
