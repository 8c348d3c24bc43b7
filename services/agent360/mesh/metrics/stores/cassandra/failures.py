"""What went wrong, in plain words: the driver's exceptions as ``StoreError``."""

from __future__ import annotations

from typing import Any, Final, Literal

from cassandra import (
    AuthenticationFailed,
    DriverException,
    OperationTimedOut,
    ReadFailure,
    ReadTimeout,
    Unavailable,
    WriteFailure,
    WriteTimeout,
)
from cassandra.cluster import NoHostAvailable
from cassandra.connection import ConnectionException

from agent360.mesh.metrics.ports import StoreError
from agent360.mesh.metrics.stores.cassandra.levels import LEVEL_NAMES
from agent360.mesh.metrics.stores.cassandra.url import CassandraTarget

ErrorKind = Literal["away", "timeout", "replicas", "refused", "other"]
"""What failed: no node could be reached; no answer in time; too few copies; the login; the rest."""

DRIVER_ERRORS: Final[tuple[type[Exception], ...]] = (
    DriverException,
    NoHostAvailable,
    ConnectionException,
    OSError,
)
"""What the driver raises when something outside of it is wrong."""


def kind_of(error: Exception) -> ErrorKind:
    """What kind of failure it is."""
    causes = _causes(error)
    if any(isinstance(each, AuthenticationFailed) for each in causes):
        return "refused"
    if any(isinstance(each, Unavailable | ReadFailure | WriteFailure) for each in causes):
        return "replicas"
    if any(isinstance(each, OperationTimedOut | ReadTimeout | WriteTimeout) for each in causes):
        return "timeout"
    if isinstance(error, NoHostAvailable | ConnectionException | OSError):
        return "away"
    return "other"


def told_plainly(error: Exception, target: CassandraTarget) -> StoreError:
    """The error of the port: what to look at, in words for operators."""
    first = _causes(error)[0]
    match kind_of(error):
        case "refused":
            text = "refuses the login; look at user and password in the URL of the store"
        case "replicas":
            text = f"has too few copies at hand for {_level(first, target)}: {_said(first)}"
        case "timeout":
            text = f"did not answer in time (cassandra.request_timeout_s): {_said(first)}"
        case "away":
            text = f"cannot be reached: {_said(first)}"
        case _:
            text = f"refused the statement: {_said(first)}"
    return StoreError(f"Cassandra at {target}, keyspace {target.keyspace}, {text}")


def _causes(error: Exception) -> list[Exception]:
    """The errors of the nodes, if it is about several, else the error itself."""
    errors: Any = getattr(error, "errors", None) if isinstance(error, NoHostAvailable) else None
    each = list(errors.values()) if isinstance(errors, dict) else list(errors or ())
    return [one for one in each if isinstance(one, Exception)] or [error]


def _level(error: Exception, target: CassandraTarget) -> str:
    return LEVEL_NAMES.get(getattr(error, "consistency", -1), target.consistency)


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
