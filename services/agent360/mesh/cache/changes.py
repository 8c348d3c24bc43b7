"""Writes and removals of entries, in the words that all parts of the cache share."""

from __future__ import annotations

from enum import Enum, auto
from typing import Literal, NamedTuple

Scope = Literal["keys", "prefix", "tags", "all"]
"""Which entries of a namespace a change concerns."""


class Condition(Enum):
    """When a write takes effect."""

    ALWAYS = auto()
    """Whatever is there."""
    IF_ABSENT = auto()
    """If the key has no fresh entry."""
    IF_VERSION = auto()
    """If the entry there has the version; version 0 stands for no entry."""


class Stored(NamedTuple):
    """What became of a write."""

    stored: bool
    """Whether it took effect and the entry is held."""
    version: int
    """Version of the entry now in place; 0 if there is none."""
    shared: bool = True
    """False where only this replica holds it because the shared store was away."""


class Removed(NamedTuple):
    """What became of a removal."""

    entries: int
    """How many were removed."""
    shared: bool = True
    """False where only this replica carried it out because the shared store was away."""
