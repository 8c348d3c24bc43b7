"""Cross-cutting work, done before and after calls, the same for unary RPCs and stream items."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from typing import Protocol

import grpc

from agent360.mesh.runtime.batch import Group

__all__ = ["Policies", "Policy"]


class Policy(Protocol):
    """One concern. It sees every group of items before and after the work, never an item alone.

    At 100,000 items a second it may not spend a span, a log line or a histogram update on each
    item: what it does, it does once a group.
    """

    def before(self, group: Group) -> Awaitable[None] | None:
        """Looks at a group before any work.

        May fill in ``group.call``, refuse some items by ``group.keep``, or raise MeshError to
        refuse all. Returns an awaitable only if it must wait.
        """

    def after(self, group: Group, code: grpc.StatusCode, count: int, duration_s: float) -> None:
        """Learns that ``count`` items of a group ended with ``code`` after ``duration_s`` seconds.

        Called for policies whose ``before`` was reached; several times if items end at different
        times; ``group.left`` is zero the last time.
        """


class Policies:
    """The list of policies, in order."""

    __slots__ = ("_policies",)

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._policies = tuple(policies)

    def begin(self, group: Group) -> Awaitable[None] | None:
        """Runs all ``before``; returns an awaitable if one of them must wait.

        Raises:
            MeshError: a policy refused the group.
        """
        for position, policy in enumerate(self._policies):
            group.passed = position + 1
            pending = policy.before(group)
            if pending is not None:
                return self._go_on(group, pending, position + 1)
        return None

    async def _go_on(self, group: Group, pending: Awaitable[None], position: int) -> None:
        await pending
        for policy in self._policies[position:]:
            position += 1
            group.passed = position
            waiting = policy.before(group)
            if waiting is not None:
                await waiting

    def turned_away(self, group: Group, code: grpc.StatusCode) -> None:
        """Tells the first policy, the access log's, of a call that was refused at the door."""
        self._policies[0].after(group, code, 1, time.perf_counter() - group.started)

    def finish(self, group: Group, code: grpc.StatusCode, count: int, duration_s: float) -> None:
        """Runs ``after`` of all policies that were reached; ``count`` items are done."""
        group.left -= count
        for policy in self._policies[: group.passed]:
            policy.after(group, code, count, duration_s)
