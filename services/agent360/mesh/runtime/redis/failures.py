"""Why commands were not carried out, or may not have been."""

from __future__ import annotations


class RedisAwayError(Exception):
    """A server cannot be reached, did not answer in time, or no connection to it was free in time.

    Example:
        >>> (reply,) = await redis.run([Command(b"k", ("INCR", b"k"))])
        >>> if isinstance(reply, RedisAwayError) and not reply.sent:
        ...     ...  # it was surely not counted
    """

    def __init__(self, message: str, *, sent: bool, lost: bool = False) -> None:
        """Describes a failure.

        Args:
            message: for logs; never holds a password.
            sent: whether the command may have been carried out.
            lost: whether the connection turned out dead, so that another one may work.
        """
        super().__init__(message)
        self.sent = sent
        """Whether the command may have been carried out."""
        self.lost = lost
        """Whether the connection turned out dead, so that another one may work."""


class UnwillingError(Exception):
    """A server was reached and does not serve: it loads its data, is full, or refuses the login."""
