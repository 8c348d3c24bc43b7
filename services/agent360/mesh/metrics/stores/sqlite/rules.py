"""Alert rules, states and silences on SQLite."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Sequence
from typing import Final

from agent360.mesh.metrics.ports import Document
from agent360.mesh.metrics.stores.sqlite.database import Database
from agent360.mesh.metrics.stores.sqlite.migrations import script

_MIGRATIONS: Final = (
    script("""
CREATE TABLE documents (
    kind TEXT NOT NULL, tenant TEXT NOT NULL, name TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (kind, tenant, name)) WITHOUT ROWID;
"""),
    script("""
CREATE TABLE leases (name TEXT PRIMARY KEY, holder TEXT NOT NULL, until REAL NOT NULL);
"""),
)


class SqliteRuleStore:
    """The port ``RuleStore``."""

    def __init__(self, database: Database) -> None:
        database.migrate("rules", _MIGRATIONS)
        self._database = database
        self._holder = uuid.uuid4().hex

    async def put(self, documents: Sequence[Document], gone: Sequence[Document] = ()) -> None:
        """See ``RuleStore.put``."""

        def write(db: sqlite3.Connection) -> None:
            db.executemany(
                "DELETE FROM documents WHERE kind = ? AND tenant = ? AND name = ?",
                [(each.kind, each.tenant, each.name) for each in gone],
            )
            db.executemany(
                "REPLACE INTO documents (kind, tenant, name, body) VALUES (?, ?, ?, ?)",
                [(each.kind, each.tenant, each.name, each.body) for each in documents],
            )

        await self._database.write(write)

    async def documents(self, kind: str, tenant: str | None = None) -> list[Document]:
        """See ``RuleStore.documents``."""
        rows = await self._database.read(
            lambda db: db.execute(
                "SELECT tenant, kind, name, body FROM documents "
                "WHERE kind = ?1 AND (?2 IS NULL OR tenant = ?2) ORDER BY tenant, name",
                (kind, tenant),
            ).fetchall()
        )
        return [Document(*row) for row in rows]

    async def lease(self, name: str, now_s: float, for_s: float, /) -> bool:
        """See ``RuleStore.lease``."""

        def write(db: sqlite3.Connection) -> bool:
            db.execute(
                "INSERT INTO leases (name, holder, until) VALUES (?1, ?2, ?3 + ?4) "
                "ON CONFLICT (name) DO UPDATE SET holder = ?2, until = ?3 + ?4 "
                "WHERE holder = ?2 OR until <= ?3",
                (name, self._holder, now_s, for_s),
            )
            held = db.execute("SELECT holder, until FROM leases WHERE name = ?", (name,)).fetchone()
            return bool(held[0] == self._holder and held[1] > now_s)

        return await self._database.write(write)
