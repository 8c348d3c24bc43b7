"""Which sessions of agents have asked for more: a session moves up, never down."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from agent360.mesh.inference.conversation import TaskClass
from agent360.mesh.inference.settings import SessionSettings


class Sessions:
    """Remembers the sessions that were complex, each tenant's apart.

    Memory is bounded for each tenant and in the number of tenants; what was silent longest goes
    first, so that one tenant's many sessions displace nobody else's.

    Example:
        >>> sessions.highest("acme", "chat-7", "complex")
        'complex'
        >>> sessions.highest("acme", "chat-7", "simple")
        'complex'
    """

    def __init__(
        self, settings: SessionSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._tenants: OrderedDict[str, OrderedDict[str, float]] = OrderedDict()

    def highest(self, tenant: str, session: str, task_class: TaskClass) -> TaskClass:
        """The highest class that a session has had, this time included."""
        now = self._clock()
        known = self._tenants.get(tenant)
        expires = known.get(session) if known is not None else None
        if task_class == "simple" and (expires is None or expires <= now):
            return "simple"
        if known is None:
            known = self._tenants[tenant] = OrderedDict()
        known[session] = now + self._settings.ttl_s
        known.move_to_end(session)
        self._tenants.move_to_end(tenant)
        self._forget(known, now)
        return "complex"

    def _forget(self, known: OrderedDict[str, float], now: float) -> None:
        # In the order of their last use, so in the order in which they expire.
        while known:
            oldest = next(iter(known))
            if known[oldest] > now and len(known) <= self._settings.max_per_tenant:
                break
            del known[oldest]
        while len(self._tenants) > self._settings.max_tenants:
            self._tenants.popitem(last=False)
