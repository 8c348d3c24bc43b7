"""What is known of a backend and of a model: health, warmth, load and latency."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from agent360.mesh.inference.ports import Backend
from agent360.mesh.inference.settings import ModelSettings

_FAILURES_UNTIL_AVOIDED: Final = 2
_FAILURES_UNTIL_DOWN: Final = 3
_LATENCIES_KEPT: Final = 128
_NEW_LATENCY_SHARE: Final = 0.3
_FADING_S: Final = 30.0
_LATENCY_FORGOTTEN_S: Final = 300.0


class Health(Enum):
    """Whether a model or a backend can be used now."""

    UNKNOWN = 0
    READY = 1
    DEGRADED = 2
    UNAVAILABLE = 3
    WARMING = 4


@dataclass(slots=True, eq=False)
class Member:
    """A backend and what is known of it."""

    backend: Backend
    probed: bool
    """Whether it is asked for its models; without that only work tells how it is."""
    failures: int = 0
    """Failures in a row, of probes and of work."""
    heard_of: bool = False
    """Whether it has ever answered or failed."""
    running: int = 0
    """Requests it works on now."""
    outstanding_tokens: int = 0
    """Tokens that these will probably take, of prompts and answers."""
    warm: set[str] = field(default_factory=set)
    """Models whose warm-up it has run since it came up."""
    look: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it should be probed at once."""
    _failed_at_work: float = -math.inf
    _latency_s: float = 0.0
    _latency_at: float = -math.inf

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.backend.name

    @property
    def health(self) -> Health:
        """What its last answers say."""
        if not self.heard_of:
            return Health.UNKNOWN
        if self.failures == 0:
            return Health.READY
        return Health.DEGRADED if self.failures < _FAILURES_UNTIL_DOWN else Health.UNAVAILABLE

    def health_of(self, model: ModelSettings) -> Health:
        """Whether a model can be used there now."""
        health = self.health
        return health if health is not Health.READY or self.is_warm(model) else Health.WARMING

    def is_warm(self, model: ModelSettings) -> bool:
        """Whether it has run a model's warm-up, if there is one."""
        return not model.warm_up or model.name in self.warm

    def rank(self, model: ModelSettings) -> int:
        """How fit it is to be asked, 0 the fittest: answering, not warmed up, failing, down.

        A lone failure does not count: where all backends fail now and then, those that just did
        would leave all requests to the one that did not.
        """
        if self.failures >= _FAILURES_UNTIL_DOWN:
            return 3
        if self.failures >= _FAILURES_UNTIL_AVOIDED:
            return 2
        return 0 if self.is_warm(model) else 1

    def latency_s(self, now: float) -> float | None:
        """Moving average of the time its answers took, in seconds; None: none lately.

        It fades with age, so that a backend once slow is tried again.
        """
        age = now - self._latency_at
        return None if age > _LATENCY_FORGOTTEN_S else self._latency_s * 0.5 ** (age / _FADING_S)

    def worked(self, now: float, took_s: float) -> None:
        """Notes an answer to a request, and how long it took in seconds."""
        self.heard_of, self.failures = True, 0
        known = now - self._latency_at <= _LATENCY_FORGOTTEN_S
        share = _NEW_LATENCY_SHARE if known else 1.0
        self._latency_s += share * (took_s - self._latency_s)
        self._latency_at = now

    def answered_probe(self, now: float, forgiven_after_s: float) -> None:
        """Notes an answer to a probe.

        A server that lists its models may still fail to run them: failures at work are forgiven
        only when the last one is so long ago, and the next request then tells.
        """
        self.heard_of = True
        if now - self._failed_at_work >= forgiven_after_s:
            self.failures = 0

    def failed(self, now: float, *, at_work: bool) -> None:
        """Notes a failure that is the backend's.

        Args:
            now: seconds on the monotonic clock.
            at_work: whether it failed though it could be reached, so that a probe proves nothing.
        """
        self.heard_of = True
        self.failures += 1
        if at_work:
            self._failed_at_work = now
        if self.health is Health.UNAVAILABLE:
            self.warm.clear()
        self.look.set()


@dataclass(slots=True)
class ModelLoad:
    """What a model is doing."""

    running: int = 0
    """Requests it works on now."""
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES_KEPT))
    """Times of its recent answers."""

    def latency_s(self, *quantiles: float) -> list[float | None]:
        """Quantiles of the times of its recent answers; None where there are none."""
        known = sorted(self.latencies_s)
        last = len(known) - 1
        return [known[round(quantile * last)] if known else None for quantile in quantiles]
