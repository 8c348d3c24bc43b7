"""Checks of a request at the servicer's edge: every fault is found and named by its field path."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from agent360.client.errors import InvalidRequestError, Violation

TENANT_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
PRINTABLE: Final = r"^[^\x00-\x1f\x7f]+$"
"""What names must match that go into headers, logs and labels."""
_LAST_S: Final = 253_402_300_799
"""Last second of the year 9999, Unix time."""
TENANT_RULE: Final = "must match [a-z0-9][a-z0-9-]{0,62}"


class Violations:
    """Gathers the faults of one request and raises them together.

    Example:
        >>> faults = Violations()
        >>> faults.text("key", request.key, max_bytes=1024)
        >>> faults.raise_if_any()
    """

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: list[Violation] = []

    def add(self, field: str, description: str) -> None:
        """Notes a fault."""
        self.found.append(Violation(field, description))

    def text(self, field: str, value: str, *, max_bytes: int, min_bytes: int = 1) -> None:
        """A text's length in UTF-8 must be within bounds."""
        size = len(value) if value.isascii() else len(value.encode())
        if not min_bytes <= size <= max_bytes:
            if size < min_bytes:
                self.add(field, "must not be empty")
            else:
                self.add(field, f"must be at most {max_bytes:,} bytes of UTF-8, is {size:,}")

    def matches(self, field: str, value: str, pattern: re.Pattern[str], rule: str) -> None:
        """A text must match a pattern as a whole."""
        if pattern.fullmatch(value) is None:
            self.add(field, rule)

    def positive_duration(self, field: str, value: Duration) -> float:
        """A duration must be positive; returns it in seconds."""
        seconds = seconds_of(value)
        if not seconds > 0 or not math.isfinite(seconds):
            self.add(field, f"must be positive, is {seconds:g}s")
        return seconds

    def time(self, field: str, value: Timestamp) -> bool:
        """A time must be one that a calendar has; returns whether it is."""
        fits = 0 <= value.seconds <= _LAST_S and 0 <= value.nanos < 1_000_000_000
        self.require(field, fits, "must be from 1970 to 9999")
        return fits

    def count(self, field: str, size: int, *, at_least: int, at_most: int) -> None:
        """A number of elements must be within bounds."""
        if not at_least <= size <= at_most:
            self.add(field, f"must have {at_least:,} to {at_most:,} elements, has {size:,}")

    def require(self, field: str, holds: bool, description: str) -> None:
        """Notes a fault unless ``holds``."""
        if not holds:
            self.add(field, description)

    def nested(self, prefix: str, check: Callable[[Violations], object]) -> None:
        """Runs checks whose field paths are below ``prefix``."""
        inner = Violations()
        check(inner)
        self.found += [Violation(f"{prefix}.{v.field}", v.description) for v in inner.found]

    def raise_if_any(self) -> None:
        """Raises InvalidRequestError with everything noted."""
        if self.found:
            raise InvalidRequestError(self.found)


def seconds_of(value: Duration) -> float:
    """A protobuf Duration in seconds."""
    return value.seconds + value.nanos * 1e-9


def set_duration(target: Duration, seconds: float) -> None:
    """Fills a protobuf Duration in place; negative values become zero."""
    if seconds <= 0:
        target.SetInParent()
        return
    whole = int(seconds)
    target.seconds = whole
    target.nanos = int((seconds - whole) * 1e9)
