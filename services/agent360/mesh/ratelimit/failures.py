"""The errors of the ratelimit service."""

from __future__ import annotations

import grpc

from agent360.client.errors import MeshError, UnavailableError


def reservation_unknown(reservation_id: str) -> MeshError:
    """There is no such reservation of the tenant."""
    return MeshError(
        grpc.StatusCode.NOT_FOUND,
        "RESERVATION_UNKNOWN",
        "there is no such reservation; it may have been forgotten after it expired",
        metadata={"reservation_id": reservation_id[:64]},
    )


def limit_unknown(limit_id: str) -> MeshError:
    """There is no such limit for the tenant."""
    return MeshError(
        grpc.StatusCode.NOT_FOUND,
        "LIMIT_UNKNOWN",
        f"there is no limit {limit_id[:128]!r}",
        metadata={"limit_id": limit_id[:128]},
    )


def counts_exhausted(limit_id: str) -> MeshError:
    """As many counts are in use as this replica keeps, and the limit is closed."""
    return MeshError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "COUNTS_EXHAUSTED",
        f"limit {limit_id[:128]!r} cannot count one more: as many counts as are kept are in use",
        metadata={"limit_id": limit_id[:128]},
        retry_after_s=1.0,
    )


def limit_from_file(limit_id: str) -> MeshError:
    """The limit stands in the limits file."""
    return MeshError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "LIMIT_FROM_FILE",
        f"limit {limit_id[:128]!r} stands in the limits file and can be changed only there",
        metadata={"limit_id": limit_id[:128]},
    )


def limits_are_admins() -> MeshError:
    """Only admins change limits."""
    return MeshError(
        grpc.StatusCode.PERMISSION_DENIED, "ADMIN_ONLY", "limits are changed by admins only"
    )


def usage_is_operators() -> MeshError:
    """Only operators see what all tenants use together."""
    return MeshError(
        grpc.StatusCode.PERMISSION_DENIED,
        "ADMIN_ONLY",
        "all_tenants: what all tenants use together is told to admins and to who may speak for "
        "every tenant; leave it out to see the tenant's own share",
    )


def store_away() -> UnavailableError:
    """The store cannot be asked about what only it knows."""
    return UnavailableError(
        "the store of the ratelimit service is away", reason="STORE_AWAY", retry_after_s=1.0
    )
