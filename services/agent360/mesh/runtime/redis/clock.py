"""A server's clock, estimated from this process's monotonic clock."""

from __future__ import annotations

from typing import Final

_DRIFT: Final = 500e-6
"""How fast clocks may drift apart at most: the rate at which NTP slews."""


class ServerClock:
    """Estimates a server's clock, and is never behind it.

    A server that says ``t`` to a request sent at ``s`` said so after ``s``: at ``s`` its clock
    showed at most ``t``. To that comes what the clocks may have drifted apart since. A clock that
    was set forward is followed when the server is next asked.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._shown_us = 0

    @property
    def known(self) -> bool:
        """Whether the server was ever asked."""
        return self._asked_at is not None

    def note(self, asked_at: float, reply: tuple[bytes, bytes] | list[bytes]) -> None:
        """Takes what the server said.

        Args:
            asked_at: monotonic time before the request was sent, in seconds.
            reply: to TIME: seconds and microseconds, cut to whole ones.
        """
        seconds, microseconds = reply
        self._asked_at = asked_at
        self._shown_us = int(seconds) * 1_000_000 + int(microseconds) + 1

    def now_us(self, now: float) -> int:
        """Its clock at a monotonic time, in microseconds since 1970."""
        if self._asked_at is None:
            raise RuntimeError("the server's clock was never asked for")
        return self._shown_us + int((now - self._asked_at) * (1 + _DRIFT) * 1e6) + 1
