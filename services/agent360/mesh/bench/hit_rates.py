"""Hit rates: the cache's own policy beside LRU and theine, on three made-up traces."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from typing import Final
from zlib import crc32

import theine

from agent360.mesh.cache.admission import Bounds
from agent360.mesh.cache.entry import Payload
from agent360.mesh.cache.ports import Timer
from agent360.mesh.cache.replica import Limits
from agent360.mesh.cache.service import CacheService
from agent360.mesh.cache.stores.memory import MemoryStore

KEYS: Final = 100_000
CAPACITY: Final = 1_000
OPERATIONS: Final = 1_000_000

_HOT_SETS: Final = 5
_BURST: Final = 2_000
_SEED: Final = 20_170_701
_ROOMY_BYTES: Final = 1 << 40

Trace = list[str]
"""Keys in the order in which they are asked for; a missing one is written."""

HitRates = dict[str, dict[str, float]]
"""By trace and policy (ours, lru, theine, fixed)."""


def zipf(operations: int = OPERATIONS) -> Trace:
    """Key number r of ``KEYS`` is asked for 1/r as often as the first."""
    return list(islice(_zipf(random.Random(_SEED)), operations))


def scan(operations: int = OPERATIONS) -> Trace:
    """The same, interrupted by scans of keys that never come again: one third of all."""
    usual = _zipf(random.Random(_SEED + 1))
    trace: Trace = []
    while len(trace) < operations:
        trace += islice(usual, 2 * _BURST)
        trace += (f"scan-{number}" for number in range(len(trace), len(trace) + _BURST))
    return trace[:operations]


def shift(operations: int = OPERATIONS) -> Trace:
    """The same with another order of the keys after every fifth: five hot sets in turn."""
    chance = random.Random(_SEED + 2)
    part = operations // _HOT_SETS
    return [key for _ in range(_HOT_SETS) for key in islice(_zipf(chance), part)]


TRACES: Final[dict[str, Callable[[int], Trace]]] = {"zipf": zipf, "scan": scan, "shift": shift}


def _zipf(chance: random.Random) -> Iterator[str]:
    keys = [f"key-{number}" for number in range(KEYS)]
    chance.shuffle(keys)
    weights = list(accumulate(1 / rank for rank in range(1, KEYS + 1)))
    while True:
        yield from chance.choices(keys, cum_weights=weights, k=10_000)


def ours(trace: Trace) -> float:
    """The hit rate of the cache service's domain, with its store in memory."""
    bounds = Bounds(CAPACITY, _ROOMY_BYTES)
    store = MemoryStore(bounds, max_namespaces=1, now=0.0, hash_key=lambda key: crc32(key.encode()))
    limits = Limits(max_value_bytes=bounds.size_bytes, max_entry_bytes=bounds.size_bytes)
    service = CacheService(store, _StillClock(), limits, _NoAudit())
    space = service.space("bench", "bench")
    payload = Payload(b"", ttl_s=3_600.0)
    find, note_reads, write = service.find, service.note_reads, service.write
    hits = 0
    for key in trace:
        if find(space, key, 0.0, False) is None:
            write(space, key, payload, 0.0)
        else:
            hits += 1
            note_reads()
    return hits / len(trace)


def lru(trace: Trace) -> float:
    """The hit rate of what was used last."""
    held: OrderedDict[str, None] = OrderedDict()
    hits = 0
    for key in trace:
        if key in held:
            hits += 1
            held.move_to_end(key)
        else:
            held[key] = None
            if len(held) > CAPACITY:
                held.popitem(last=False)
    return hits / len(trace)


def plain_theine(trace: Trace) -> float:
    """The hit rate of theine as it comes."""
    cache: theine.Cache[str, bool] = theine.Cache(CAPACITY)
    hits = 0
    try:
        for key in trace:
            _, found = cache.get(key)
            if found:
                hits += 1
            else:
                cache.set(key, True)
    finally:
        cache.close()
    return hits / len(trace)


def fixed(trace: Trace) -> float:
    """The hit rate of the set of keys that is best for the whole trace, there from the start."""
    return sum(count for _, count in Counter(trace).most_common(CAPACITY)) / len(trace)


POLICIES: Final[dict[str, Callable[[Trace], float]]] = {
    "ours": ours,
    "theine": plain_theine,
    "lru": lru,
    "fixed": fixed,
}


def measure_hit_rates(operations: int, report: Callable[[str], None]) -> HitRates:
    """Runs all policies on all traces; takes about a minute for a million operations.

    Args:
        operations: length of each trace.
        report: told of progress.
    """
    found: HitRates = {}
    for name, make in TRACES.items():
        report(f"hit rates: {name}")
        trace = make(operations)
        found[name] = {policy: run(trace) for policy, run in POLICIES.items()}
    return found


class _StillClock:
    """The port ``Clock``, for what takes no time."""

    def now(self) -> float:
        return 0.0

    def wall_us(self) -> int:
        return 0

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        raise NotImplementedError


class _NoAudit:
    """The port ``AuditTrail``, kept nowhere."""

    def invalidated(self, tenant: str, namespace: str, scope: str, removed: int) -> None:
        """Nothing is invalidated."""
