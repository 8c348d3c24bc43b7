"""What can be set of the connections to Cassandra."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from agent360.mesh.runtime.settings import Settings


class CassandraSettings(Settings):
    """Connections to Cassandra, and the keyspace that is made if it is missing."""

    connections_per_host: int = Field(default=1, ge=1, le=16)
    """Connections to each node; one carries thousands of requests at a time."""
    max_in_flight: int = Field(default=256, ge=1, le=4096)
    """Requests on their way at a time, over all nodes; beyond that they wait."""
    connect_timeout_s: float = Field(default=5.0, gt=0)
    """How long a connection may take to open, TLS and login included, in seconds."""
    request_timeout_s: float = Field(default=5.0, gt=0)
    """How long an answer is waited for, in seconds."""
    heartbeat_s: float = Field(default=10.0, gt=0)
    """How often a connection without traffic is tried, in seconds."""
    heartbeat_timeout_s: float = Field(default=5.0, gt=0)
    """A connection that does not answer that for as long is closed, in seconds."""
    max_lifetime_s: float = Field(default=3600.0, gt=0)
    """Age at which a connection is replaced, in seconds; what is on its way on it is finished."""
    reconnect_s: float = Field(default=0.5, gt=0)
    """How soon a node that went away is tried again, in seconds; doubles from try to try ..."""
    max_reconnect_s: float = Field(default=5.0, gt=0)
    """... up to this."""
    retries: int = Field(default=2, ge=0)
    """How often a request that failed is tried again, with another node where there is one."""
    create_keyspace: bool = True
    """Whether a missing keyspace is made; else that it is missing is an error."""
    replication: dict[str, int] = Field(default_factory=dict)
    """Copies by data centre, for a keyspace that is made (NetworkTopologyStrategy), such as
    ``{"dc1": 3}``; empty: one copy, wherever it may be (SimpleStrategy)."""
    ca: Path | None = None
    """PEM file with the authorities to trust in place of the system's, for ``tls=true``."""
    late_compaction_s: float = Field(default=3 * 86_400.0, gt=0)
    """Rollups are kept for so much longer than their retention says, in seconds: the time there is
    to compute coarser ones from them when the services were down."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.max_reconnect_s < self.reconnect_s:
            raise ValueError("max_reconnect_s must not be less than reconnect_s")
        for datacentre, copies in self.replication.items():
            if copies < 1 or not datacentre.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f"replication {datacentre!r}: {copies}: needs the name of a data centre "
                    "and a number of copies of at least 1"
                )
        return self
