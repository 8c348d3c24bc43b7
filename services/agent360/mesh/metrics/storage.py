"""Tells callers plainly when the store cannot be used."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import grpc

from agent360.client.errors import MeshError
from agent360.mesh.metrics.ports import StoreError

T = TypeVar("T")


async def stored(work: Awaitable[T]) -> T:
    """What reads or writes the store.

    Raises:
        MeshError: UNAVAILABLE STORE_AWAY; the store cannot do it now.
    """
    try:
        return await work
    except StoreError as error:
        raise MeshError(
            grpc.StatusCode.UNAVAILABLE,
            "STORE_AWAY",
            f"the store of the metrics service cannot be used now: {error}",
            retry_after_s=1.0,
        ) from error
