"""What can be set of a model's queue, and of how many requests a backend gets at a time."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, model_validator

from agent360.mesh.runtime.settings import Settings

MAX_LEVELS: Final = 9
"""Most priority levels of a queue."""


class QueueSettings(Settings):
    """How requests wait for a model.

    Example:
        >>> QueueSettings(max_items=200, timeout_s=20.0, timeout_action="delay")
    """

    max_items: int = Field(default=10_000, gt=0)
    """Most requests that wait; when full, whoever holds most of it for its weight gives way."""
    max_tokens: int = Field(default=0, ge=0)
    """Most (estimated) tokens that wait; 0: no bound."""
    levels: int = Field(default=3, ge=1, le=MAX_LEVELS)
    """Priority levels, 1 the first served: HIGH is level 1, NORMAL the middle one, LOW the last."""
    starvation_s: float = Field(default=10.0, gt=0)
    """A level in which a request has waited this long, in seconds, gets every second turn, however
    much waits at the levels above it."""
    timeout_s: float | None = Field(default=60.0, gt=0)
    """Longest wait of a request, in seconds; None: as long as its deadline allows."""
    timeout_action: Literal["reject", "delay"] = "reject"
    """What becomes of one that waited longer: it fails, or waits behind all others."""
    allow_shorter_timeout: bool = True
    """Whether a request may set a shorter timeout for itself; never a longer one."""
    keep_slot_s: float = Field(default=10.0, ge=0)
    """A tenant that runs something leaves the last free slot to those that run nothing and asked
    within this time, in seconds; 0: slots are never kept free."""
    refuse_hopeless: bool = True
    """Whether a request that would miss its deadline, as things stand, is refused on arrival."""

    def level_of(self, priority: int) -> int:
        """The level, from 0, of a priority of agent360.call.v1: 1 low, 2 normal, 3 high."""
        if priority >= 3:
            return 0
        return self.levels - 1 if priority == 1 else (self.levels - 1) // 2


class ConcurrencySettings(Settings):
    """How many requests a backend works on at a time.

    ``fixed``: ``maximum``. ``aimd``: one more for every round without trouble, a share less
    after a 429, a 503, a stall, or an answer later than ``latency_s``. ``gradient``: follows the
    ratio of the unloaded to the present time to the first response.
    """

    mode: Literal["fixed", "aimd", "gradient"] = "aimd"
    """How the limit moves."""
    minimum: int = Field(default=1, gt=0)
    """Never fewer."""
    maximum: int = Field(default=256, gt=0)
    """Never more."""
    initial: int = Field(default=0, ge=0)
    """Where it begins; 0: at ``maximum``, or 20 for ``gradient``."""
    backoff: float = Field(default=0.7, gt=0, lt=1)
    """What is left of the limit after trouble."""
    latency_s: float = Field(default=0.0, ge=0)
    """A first response later than this is trouble (``aimd``), in seconds; 0: none is."""
    tolerance: float = Field(default=1.5, ge=1)
    """How much slower than unloaded is not yet slow (``gradient``)."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> ConcurrencySettings:
        if self.minimum > self.maximum:
            raise ValueError("minimum must not be above maximum")
        if self.initial and not self.minimum <= self.initial <= self.maximum:
            raise ValueError("initial must be from minimum to maximum")
        return self
