"""How long work takes, learnt from work that was done: ``fixed + per_unit * size``."""

from __future__ import annotations

from typing import Final

_KEPT: Final = 0.98
_ENOUGH: Final = 5
_SPREAD: Final = 1e-3


class ServiceTime:
    """A straight line through recent durations by size, the recent ones counting more.

    Least squares over exponentially fading sums; both of its coefficients are kept from being
    negative, as a duration is not.

    Example:
        >>> law.add(size=32, seconds=0.052)
        >>> law.expected_s(64)
    """

    __slots__ = ("_n", "_seen", "_sx", "_sxx", "_sxy", "_sy", "fixed_s", "per_unit_s")

    def __init__(self) -> None:
        self._seen = 0
        self._n = self._sx = self._sy = self._sxx = self._sxy = 0.0
        self.fixed_s = 0.0
        self.per_unit_s = 0.0

    @property
    def known(self) -> bool:
        """Whether enough was seen to tell."""
        return self._seen >= _ENOUGH

    @property
    def mean_s(self) -> float:
        """The mean of recent durations; 0 if none was seen."""
        return self._sy / self._n if self._n else 0.0

    @property
    def mean_per_unit_s(self) -> float:
        """Seconds for each unit of size, fixed parts included; 0 if nothing was seen."""
        return self._sy / self._sx if self._sx else 0.0

    def add(self, size: float, seconds: float) -> None:
        """Learns from one piece of work."""
        self._seen += 1
        self._n = self._n * _KEPT + 1
        self._sx = self._sx * _KEPT + size
        self._sy = self._sy * _KEPT + seconds
        self._sxx = self._sxx * _KEPT + size * size
        self._sxy = self._sxy * _KEPT + size * seconds
        spread = self._n * self._sxx - self._sx * self._sx
        # All of about one size: nothing tells fixed from proportional, and what was learnt stands.
        slope = self.per_unit_s
        if spread > _SPREAD * self._n * self._sxx:
            slope = max(0.0, (self._n * self._sxy - self._sx * self._sy) / spread)
        intercept = (self._sy - slope * self._sx) / self._n
        if intercept < 0:
            intercept, slope = 0.0, self._sxy / self._sxx
        self.fixed_s, self.per_unit_s = intercept, slope

    def expected_s(self, size: float) -> float:
        """How long work of this size takes."""
        return self.fixed_s + self.per_unit_s * size

    def largest_within(self, seconds: float) -> float:
        """The largest size that is done within ``seconds``; infinite if size does not matter."""
        if seconds <= self.fixed_s:
            return 0.0
        return (seconds - self.fixed_s) / self.per_unit_s if self.per_unit_s else float("inf")
