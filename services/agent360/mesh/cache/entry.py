"""An entry of the cache, and the namespace of a tenant that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, NamedTuple

from agent360.mesh.cache.doorkeeper import Doorkeeper
from agent360.mesh.cache.policy import DEFAULT_POLICY, Admission, NamespacePolicy

if TYPE_CHECKING:
    from agent360.mesh.cache.admission import Segment

OVERHEAD_BYTES: Final = 700
"""What an entry takes beside its texts and its value: objects, tables and queues, as measured."""
TAG_OVERHEAD_BYTES: Final = 200
"""What one tag of an entry takes beside its text."""


class Payload(NamedTuple):
    """What a caller asks to have stored."""

    value: bytes
    """The value; may be empty."""
    ttl_s: float
    """How long it is fresh, in seconds."""
    stale_ttl_s: float = 0.0
    """How long after that it may be served stale."""
    content_type: str = ""
    """Media type of the value."""
    tags: Sequence[str] = ()
    """Labels to invalidate it by."""


class Entry:
    """A stored value. Entries are compared by identity.

    Invariant: ``segment`` is None exactly when the entry is no longer held.
    """

    __slots__ = (
        "content_type",
        "fresh_until",
        "generation",
        "gone_at",
        "key",
        "key_hash",
        "reads",
        "reads_epoch",
        "segment",
        "size_bytes",
        "space",
        "stale_until",
        "tags",
        "tick",
        "ttl_s",
        "value",
        "version",
    )

    def __init__(self, space: Space, key: str, key_hash: int) -> None:
        self.space = space
        self.key = key
        self.key_hash = key_hash
        self.generation = space.generation
        self.segment: Segment | None = None
        self.reads = 0
        self.reads_epoch = 0
        self.tick = 0
        self.size_bytes = 0
        self.version = 0
        self.value = b""
        self.content_type = ""
        self.tags: tuple[str, ...] = ()
        self.ttl_s = 0.0
        self.fresh_until = 0.0
        self.stale_until = 0.0
        """Until then it may be served stale where the caller allows that."""
        self.gone_at = 0.0
        """Until then it is kept: stale, or for the fail-safe of its namespace."""

    @property
    def reachable(self) -> bool:
        """Whether the entry is of its namespace's present version."""
        return self.generation == self.space.generation

    def write(self, payload: Payload, fresh_until: float, version: int, size_bytes: int) -> None:
        """Takes over a payload; the caller accounts for the change of ``size_bytes``."""
        value, ttl_s, stale_ttl_s, content_type, tags = payload
        self.value = value
        self.content_type = content_type
        self.tags = tuple(dict.fromkeys(tags)) if tags else ()
        self.ttl_s = ttl_s
        self.fresh_until = fresh_until
        self.stale_until = fresh_until + stale_ttl_s
        fail_safe_s = self.space.policy.fail_safe_s
        self.gone_at = fresh_until + max(stale_ttl_s, fail_safe_s)
        self.version = version
        self.size_bytes = size_bytes


def size_of(key: str, payload: Payload) -> int:
    """Bytes that an entry takes, bookkeeping included."""
    size = len(payload.value) + _text_bytes(key) + len(payload.content_type) + OVERHEAD_BYTES
    for tag in payload.tags:
        size += _text_bytes(tag) + TAG_OVERHEAD_BYTES
    return size


def _text_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


@dataclass(slots=True)
class Counts:
    """What happened in a namespace since the service started; every count is exact."""

    hits: int = 0
    """Lookups that found a fresh entry in this replica's memory."""
    shared_hits: int = 0
    """Lookups that found a fresh entry in the shared store."""
    stale_hits: int = 0
    """Lookups that were answered with a stale entry."""
    fail_safe_hits: int = 0
    """Those of them in which it stood in because loading failed or the shared store was away."""
    degraded: int = 0
    """Lookups that were answered while the shared store was away."""
    misses: int = 0
    """Lookups that found nothing."""
    sets: int = 0
    """Entries written."""
    admissions: int = 0
    """Entries the admission policy let in."""
    rejections: int = 0
    """Entries the admission policy refused."""
    evictions: int = 0
    """Entries pushed out for want of room."""
    expirations: int = 0
    """Entries that ended by their TTL."""
    invalidations: int = 0
    """Entries removed by Delete or Invalidate."""
    fills: int = 0
    """Fills by claimers."""
    fill_time_s: float = 0.0
    """Time between claim and fill, added up, in seconds."""
    fill_failures: int = 0
    """Claims whose filler failed or let its token expire."""

    @property
    def hit_ratio(self) -> float:
        """Fresh hits as a part of all lookups; 0 if there were none."""
        hits = self.hits + self.shared_hits
        lookups = hits + self.stale_hits + self.misses
        return hits / lookups if lookups else 0.0

    def add(self, other: Counts) -> None:
        """Adds the counts of another namespace."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


class Space:
    """A namespace of a tenant on this replica.

    Invariant: ``entries`` and ``tags`` hold exactly the held entries of the space's ``generation``,
    and ``size_bytes`` is the sum of their sizes.
    """

    __slots__ = (
        "counts", "doorkeeper", "entries", "generation", "name", "policy", "salt", "size_bytes",
        "tags", "tenant", "version",
    )  # fmt: skip

    def __init__(self, tenant: str, name: str, policy: NamespacePolicy = DEFAULT_POLICY) -> None:
        self.tenant = tenant
        self.name = name
        self.policy = policy
        self.doorkeeper = (
            Doorkeeper(policy.doorkeeper_window_s)
            if policy.admission is Admission.DOORKEEPER
            else None
        )
        self.salt = hash((tenant, name))
        self.generation = 1
        """Tells entries that are held from those that were dropped all at once."""
        self.version = 1
        """The namespace's version, as its callers see it."""
        self.entries: dict[str, Entry] = {}
        self.tags: dict[str, dict[Entry, None]] = {}
        self.size_bytes = 0
        self.counts = Counts()
