"""Load shedding: what is more than can be served in time is refused at once, low priority first."""

from __future__ import annotations

from typing import Final

import grpc

from agent360.client.errors import MeshError
from agent360.mesh.runtime.batch import Group
from agent360.mesh.runtime.call import Priority
from agent360.mesh.runtime.settings import SheddingSettings

_SHARE: Final = {Priority.LOW: 0.8, Priority.NORMAL: 0.9, Priority.HIGH: 1.0}
_RETRY_AFTER_S: Final = 0.5


class SheddingPolicy:
    """Bounds the calls that are worked on at a time."""

    def __init__(self, settings: SheddingSettings) -> None:
        self._bounds = {
            priority: max(1, int(settings.max_in_flight * share))
            for priority, share in _SHARE.items()
        }
        self.in_flight = 0
        """Calls worked on now."""

    def before(self, group: Group) -> None:
        """Counts the group in.

        Raises:
            MeshError: RESOURCE_EXHAUSTED OVERLOADED; the call may be repeated later.
        """
        bound = self._bounds[group.call.priority]
        room = bound - self.in_flight
        self.in_flight += group.left
        if room < len(group.items):
            error = MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "OVERLOADED",
                f"{bound:,} calls of priority {group.call.priority.name} or above are in progress",
                retry_after_s=_RETRY_AFTER_S,
            )
            if room <= 0:
                raise error
            group.keep(room, error)

    def after(self, group: Group, code: grpc.StatusCode, count: int, duration_s: float) -> None:
        """Counts items out."""
        self.in_flight -= count
