"""Turns whatever a handler raised into the error that the caller sees, and ends RPCs with it."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any, Final, NoReturn

import grpc
import structlog

from agent360.client.errors import DeadlineExceededError, MeshError, from_rpc_error

_FAREWELL_S: Final = 1.0
"""How long a caller has to take the error."""


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


async def abort(context: Any, error: MeshError) -> NoReturn:
    """Ends an RPC with an error and its details; where the caller does not take them, without.

    Raises:
        grpc.aio.AbortError: the caller was told.
        asyncio.CancelledError: the caller is gone, or reads nothing.
    """
    details = ("grpc-status-details-bin", error.to_status().SerializeToString())
    try:
        async with asyncio.timeout(_FAREWELL_S):
            await context.abort(error.code, error.message, (details,))
    except grpc.aio.AbortError:
        raise
    except Exception as failure:
        raise asyncio.CancelledError from failure
    raise AssertionError("an abort raises")
