"""A server's clock, estimated from this process's monotonic clock."""

from __future__ import annotations

from collections import deque
from typing import Final

_DRIFT: Final = 500e-6
"""How fast clocks may drift apart at most: the rate at which NTP slews."""
_REMEMBERED: Final = 8
_STEP_US: Final = 50_000
"""What shows so much more than expected was on its way for long, or the clock was set forward: as
it cannot be told, it counts."""


class ServerClock:
    """Estimates a server's clock, and is never behind it.

    A server that says ``t`` to a request sent at ``s`` said so after ``s``: at ``s`` its clock
    showed at most ``t``. To that comes what the clocks may have drifted apart since. Of what it
    said lately the lowest counts: the others were longer on their way. A clock that was set
    forward is followed when the server is next asked.
    """

    def __init__(self) -> None:
        self._said: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)
        self._asked_at = 0.0
        self._shown_us = 0

    @property
    def known(self) -> bool:
        """Whether the server was ever asked."""
        return bool(self._said)

    def note(self, asked_at: float, reply: tuple[bytes, bytes] | list[bytes]) -> None:
        """Takes what the server said.

        Args:
            asked_at: monotonic time before the request was sent, in seconds.
            reply: to TIME: seconds and microseconds, cut to whole ones.
        """
        seconds, microseconds = reply
        shown_us = int(seconds) * 1_000_000 + int(microseconds) + 1
        if self._said and shown_us > self.now_us(asked_at) + _STEP_US:
            self._said.clear()
        self._said.append((asked_at, shown_us))
        self._asked_at, self._shown_us = min(
            self._said, key=lambda each: _at(each[0], each[1], asked_at)
        )

    def now_us(self, now: float) -> int:
        """Its clock at a monotonic time, in microseconds since 1970."""
        if not self._said:
            raise RuntimeError("the server's clock was never asked for")
        return _at(self._asked_at, self._shown_us, now)


def _at(asked_at: float, shown_us: int, now: float) -> int:
    return shown_us + int((now - asked_at) * (1 + _DRIFT) * 1e6) + 1
