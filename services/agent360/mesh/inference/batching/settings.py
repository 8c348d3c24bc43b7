"""What can be set of how a model's requests are put into batches."""

from __future__ import annotations

from pydantic import Field

from agent360.mesh.runtime.settings import Settings


class BatchSettings(Settings):
    """How requests are gathered into one call of a backend.

    Example:
        >>> BatchSettings(max_size=128, max_in_flight=2, max_queue_delay_s=0.005)
    """

    enabled: bool = True
    """Whether texts of several callers share calls."""
    max_size: int = Field(default=64, gt=0)
    """Most texts in a call."""
    max_tokens: int = Field(default=16_384, gt=0)
    """Most (estimated) tokens in a call; one larger text goes alone."""
    preferred_sizes: tuple[int, ...] = ()
    """Sizes at which a batch goes without waiting for more, in texts; empty: found out."""
    max_queue_delay_s: float = Field(default=0.01, ge=0)
    """How long a text is held back for others though a backend has room, at most, in seconds; what
    measurements show not to pay is not waited for. 0: never."""
    max_service_s: float = Field(default=0.0, ge=0)
    """Batches are kept so small that a call takes no longer than this, in seconds, by what was
    measured; 0: no bound."""
    max_in_flight: int = Field(default=4, gt=0)
    """Most calls at a time for each backend, if its concurrency limit allows as many; one at a time
    where measurements show that the server works on one after the other."""
