"""A group of items that share one call: what policies see before and after the work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from agent360.client.context import CallScope
from agent360.mesh.runtime.call import Call, Item


class Group:
    """Items of one RPC method that share one Call. A unary RPC is a group of one.

    Invariant: ``left`` counts the items that have no outcome yet; ``fresh`` those that succeeded
    since the policies were last told.
    """

    __slots__ = (
        "call",
        "field",
        "fresh",
        "items",
        "left",
        "passed",
        "refused",
        "response_class",
        "size",
        "span",
        "started",
    )

    def __init__(self, call: Call, field: str, response_class: Any) -> None:
        self.call = call
        self.field = field
        self.response_class = response_class
        self.items: list[Item] = []
        self.refused: list[tuple[Sequence[Item], Exception]] = []
        self.size = 0
        self.left = 0
        self.fresh = 0
        self.passed = 0
        self.span: Any = None
        self.started = time.perf_counter()

    def keep(self, count: int, error: Exception) -> None:
        """Admits the first ``count`` items and refuses the others with ``error``."""
        self.refused.append((self.items[count:], error))
        self.items = self.items[:count]

    def raise_if_refused(self) -> None:
        """Raises the error that an item was refused with; for a group of one."""
        for _, error in self.refused:
            raise error

    def scope(self) -> CallScope:
        """What calls made while the group is handled inherit."""
        call = self.call
        return CallScope(
            tenant=call.tenant,
            deadline=call.deadline,
            priority=int(call.priority),
            traceparent=call.traceparent,
            request_id=call.request_id,
        )
