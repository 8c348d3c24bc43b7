"""The cache's domain on a clock of the test's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from agent360.mesh.cache.admission import Bounds
from agent360.mesh.cache.changes import Stored
from agent360.mesh.cache.entry import Entry, Payload, Space
from agent360.mesh.cache.replica import Limits
from agent360.mesh.cache.service import CacheService
from agent360.mesh.cache.stores.memory import MemoryStore

T = TypeVar("T")

ROOMY = Bounds(entries=10_000, size_bytes=64 * 2**20)


@dataclass(eq=False)
class FakeTimer:
    """Something that happens when the clock gets there."""

    when: float
    callback: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakeClock:
    """The port ``Clock``; time passes only by ``advance``."""

    time: float = 1_000.0
    timers: list[FakeTimer] = field(default_factory=list)
    wall_offset_us: int = 1_700_000_000_000_000

    def now(self) -> float:
        return self.time

    def wall_us(self) -> int:
        return self.wall_offset_us + int(self.time * 1e6)

    def call_at(self, when: float, callback: Callable[[], None]) -> FakeTimer:
        timer = FakeTimer(when, callback)
        self.timers.append(timer)
        return timer

    def advance(self, seconds: float) -> None:
        """Lets time pass; what becomes due happens at its own time, in order."""
        end = self.time + seconds
        while due := [each for each in self.timers if not each.cancelled and each.when <= end]:
            timer = min(due, key=lambda each: each.when)
            self.timers.remove(timer)
            self.time = max(self.time, timer.when)
            timer.callback()
        self.time = end
        self.timers = [each for each in self.timers if not each.cancelled]


@dataclass
class Trail:
    """The port ``AuditTrail``, kept in a list."""

    events: list[tuple[str, str, str, int]] = field(default_factory=list)

    def invalidated(self, tenant: str, namespace: str, scope: str, removed: int) -> None:
        self.events.append((tenant, namespace, scope, removed))


class Cache:
    """The service, its store, its clock and its audit trail; ``acme``'s namespace ``plans``."""

    def __init__(
        self,
        bounds: Bounds = ROOMY,
        *,
        max_claims: int = 1_000,
        max_namespaces: int = 100,
        hash_key: Callable[[str], int] = hash,
    ) -> None:
        self.clock = FakeClock()
        self.trail = Trail()
        self.store = MemoryStore(
            bounds, max_namespaces=max_namespaces, now=self.clock.now(), hash_key=hash_key
        )
        numbers = itertools.count(1)
        limits = Limits(
            max_value_bytes=bounds.size_bytes,
            max_entry_bytes=bounds.size_bytes,
            max_claims=max_claims,
        )
        self.service = CacheService(
            self.store, self.clock, limits, self.trail, new_token=lambda: f"token{next(numbers)}"
        )
        self.plans = self.space("acme")

    def space(self, tenant: str, name: str = "plans") -> Space:
        return self.service.space(tenant, name)

    def put(
        self,
        key: str,
        value: bytes = b"v",
        *,
        ttl_s: float = 60.0,
        stale_ttl_s: float = 0.0,
        tags: tuple[str, ...] = (),
        space: Space | None = None,
    ) -> Stored:
        payload = Payload(value, ttl_s, stale_ttl_s, "", tags)
        return self.service.write(space or self.plans, key, payload, self.clock.now())

    def find(self, key: str, *, stale: bool = False, space: Space | None = None) -> Entry | None:
        space, now = space or self.plans, self.clock.now()
        entry = self.service.find(space, key, now, stale)
        if entry is None:
            self.service.note_miss(space, key, now)
        self.service.note_reads()
        return entry

    def value(self, key: str, *, stale: bool = False, space: Space | None = None) -> bytes | None:
        entry = self.find(key, stale=stale, space=space)
        return None if entry is None else entry.value

    def sweep(self) -> None:
        """Lets go of everything that is over."""
        while self.store.sweep(self.clock.now(), 100):
            pass


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that has nothing to wait for."""
    try:
        work.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    work.close()
    raise AssertionError("it waited")
