"""What can be set of the connections to Redis."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from agent360.mesh.runtime.settings import Settings


class RedisSettings(Settings):
    """Connections to Redis: how many, how long they live, how long they are waited for."""

    min_connections: int = Field(default=1, ge=0)
    """Connections kept open to each server, used or not."""
    max_connections: int = Field(default=8, ge=1)
    """Connections to each server; beyond that, commands wait for one."""
    max_idle_s: float = Field(default=300.0, gt=0)
    """A connection unused for this long is closed if there are more than the least, in seconds."""
    max_lifetime_s: float = Field(default=3600.0, gt=0)
    """Age at which a connection is replaced, in seconds; varied by 10%."""
    health_check_s: float = Field(default=15.0, gt=0)
    """A connection that heard nothing for this long is pinged before it is used, in seconds."""
    connect_timeout_s: float = Field(default=0.5, gt=0)
    """How long a connection may take to open, TLS and login included, in seconds."""
    timeout_s: float = Field(default=0.5, gt=0)
    """How long the replies to one pipeline of commands, or the next piece of large ones, are waited
    for, in seconds."""
    wait_timeout_s: float = Field(default=0.25, gt=0)
    """How long commands wait for a free connection, in seconds."""
    max_waiting: int = Field(default=10_000, gt=0)
    """Pipelines that may wait for a connection to one server; more fail at once."""
    failures: int = Field(default=3, ge=1)
    """Timeouts in a row after which a server counts as away."""
    probe_s: float = Field(default=0.1, gt=0)
    """How often a server that is away is tried, in seconds."""
    subscription_ping_s: float = Field(default=0.5, gt=0)
    """How often the server of a subscription is pinged, in seconds."""
    subscription_timeout_s: float = Field(default=1.5, gt=0)
    """A subscription that heard nothing for this long is down, in seconds."""
    ca: Path | None = None
    """PEM file with the authorities to trust in place of the system's, for ``rediss``."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.min_connections > self.max_connections:
            raise ValueError("min_connections is greater than max_connections")
        if self.subscription_timeout_s <= self.subscription_ping_s:
            raise ValueError("subscription_timeout_s must be greater than subscription_ping_s")
        return self
