"""Deadlines: a default, a maximum, and refusal of what is already too late."""

from __future__ import annotations

import math
import time

import grpc

from agent360.client.errors import DeadlineExceededError
from agent360.mesh.runtime.batch import Group
from agent360.mesh.runtime.settings import DeadlineSettings


class DeadlinePolicy:
    """Gives every call a deadline; the runner cancels what passes it."""

    def __init__(self, settings: DeadlineSettings) -> None:
        self._default_s = min(settings.default_s, settings.maximum_s)
        self._maximum_s = settings.maximum_s

    def before(self, group: Group) -> None:
        """Sets the deadline in force.

        Raises:
            DeadlineExceededError: it had passed on arrival.
        """
        now = time.monotonic()
        call = group.call
        if call.deadline == math.inf:
            call.deadline = now + self._default_s
            return
        if call.deadline <= now:
            raise DeadlineExceededError("the deadline had passed before the call arrived")
        call.deadline = min(call.deadline, now + self._maximum_s)

    def after(self, group: Group, code: grpc.StatusCode, count: int, duration_s: float) -> None:
        """Nothing: the runner enforces the deadline."""
