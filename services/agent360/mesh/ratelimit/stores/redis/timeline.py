"""The time that counts in Redis go by: Redis' clock, and what was known before it was set back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_PACE: Final = 0.95
"""How fast time goes on where the clock was set back, until the clock has caught up with it."""
_LED_US: Final = 1_000_000
"""Where the script's time is so much earlier than expected, the clock was set back beyond what is
bridged."""


class Timeline:
    """The latest time that this replica has been told, carried on by the monotonic clock.

    It goes with each run of the script, which goes by the later of it and Redis' clock, and
    answers which it was. While the clock is not set, that is always the clock: the timeline goes
    slower. Where it was set back, time goes on as if it had not been. A replica that has just
    started learns it from the counts that others have changed.

    Example:
        >>> timeline = Timeline()
        >>> timeline.note(1_790_000_000_000_000)
        >>> timeline.now_us() >= 1_790_000_000_000_000
        True
    """

    def __init__(
        self, monotonic_ns: Callable[[], int] = time.monotonic_ns, pace: float = _PACE
    ) -> None:
        """Makes one that has been told nothing.

        Args:
            monotonic_ns: nanoseconds.
            pace: microseconds of it in one that passes.
        """
        self._monotonic_ns = monotonic_ns
        self._pace = pace
        self._at_ns = 0
        self._told_us = 0

    def now_us(self) -> int:
        """Microseconds since 1970; 0 if nothing was told."""
        if not self._told_us:
            return 0
        return self._told_us + int((self._monotonic_ns() - self._at_ns) * self._pace) // 1_000

    def note(self, told_us: int) -> None:
        """Takes the time that a run of the script went by."""
        expected_us = self.now_us()
        if told_us >= expected_us or expected_us - told_us > _LED_US:
            self._at_ns, self._told_us = self._monotonic_ns(), told_us
