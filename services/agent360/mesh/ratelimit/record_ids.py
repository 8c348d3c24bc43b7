"""Ids of reservations, leases and slots, told apart by how they begin."""

from __future__ import annotations

from enum import Enum

import grpc

from agent360.client.errors import MeshError


class Kind(Enum):
    """What an id stands for; its value begins the id."""

    RESERVATION = "r-"
    LEASE = "l-"
    SLOTS = "s-"

    @property
    def label(self) -> str:
        """As a message has it."""
        return _LABELS[self]


_LABELS = {Kind.RESERVATION: "a reservation", Kind.LEASE: "a lease", Kind.SLOTS: "slots"}


def require_kind(record_id: str, wanted: Kind) -> None:
    """Refuses the id of something else; whether there is such a record is not looked at.

    Raises:
        MeshError: FAILED_PRECONDITION; the message names both kinds.
    """
    if record_id.startswith(wanted.value):
        return
    for kind in Kind:
        if record_id.startswith(kind.value):
            raise MeshError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "RECORD_OF_ANOTHER_KIND",
                f"this is the id of {kind.label}; give the id of {wanted.label}",
                metadata={"record_id": record_id[:64]},
            )
