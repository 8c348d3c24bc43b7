"""Alert rules, and the texts that they fill in."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from agent360.mesh.metrics.queries.query import TENANT_LABEL, Query

Labels = tuple[tuple[str, str], ...]
"""Names and values, sorted by name."""

RULE_LABEL: Final = "alertname"
"""The label of an alert that holds its rule's id, as in Prometheus."""

COMPARISONS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}

_PLACE: Final = re.compile(r"\{\{\s*(.*?)\s*\}\}", re.DOTALL)
_KNOWN: Final = re.compile(r"\$?(?:(value)|labels(?:\.([a-zA-Z_][a-zA-Z0-9_]*))?)")


@dataclass(frozen=True, slots=True)
class AlertRule:
    """A condition that is watched. All durations are seconds."""

    tenant: str
    """Whose rule it is."""
    rule_id: str
    query: Query
    """What is computed; the range is that of the window."""
    window_s: int
    comparison: str
    """A key of ``COMPARISONS``."""
    threshold: float
    short_window_s: int = 0
    """A second window over which the condition must hold, too; 0: none."""
    divide_by: Query | None = None
    at_least: float = 0.0
    """Groups with a lower value of ``divide_by``, or without it fewer samples, are left out."""
    for_s: float = 0.0
    """How long the condition must hold at every evaluation before the alert fires."""
    keep_firing_for_s: float = 0.0
    """How long the alert goes on firing after the condition last held."""
    labels: Labels = ()
    """Added to those of the group."""
    annotations: Labels = ()
    """Texts for people."""
    built_in: bool = False

    @property
    def windows_s(self) -> tuple[int, ...]:
        """The windows, in seconds; the first gives the value that is shown."""
        return (self.window_s, self.short_window_s) if self.short_window_s else (self.window_s,)

    def labels_of(self, group: Labels) -> Labels:
        """The labels of the alert of a group; those of the rule win."""
        found = {name: value for name, value in group if value}
        if self.query.tenant is not None or TENANT_LABEL not in found:
            found[TENANT_LABEL] = self.tenant
        found |= dict(self.labels) | {RULE_LABEL: self.rule_id}
        return tuple(sorted(found.items()))


def unknown_places(text: str) -> list[str]:
    """What stands in double braces in a text and cannot be filled in."""
    return [place for place in _PLACE.findall(text) if _KNOWN.fullmatch(place) is None]


def filled_in(text: str, labels: Labels, value: float) -> str:
    """A text with ``{{value}}``, ``{{labels}}`` and ``{{labels.NAME}}`` replaced.

    The forms of Prometheus, with a dollar sign, are understood, too.

    Example:
        >>> filled_in("{{labels.model}}: {{value}} s", (("model", "m"),), 0.25)
        'm: 0.25 s'
    """
    known = dict(labels)

    def fill(match: re.Match[str]) -> str:
        found = _KNOWN.fullmatch(match[1])
        if found is None:
            return match[0]
        if found[1]:
            return f"{value:.6g}"
        if found[2]:
            return known.get(found[2], "")
        return ", ".join(f"{name}={text}" for name, text in labels)

    return _PLACE.sub(fill, text)
