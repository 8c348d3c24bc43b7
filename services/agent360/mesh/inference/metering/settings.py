"""What can be set of limits, budgets and usage records, with its defaults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from agent360.mesh.runtime.settings import Settings


class LimitSettings(Settings):
    """How the ratelimit service is asked about requests, tokens, money and slots."""

    enabled: bool = True
    """Whether it is asked."""
    when_away: Literal["open", "closed"] = "open"
    """What happens while it is away: requests are served, or refused."""
    timeout_s: float = Field(default=0.25, gt=0)
    """How long it is waited for, in seconds."""
    expected_output_tokens: int = Field(default=512, gt=0)
    """Tokens set aside for an answer whose length has no bound."""
    bound_answers: bool = False
    """Whether an answer whose length has no bound is bound to ``expected_output_tokens``: then no
    request can use more than was set aside for it."""
    prompt_margin: float = Field(default=1.25, ge=1)
    """What is set aside for a prompt whose tokens are estimated, as a multiple of the estimate."""
    unlimited_s: float = Field(default=1.0, ge=0)
    """How long the answer that no limit applies is believed, in seconds."""
    slot_ttl_s: float = Field(default=30.0, gt=0)
    """After how long a concurrency slot comes back if this process dies, in seconds."""


class UsageSettings(Settings):
    """Where usage records go: one for each request, answered or not."""

    records: Literal["none", "metrics", "audit"] = "metrics"
    """``metrics``: they are added up in the metrics service by tenant and model; ``audit``: each is
    an event of the tenant's audit log too."""
