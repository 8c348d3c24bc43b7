"""How fast a model works through what waits for it, from what was measured."""

from __future__ import annotations

from collections.abc import Callable

from agent360.mesh.inference.queueing.service_time import ServiceTime


class Pace:
    """Expected waits, from how long work of which size took and how much goes on at a time.

    By Little's law the tokens drained in a second are the slots divided by the seconds that a
    token takes, whatever the backend does inside. Sizes are the estimates that the queue goes by.

    Attributes:
        law: seconds by estimated tokens.
    """

    def __init__(self, slots: Callable[[], int], *, in_batches: bool = False) -> None:
        """Makes a pace.

        Args:
            slots: how many pieces of work go on at a time.
            in_batches: whether a piece of work is a batch, which is done when all of it is.
        """
        self.law = ServiceTime()
        self._slots = slots
        self._in_batches = in_batches

    def drains_in_s(self, cost: float) -> float | None:
        """How long it takes to work through ``cost`` tokens, in seconds; None: not known."""
        if not self.law.known:
            return None
        return cost * self.law.mean_per_unit_s / max(1, self._slots())

    def answered_in_s(self, ahead: float, cost: int) -> float | None:
        """When a request is answered that ``ahead`` tokens go before, in seconds; None: unknown.

        All slots being busy, the first of them is expected to be free after a share of a mean
        piece of work.
        """
        law, slots = self.law, max(1, self._slots())
        if not law.known:
            return None
        wait = ahead * law.mean_per_unit_s / slots + law.mean_s / (slots + 1)
        return wait + self.work_s(cost)

    def work_s(self, cost: int) -> float:
        """How long the work on a request takes once it began, in seconds; 0: not known."""
        law = self.law
        if not law.known:
            return 0.0
        return law.mean_s if self._in_batches else law.expected_s(cost)
