"""A circuit breaker for each backend, and the times before which it asked not to be asked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Final

from agent360.mesh.inference.failover.settings import BreakerSettings

Clock = Callable[[], float]
Watcher = Callable[[str, "State", str], None]
"""Is told which backend's breaker has which state now, and why."""


class State(Enum):
    """What a breaker lets through."""

    CLOSED = 0
    """Everything."""
    HALF_OPEN = 1
    """One request at a time, to see how the backend is."""
    OPEN = 2
    """Nothing."""


class Breaker:
    """The breaker of one backend.

    It opens after failures in a row, or when a share of recent tries failed; later one request at
    a time may probe: its success closes the breaker, its failure opens it for twice as long.

    While several tenants use the backend, failures of one of them may be its own requests' fault:
    they do not open the breaker until another's fail too, others probe before it does, and a probe
    of its own that fails does not lengthen the time. Where it was the only one and opened the
    breaker, another that comes probes at once.

    Example:
        >>> breaker = Breaker(BreakerSettings(consecutive_failures=1))
        >>> breaker.enter()
        False
        >>> breaker.failed(probe=False, why="UPSTREAM_STALLED")
        >>> breaker.state
        <State.OPEN: 2>
    """

    __slots__ = (
        "_clock",
        "_failing",
        "_failures_in_row",
        "_open_for_s",
        "_open_until",
        "_probing",
        "_users",
        "_window",
        "name",
        "opened",
        "settings",
        "watchers",
        "why",
    )

    def __init__(
        self,
        settings: BreakerSettings,
        clock: Clock = time.monotonic,
        name: str = "",
        watchers: Iterable[Watcher] = (),
    ) -> None:
        self.name = name
        self.settings = settings
        self.watchers = watchers
        """Are told when it opens and closes."""
        self.opened = 0
        """How often it has opened."""
        self.why = ""
        """The reason of the last failure."""
        self._clock = clock
        self._failures_in_row = 0
        self._failing = _Latest()
        self._users = _Latest()
        self._window = _Window(settings.window_s)
        self._open_until: float | None = None
        self._open_for_s = settings.open_s
        self._probing = False

    @property
    def state(self) -> State:
        """What it lets through now."""
        if self._open_until is None:
            return State.CLOSED
        return State.OPEN if self._clock() < self._open_until else State.HALF_OPEN

    def allowed_at(self, tenant: str | None = None) -> float:
        """When a request of a tenant (None: of any) may pass, on the clock: in the past if now.

        Infinity while one probes; later for the tenant that failed last, if there are others; at
        once for another, if only that one failed.
        """
        if self._open_until is None:
            return -math.inf
        if self._probing:
            return math.inf
        if tenant is None:
            return self._open_until
        now = self._clock()
        if tenant != self._failing.latest:
            alone = not self._failing.several(now - self._lately_s)
            return -math.inf if alone else self._open_until
        if self._is_shared(now):
            return self._open_until + _YIELDS * self._open_for_s
        return self._open_until

    def enter(self) -> bool:
        """Lets a request pass that ``allowed_at`` allows; whether it is a probe."""
        if self._open_until is None:
            return False
        self._probing = True
        return True

    def succeeded(self, *, probe: bool, tenant: str = "") -> None:
        """The backend answered, or began to."""
        self._failures_in_row = 0
        now = self._clock()
        self._users.note(tenant, now)
        if self._open_until is None:
            self._window.add(now, failed=False)
        elif probe:
            self._probing = False
            self._open_until = None
            self._open_for_s = self.settings.open_s
            self._window.clear()
            self._tell(State.CLOSED)

    def failed(self, *, probe: bool, why: str = "", tenant: str = "") -> None:
        """The backend failed. What was sent before it opened says nothing new."""
        if not self.settings.enabled:
            return
        self.why = why
        now, settings = self._clock(), self.settings
        self._users.note(tenant, now)
        again = tenant == self._failing.latest and self._is_shared(now)
        self._failing.note(tenant, now)
        if self._open_until is not None:
            if probe:
                self._probing = False
                if not again:
                    self._open_for_s = min(2 * self._open_for_s, settings.max_open_s)
                self._open(now)
            return
        self._failures_in_row += 1
        self._window.add(now, failed=True)
        if self._is_shared(now) and not self._failing.several(now - settings.window_s):
            return
        tries, failures = self._window.counts(now)
        if self._failures_in_row >= settings.consecutive_failures or (
            tries >= settings.min_tries and failures >= settings.failure_share * tries
        ):
            self._open(now)

    def left(self, *, probe: bool) -> None:
        """A request ended without telling how the backend is."""
        if probe:
            self._probing = False

    def _is_shared(self, now: float) -> bool:
        """Whether more than one tenant used the backend lately."""
        return self._users.several(now - self._lately_s)

    @property
    def _lately_s(self) -> float:
        return self.settings.window_s + self._open_for_s

    def _open(self, now: float) -> None:
        self.opened += 1
        self._failures_in_row = 0
        self._open_until = now + self._open_for_s
        self._tell(State.OPEN)

    def _tell(self, state: State) -> None:
        for told in self.watchers:
            told(self.name, state, self.why)


class Breakers:
    """The breakers of all backends, and their rests.

    A rest is what Retry-After asks for: the backend is not asked for that model before then.
    """

    def __init__(
        self,
        settings: Mapping[str, BreakerSettings] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._settings = settings or {}
        self._clock = clock
        self._breakers: dict[str, Breaker] = {}
        self._rests: dict[tuple[str, str], float] = {}
        self._watchers: list[Watcher] = []
        for name in self._settings:
            self.of(name)

    def of(self, backend: str) -> Breaker:
        """The breaker of a backend."""
        found = self._breakers.get(backend)
        if found is None:
            settings = self._settings.get(backend) or BreakerSettings()
            found = Breaker(settings, self._clock, backend, self._watchers)
            self._breakers[backend] = found
        return found

    def names(self) -> Iterable[str]:
        """The backends that have breakers."""
        return self._breakers.keys()

    def watch(self, watcher: Watcher) -> None:
        """Has somebody told of every breaker that opens or closes."""
        self._watchers.append(watcher)

    def rest(self, backend: str, model: str, seconds: float) -> None:
        """Leaves a backend alone with a model; ``model`` empty: with all."""
        until = self._clock() + min(seconds, self.of(backend).settings.max_rest_s)
        key = (backend, model)
        self._rests[key] = max(until, self._rests.get(key, until))

    def allowed_at(self, backend: str, model: str, tenant: str | None = None) -> float:
        """When a tenant (None: any) may ask a backend for a model, on the clock; past if now."""
        at = self.of(backend).allowed_at(tenant)
        if self._rests:
            now = self._clock()
            for key in ((backend, model), (backend, "")):
                until = self._rests.get(key)
                if until is None:
                    continue
                if until <= now:
                    del self._rests[key]
                else:
                    at = max(at, until)
        return at

    def allows(self, backend: str, model: str, tenant: str | None = None) -> bool:
        """Whether a tenant (None: any) may ask a backend for a model now."""
        return self.allowed_at(backend, model, tenant) <= self._clock()

    def why(self, backends: Iterable[str]) -> str:
        """Why backends are left alone, for people."""
        return "; ".join(
            f"{name} failed too often, the last time with {breaker.why}"
            if (breaker := self.of(name)).state is not State.CLOSED
            else f"{name} asked for a rest"
            for name in backends
        )


_YIELDS: Final = 0.5
"""How much later the tenant that failed last may probe, as a share of the time it was open."""
_HALVES: Final = 2


class _Latest:
    """The two tenants that did something last, and when."""

    __slots__ = ("_at", "_before_at", "latest")

    def __init__(self) -> None:
        self.latest: str | None = None
        self._at = -math.inf
        self._before_at = -math.inf

    def note(self, tenant: str, now: float) -> None:
        if tenant != self.latest:
            self._before_at = self._at
            self.latest = tenant
        self._at = now

    def several(self, since: float) -> bool:
        """Whether there were two since then."""
        return self._before_at >= since


class _Window:
    """Counts of tries in the last one to two halves of a window."""

    __slots__ = ("_half_s", "_halves", "_since")

    def __init__(self, window_s: float) -> None:
        self._half_s = window_s / _HALVES
        self._since = -math.inf
        self._halves = [[0, 0], [0, 0]]

    def add(self, now: float, *, failed: bool) -> None:
        self._turn(now)
        current = self._halves[0]
        current[0] += 1
        current[1] += failed

    def counts(self, now: float) -> tuple[int, int]:
        """Tries and failures."""
        self._turn(now)
        (tries, failures), (tries_before, failures_before) = self._halves
        return tries + tries_before, failures + failures_before

    def clear(self) -> None:
        self._halves = [[0, 0], [0, 0]]

    def _turn(self, now: float) -> None:
        passed = now - self._since
        if passed < self._half_s:
            return
        self._halves = [[0, 0], self._halves[0] if passed < 2 * self._half_s else [0, 0]]
        self._since = now
