"""Turns whatever a handler raised into the error that the caller sees."""

from __future__ import annotations

import asyncio
import uuid

import grpc
import structlog

from agent360.client.errors import DeadlineExceededError, MeshError, from_rpc_error


def to_mesh_error(
    error: BaseException, method: str, log: structlog.stdlib.BoundLogger
) -> MeshError:
    """The error for the wire.

    A bug becomes INTERNAL with an error id that is also in the log with the traceback; nothing of
    the traceback leaves the process.
    """
    if isinstance(error, MeshError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return MeshError(grpc.StatusCode.CANCELLED, "CANCELLED", "the call was cancelled")
    if isinstance(error, grpc.RpcError):
        return from_rpc_error(error)
    error_id = uuid.uuid4().hex
    log.error("internal error", method=method, error_id=error_id, exc_info=error)
    return MeshError(
        grpc.StatusCode.INTERNAL,
        "INTERNAL",
        f"internal error {error_id}; the service's log has the details under this id",
        metadata={"error_id": error_id},
    )


def deadline_error() -> MeshError:
    """The error of a call whose deadline passed while it was worked on."""
    return DeadlineExceededError("the deadline passed while the call was worked on")
