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
        "_failures_in_row",
        "_open_for_s",
        "_open_until",
        "_probing",
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

    def allowed_at(self) -> float:
        """When a request may pass, on the clock: in the past if now; infinity while one probes."""
        if self._open_until is None:
            return -math.inf
        return math.inf if self._probing else self._open_until

    def enter(self) -> bool:
        """Lets a request pass that ``allowed_at`` allows; whether it is a probe."""
        if self._open_until is None:
            return False
        self._probing = True
        return True

    def succeeded(self, *, probe: bool) -> None:
        """The backend answered, or began to."""
        self._failures_in_row = 0
        if self._open_until is None:
            self._window.add(self._clock(), failed=False)
        elif probe:
            self._probing = False
            self._open_until = None
            self._open_for_s = self.settings.open_s
            self._window.clear()
            self._tell(State.CLOSED)

    def failed(self, *, probe: bool, why: str = "") -> None:
        """The backend failed. What was sent before it opened says nothing new."""
        if not self.settings.enabled:
            return
        self.why = why
        now, settings = self._clock(), self.settings
        if self._open_until is not None:
            if probe:
                self._probing = False
                self._open_for_s = min(2 * self._open_for_s, settings.max_open_s)
                self._open(now)
            return
        self._failures_in_row += 1
        self._window.add(now, failed=True)
        tries, failures = self._window.counts(now)
        if self._failures_in_row >= settings.consecutive_failures or (
            tries >= settings.min_tries and failures >= settings.failure_share * tries
        ):
            self._open(now)

    def left(self, *, probe: bool) -> None:
        """A request ended without telling how the backend is."""
        if probe:
            self._probing = False

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

    def allowed_at(self, backend: str, model: str) -> float:
        """When a backend may be asked for a model, on the clock; in the past if now."""
        at = self.of(backend).allowed_at()
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

    def allows(self, backend: str, model: str) -> bool:
        """Whether a backend may be asked for a model now."""
        return self.allowed_at(backend, model) <= self._clock()

    def why(self, backends: Iterable[str]) -> str:
        """Why backends are left alone, for people."""
        return "; ".join(
            f"{name} failed too often, the last time with {breaker.why}"
            if (breaker := self.of(name)).state is not State.CLOSED
            else f"{name} asked for a rest"
            for name in backends
        )


_HALVES: Final = 2


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
