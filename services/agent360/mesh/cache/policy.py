"""What holds for the entries of a namespace: which are let in, how long, and what if it fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from agent360.mesh.cache.entry import Payload

DEFAULT_TTL_S: Final = 0.0
"""Stands for a TTL that the caller did not give."""
DEFAULT_STALE_TTL_S: Final = -1.0
"""Stands for a stale TTL that the caller did not give."""


class Admission(Enum):
    """Which entries of a namespace are let in."""

    TINYLFU = auto()
    """All; where there is no room, those that are used more than what they would push out."""
    ALWAYS = auto()
    """All, whatever they push out of their tenant's share."""
    DOORKEEPER = auto()
    """Those whose key was asked for several times of late."""
    NEVER = auto()
    """None."""


@dataclass(frozen=True, slots=True)
class NamespacePolicy:
    """The policy of a namespace. All durations are in seconds.

    Example:
        >>> NamespacePolicy(admission=Admission.DOORKEEPER, ttl_s=60.0, ttl_jitter=0.1)
    """

    admission: Admission = Admission.TINYLFU
    """Which entries are let in."""
    doorkeeper_accesses: int = 2
    """How often a key is to be asked for before its entry is let in."""
    doorkeeper_window_s: float = 60.0
    """Within which time."""
    max_value_bytes: int = 1 << 62
    """A larger value is not let in."""
    content_types: tuple[str, ...] = ()
    """Patterns of the media types that are let in; empty: all."""
    refused_content_types: tuple[str, ...] = ()
    """Patterns of media types that are not."""
    ttl_s: float = 3_600.0
    """How long an entry is fresh where its writer does not say."""
    ttl_by_content_type: Mapping[str, float] = field(default_factory=dict)
    """The same by patterns of the media type; the first that fits counts."""
    ttl_jitter: float = 0.0
    """Every TTL is made longer or shorter by chance, by at most this part of it."""
    stale_ttl_s: float = 0.0
    """How long an entry may be served stale where its writer does not say."""
    fail_safe_s: float = 0.0
    """How long after its TTL an entry may stand in when loading fails or the store is away."""
    fail_safe_pause_s: float = 1.0
    """How long after a failure the entry stands in before loading is tried again."""
    eager_refresh: float = 0.0
    """The part of its TTL after which an entry is refreshed by the first who claims it; 0: not."""
    error_when_away: bool = False
    """Whether a lookup that only the shared store could answer fails while that is away."""

    def settled(self, payload: Payload) -> Payload:
        """The payload with its TTLs as they will be: defaults filled in, varied by chance."""
        ttl_s, stale_ttl_s = payload.ttl_s, payload.stale_ttl_s
        if ttl_s == DEFAULT_TTL_S:
            ttl_s = self._ttl_s_of(payload.content_type)
        if stale_ttl_s == DEFAULT_STALE_TTL_S:
            stale_ttl_s = self.stale_ttl_s
        if self.ttl_jitter:
            ttl_s *= 1.0 + self.ttl_jitter * random.uniform(-1.0, 1.0)
        return payload._replace(ttl_s=ttl_s, stale_ttl_s=stale_ttl_s)

    def takes(self, payload: Payload) -> bool:
        """Whether the policy lets in values of this size and media type at all."""
        if self.admission is Admission.NEVER or len(payload.value) > self.max_value_bytes:
            return False
        kind = payload.content_type
        if self.content_types and not _fits_any(kind, self.content_types):
            return False
        return not _fits_any(kind, self.refused_content_types)

    def _ttl_s_of(self, content_type: str) -> float:
        for pattern, ttl_s in self.ttl_by_content_type.items():
            if fnmatchcase(content_type, pattern):
                return ttl_s
        return self.ttl_s


DEFAULT_POLICY: Final = NamespacePolicy()

PolicyOf = Callable[[str, str], NamespacePolicy]
"""The policy of a tenant's namespace."""


class Rule(NamedTuple):
    """Which namespaces a policy is for; patterns as in a shell."""

    tenants: tuple[str, ...]
    namespaces: tuple[str, ...]
    policy: NamespacePolicy


def policies_by_rule(rules: Sequence[Rule], otherwise: NamespacePolicy) -> PolicyOf:
    """Finds policies: that of the first rule that fits, or ``otherwise``."""

    def policy_of(tenant: str, namespace: str) -> NamespacePolicy:
        for rule in rules:
            if _fits_any(tenant, rule.tenants) and _fits_any(namespace, rule.namespaces):
                return rule.policy
        return otherwise

    return policy_of


def _fits_any(text: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in patterns)
