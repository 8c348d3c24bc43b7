"""Silences: conditions on labels whose alerts are not notified for a while."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from agent360.mesh.metrics.alerts.lifecycle import Alert
from agent360.mesh.metrics.queries.query import Matcher

KEPT_S: Final = 5 * 86_400.0
"""How long silences that are over are kept."""


@dataclass(frozen=True, slots=True)
class Silence:
    """Keeps matching alerts of a tenant from being notified. Times are Unix time."""

    tenant: str
    silence_id: str
    matchers: tuple[Matcher, ...]
    start_s: float
    end_s: float

    def covers(self, tenant: str, labels: Mapping[str, str], now_s: float) -> bool:
        """Whether an alert with these labels is silent now."""
        return (
            tenant == self.tenant
            and self.start_s <= now_s < self.end_s
            and all(matcher.holds(labels) for matcher in self.matchers)
        )


def silenced_by(alert: Alert, silences: Iterable[Silence], now_s: float) -> list[str]:
    """The ids of the silences that cover an alert now."""
    labels = dict(alert.labels)
    return [each.silence_id for each in silences if each.covers(alert.tenant, labels, now_s)]
