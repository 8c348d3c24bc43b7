"""What can be set of retries, hedges and circuit breakers, with the defaults."""

from __future__ import annotations

from pydantic import Field, model_validator

from agent360.mesh.runtime.settings import Settings


class RetrySettings(Settings):
    """How often and how soon a model is asked again after a failure.

    Only failures that a repetition can cure are repeated, and only while nothing of an answer was
    said. The first try at each fallback needs no budget: a request asks it once.
    """

    max_tries: int = Field(default=3, ge=1, le=100)
    """How often the backends of one model are asked for one request, the first time included."""
    try_timeout_s: float | None = Field(default=None, gt=0)
    """How long one try may take to the end of its answer, in seconds; None: as long as the
    backend's own ``try_timeout_s`` lets it."""
    first_token_timeout_s: float | None = Field(default=None, gt=0)
    """How long one try of a streamed answer may take to say its first word, in seconds; None: as
    long as the backend's own ``stall_timeout_s`` lets it."""
    backoff_s: float = Field(default=0.1, gt=0)
    """Mean pause before backends that failed are asked again, in seconds; doubles each time."""
    max_backoff_s: float = Field(default=5.0, gt=0)
    """Longest such pause, in seconds."""
    max_wait_s: float = Field(default=10.0, ge=0)
    """How long a request waits for a backend that said when it may be asked again, or whose
    breaker is open, if there is no other, in seconds. Where it would take longer, or longer than
    the deadline, the request fails at once and is told when to come back."""
    budget: float = Field(default=0.2, ge=0, le=1)
    """Retries of a model that are allowed for each request to it: 0.2 is one for five requests."""
    budget_burst: int = Field(default=100, ge=0)
    """Retries that are allowed beyond that after a time without failures."""


class HedgeSettings(Settings):
    """When a slow try gets a rival at another backend; whichever speaks first answers."""

    enabled: bool = False
    """Whether there are hedges."""
    quantile: float = Field(default=0.95, gt=0, lt=1)
    """A try that has said nothing for longer than this share of recent ones took is slow."""
    min_delay_s: float = Field(default=0.05, ge=0)
    """No try is called slow before this, in seconds."""
    min_samples: int = Field(default=20, ge=1)
    """Tries that must have been measured before any is called slow."""
    budget: float = Field(default=0.05, ge=0, le=1)
    """Hedges that are allowed for each request: 0.05 is at most 5% of extra load."""
    budget_burst: int = Field(default=10, ge=1)
    """Hedges that can be saved up for a bad moment."""


class BreakerSettings(Settings):
    """When a backend that fails is left alone."""

    enabled: bool = True
    """Whether it ever is."""
    consecutive_failures: int = Field(default=5, ge=1)
    """Failures in a row that open the breaker."""
    failure_share: float = Field(default=0.5, gt=0, le=1)
    """Share of failed tries that opens it."""
    min_tries: int = Field(default=20, ge=1)
    """Tries within the window that there must be for the share to count."""
    window_s: float = Field(default=10.0, gt=0)
    """The time that the share looks back on, in seconds."""
    open_s: float = Field(default=2.0, gt=0)
    """How long it stays open before one request may probe the backend, in seconds; doubles with
    each probe that fails."""
    max_open_s: float = Field(default=60.0, gt=0)
    """Longest such time, in seconds."""
    max_rest_s: float = Field(default=600.0, gt=0)
    """A Retry-After of the backend that is longer is cut to this, in seconds."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> BreakerSettings:
        if self.open_s > self.max_open_s:
            raise ValueError("open_s must not be above max_open_s")
        return self
