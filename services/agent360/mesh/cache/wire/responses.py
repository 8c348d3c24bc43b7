"""Fills in answers; in place, because that is what is cheapest."""

from __future__ import annotations

from typing import Any, Final

from agent360.cache.v1 import cache_pb2 as pb
from agent360.mesh.cache.changes import Stored
from agent360.mesh.cache.claims import Claimed
from agent360.mesh.cache.entry import Entry, Space
from agent360.mesh.cache.journal import Change, Event
from agent360.mesh.runtime.validation import set_duration

HIT: Final = pb.OUTCOME_HIT
STALE: Final = pb.OUTCOME_STALE
MISS: Final = pb.OUTCOME_MISS


def write_entry(lookup: Any, entry: Entry, now: float, include_tags: bool) -> None:
    """Fills a Lookup that found an entry."""
    lookup.value = entry.value
    lookup.version = entry.version
    if entry.content_type:
        lookup.content_type = entry.content_type
    remaining_s = entry.fresh_until - now
    ttl = lookup.ttl
    if remaining_s > 0:
        lookup.outcome = HIT
        whole = int(remaining_s)
        ttl.seconds = whole
        ttl.nanos = int((remaining_s - whole) * 1e9)
    else:
        lookup.outcome = STALE
        ttl.SetInParent()
    if include_tags and entry.tags:
        lookup.tags.extend(entry.tags)


def write_lookup(lookup: Any, found: Claimed, now: float, include_tags: bool) -> None:
    """Fills a Lookup."""
    if found.entry is None:
        lookup.outcome = MISS
    else:
        write_entry(lookup, found.entry, now, include_tags)
    if found.degraded:
        lookup.degraded = True
    if found.fail_safe:
        lookup.fail_safe = True


def write_claimed(response: Any, claimed: Claimed, now: float) -> None:
    """Fills a ClaimResponse."""
    write_lookup(response.lookup, claimed, now, include_tags=False)
    grant = claimed.grant
    if grant is not None:
        response.fill_token = grant.token
        set_duration(response.fill_timeout, grant.timeout_s)


def write_stored(response: Any, stored: Stored) -> None:
    """Fills a SetResponse or a FillResponse."""
    response.stored, response.version, response.shared = stored


def write_event(response: Any, event: Event) -> None:
    """Fills a WatchResponse."""
    response.resume_token = event.token
    if event.change is not None:
        _write_change(response.invalidation, event.change)
    elif event.reset:
        response.reset.reason = event.reset
    else:
        response.heartbeat.SetInParent()


def write_stats(stats: Any, space: Space, version: int) -> None:
    """Fills a NamespaceStats."""
    counts = space.counts
    stats.namespace = space.name
    stats.version = version
    stats.l1_hits = counts.hits
    stats.l2_hits = counts.shared_hits
    stats.stale_hits = counts.stale_hits
    stats.misses = counts.misses
    stats.sets = counts.sets
    stats.admissions = counts.admissions
    stats.rejections = counts.rejections
    stats.evictions = counts.evictions
    stats.expirations = counts.expirations
    stats.invalidations = counts.invalidations
    stats.entries = len(space.entries)
    stats.bytes = space.size_bytes
    stats.fills = counts.fills
    set_duration(stats.fill_time, counts.fill_time_s)
    stats.hit_ratio = counts.hit_ratio
    stats.fill_failures = counts.fill_failures
    stats.degraded = counts.degraded
    stats.fail_safe_hits = counts.fail_safe_hits


def _write_change(invalidation: Any, change: Change) -> None:
    invalidation.namespace = change.namespace
    invalidation.version = change.version
    match change.scope:
        case "keys":
            invalidation.keys.keys.extend(change.names)
            invalidation.key_versions.extend(change.versions)
        case "prefix":
            invalidation.prefix = change.names[0]
        case "tags":
            invalidation.tags.tags.extend(change.names)
        case "all":
            invalidation.all = True
