"""How many requests a backend works on at a time: fixed, or found out from how it answers."""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from agent360.mesh.inference.queueing.settings import ConcurrencySettings

_GRADIENT_START: Final = 20
_SMOOTHING: Final = 0.05
_PRESENT_SHARE: Final = 0.1
_ROOM_TO_GROW: Final = 2.0
_MEASURE_EVERY: Final = 1_000
_MEASURE_EVERY_ROUNDS: Final = 50
_MEASURE_AT_LEAST: Final = 8


class Sample(NamedTuple):
    """How a request went."""

    began: float
    """When the backend was asked, in seconds."""
    ended: float
    """When it was done, in seconds."""
    response_s: float
    """Time to its first response."""
    running: int
    """Requests that the backend had when this one ended, this one included."""
    overloaded: bool
    """Whether the backend said or showed that it has too much to do."""


class Limit(Protocol):
    """A bound of the requests in flight."""

    @property
    def value(self) -> int:
        """The present bound, at least 1."""

    def learn(self, sample: Sample) -> None:
        """Moves it by what one request showed."""


def limit_of(settings: ConcurrencySettings) -> Limit:
    """The limit that settings describe."""
    match settings.mode:
        case "aimd":
            return AimdLimit(settings)
        case "gradient":
            return GradientLimit(settings)
        case _:
            return FixedLimit(settings.maximum)


class FixedLimit:
    """A limit that stays."""

    def __init__(self, value: int) -> None:
        self._value = value

    @property
    def value(self) -> int:
        """See ``Limit.value``."""
        return self._value

    def learn(self, sample: Sample) -> None:
        """See ``Limit.learn``; it learns nothing."""


class AimdLimit:
    """Additive increase, multiplicative decrease, as TCP's window.

    It grows by one for a limit's worth of answers while the limit is made use of. Trouble lowers it
    once for all requests that were in flight together: those that began before it was lowered
    were sent under the old limit and say nothing of the new one.
    """

    def __init__(self, settings: ConcurrencySettings) -> None:
        self._settings = settings
        self._limit = float(settings.initial or settings.maximum)
        self._lowered_at = float("-inf")

    @property
    def value(self) -> int:
        """See ``Limit.value``."""
        return int(self._limit)

    def learn(self, sample: Sample) -> None:
        """See ``Limit.learn``."""
        settings = self._settings
        late = 0 < settings.latency_s < sample.response_s
        if sample.overloaded or late:
            if sample.began >= self._lowered_at:
                # What runs now may be far below the limit: that is what was too much.
                base = min(self._limit, float(sample.running))
                self._limit = max(float(settings.minimum), base * settings.backoff)
                self._lowered_at = sample.ended
        elif sample.running >= self.value // 2:
            self._limit = min(float(settings.maximum), self._limit + 1 / self._limit)


class GradientLimit:
    """Follows the ratio of the unloaded to the present response time.

    After the gradient algorithms of Netflix's concurrency-limits: responses slower than
    ``tolerance`` times the unloaded ones lower the limit in proportion, any others let it grow by a
    little room for queueing. What is unloaded is measured at half of the limit, now and then, for
    as long as it takes a few answers: a moving average alone would take a long overload for usual.
    Both sides are means, as prompts differ.
    """

    def __init__(self, settings: ConcurrencySettings) -> None:
        self._settings = settings
        start = settings.initial or min(settings.maximum, _GRADIENT_START)
        self._limit = float(max(settings.minimum, start))
        self._lowered_at = float("-inf")
        self._unloaded_s = 0.0
        self._present_s = 0.0
        self._answers = 0
        self._measuring = True
        self._measured_from = float("-inf")
        self._measured: list[float] = []

    @property
    def value(self) -> int:
        """See ``Limit.value``."""
        if self._measuring:
            return max(self._settings.minimum, int(self._limit / 2), 1)
        return int(self._limit)

    def learn(self, sample: Sample) -> None:
        """See ``Limit.learn``."""
        settings = self._settings
        if sample.overloaded:
            if sample.began >= self._lowered_at:
                self._set(min(self._limit, float(sample.running)) * settings.backoff)
                self._lowered_at = sample.ended
            return
        if self._measuring:
            self._measure(sample)
            return
        self._answers += 1
        if self._answers >= max(_MEASURE_EVERY, _MEASURE_EVERY_ROUNDS * self._limit):
            self._measuring, self._measured_from = True, sample.ended
        present = self._present_s or sample.response_s
        self._present_s = present + _PRESENT_SHARE * (sample.response_s - present)
        if sample.running < self._limit / 2 or self._present_s <= 0:
            return
        ratio = settings.tolerance * self._unloaded_s / self._present_s
        aim = self._limit * max(0.5, min(1.0, ratio)) + (_ROOM_TO_GROW if ratio >= 1 else 0)
        self._set(self._limit + _SMOOTHING * (aim - self._limit))

    def _measure(self, sample: Sample) -> None:
        """Learns how fast the backend is when it has half of what it usually has."""
        if sample.began < self._measured_from:
            return
        self._measured.append(sample.response_s)
        if len(self._measured) >= max(_MEASURE_AT_LEAST, self.value):
            self._unloaded_s = sum(self._measured) / len(self._measured)
            self._measured.clear()
            self._measuring, self._answers = False, 0

    def _set(self, limit: float) -> None:
        settings = self._settings
        self._limit = min(float(settings.maximum), max(float(settings.minimum), limit))
