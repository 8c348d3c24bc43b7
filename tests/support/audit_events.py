"""Audit events and their chains, made directly, for tests of stores."""

from collections.abc import Sequence
from typing import Final

from agent360.mesh.metrics.audit.chain import link, successor
from agent360.mesh.metrics.ports import Append, AuditEvent, ChainHead, ChainKey, EventStore

TODAY: Final = 20_000
"""A day."""


def event(number: int, tenant: str = "acme", **columns: str) -> AuditEvent:
    """An event; a higher number is later."""
    return AuditEvent(
        tenant,
        f"{tenant}-{number:06}",
        1_700_000_000_000_000 + number * 1_000,
        columns.get("actor", f"actor-{number % 3}"),
        columns.get("action", f"plans.{number % 5}"),
        columns.get("resource", f"plans/{number % 7}"),
        f"body {number}".encode(),
    )


async def append(
    store: EventStore, events: Sequence[AuditEvent], *, writer: str = "w", day: int = TODAY
) -> ChainHead:
    """Appends events of one tenant to where its chain is."""
    tenant = events[0].tenant
    before = (await store.heads([tenant], writer)).get(tenant)
    rows, head = link(successor(before, ChainKey(tenant, day, writer)), events)
    await store.append(Append(rows, [head], None))
    return head
