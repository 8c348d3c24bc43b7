"""Series: what identifies one."""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Final, NamedTuple

NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,127}")
"""What a metric may be called."""
LABEL: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,63}")
"""What a label may be called."""


class Kind(IntEnum):
    """What the numbers of a series mean; as in the contract."""

    COUNTER = 1
    GAUGE = 2
    DISTRIBUTION = 3


class SeriesId(NamedTuple):
    """What identifies a series."""

    tenant: str
    name: str
    labels: tuple[tuple[str, str], ...]
    """Sorted by label."""
    kind: Kind
    unit: str
    """In the notation of UCUM; empty: not stated. Two units make two series."""
