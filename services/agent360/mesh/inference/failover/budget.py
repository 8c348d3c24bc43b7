"""How much extra load may be made: a share of the requests, saved up to a bound."""

from __future__ import annotations


class Budget:
    """A token bucket that requests fill and extra tries empty.

    After ``n`` requests at most ``saved + ratio * n`` extra tries have been allowed, whatever
    fails: an outage cannot multiply the load.

    Example:
        >>> budget = Budget(saved=0.0)
        >>> for _ in range(10):
        ...     budget.earn(0.2, most=5)
        >>> [budget.spend() for _ in range(3)]
        [True, True, False]
    """

    __slots__ = ("_saved",)

    def __init__(self, saved: float) -> None:
        self._saved = saved

    def earn(self, ratio: float, most: float) -> None:
        """Counts a request; at most ``most`` tries are saved up."""
        self._saved = min(most, self._saved + ratio)

    def spend(self) -> bool:
        """Whether an extra try is allowed; if so it is counted."""
        # A sum of ratios such as 0.2 may end just below the whole number that it stands for.
        if self._saved < 1 - 1e-9:
            return False
        self._saved -= 1
        return True
