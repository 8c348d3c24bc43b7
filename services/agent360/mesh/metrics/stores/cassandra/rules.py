"""Alert rules, states and silences on Cassandra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from agent360.mesh.metrics.ports import Document
from agent360.mesh.metrics.stores.cassandra.lease import Lease
from agent360.mesh.metrics.stores.cassandra.registry import shard_of
from agent360.mesh.metrics.stores.cassandra.schema import SHARDS
from agent360.mesh.metrics.stores.cassandra.session import Batch, Session, Statement

MIGRATIONS: Final = (
    (
        """CREATE TABLE IF NOT EXISTS documents (
        kind text, shard int, tenant text, name text, body blob,
        PRIMARY KEY ((kind, shard), tenant, name))""",
    ),
)
"""Of the subject ``rules``."""

_KEY: Final = "kind = ? AND shard = ? AND tenant = ?"
_PUT: Final = "INSERT INTO documents (kind, shard, tenant, name, body) VALUES (?, ?, ?, ?, ?)"
_REMOVE: Final = f"DELETE FROM documents WHERE {_KEY} AND name = ?"
_OF_TENANT: Final = f"SELECT tenant, kind, name, body FROM documents WHERE {_KEY}"
_OF_ALL: Final = "SELECT tenant, kind, name, body FROM documents WHERE kind = ? AND shard = ?"


class CassandraRuleStore:
    """The port ``RuleStore``."""

    def __init__(self, session: Session) -> None:
        """Uses the tables of ``MIGRATIONS``."""
        self._session = session
        self._leases: dict[str, Lease] = {}

    async def put(self, documents: Sequence[Document], gone: Sequence[Document] = ()) -> None:
        """See ``RuleStore.put``."""
        writes = [Statement(_REMOVE, (*_partition(each), each.tenant, each.name)) for each in gone]
        writes += [
            Statement(_PUT, (*_partition(each), each.tenant, each.name, each.body))
            for each in documents
        ]
        if not writes:
            return
        partitions = {_partition(each) for each in (*documents, *gone)}
        await self._session.run(
            writes[0] if len(writes) == 1 else Batch(writes, one_partition=len(partitions) == 1)
        )

    async def documents(self, kind: str, tenant: str | None = None) -> list[Document]:
        """See ``RuleStore.documents``."""
        if tenant is not None:
            reads = [Statement(_OF_TENANT, (kind, shard_of(tenant), tenant))]
        else:
            reads = [Statement(_OF_ALL, (kind, shard)) for shard in range(SHARDS)]
        answers = await self._session.run_all(reads)
        return sorted(Document(*row) for rows in answers for row in rows)

    async def lease(self, name: str, _now_s: float, for_s: float, /) -> bool:
        """See ``RuleStore.lease``; the time is that of the nodes."""
        lease = self._leases.get(name)
        if for_s <= 0:
            if lease is not None:
                await lease.give_back()
            return False
        if lease is None:
            lease = self._leases[name] = Lease(self._session, name, lasts_s=math.ceil(for_s))
        return await lease.renew() or await lease.take()


def _partition(document: Document) -> tuple[str, int]:
    return document.kind, shard_of(document.tenant)
