"""Versions of the tables, by subject, each reached from the one before in a transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence

from agent360.mesh.metrics.ports import StoreError

Migrations = Sequence[Callable[[sqlite3.Connection], None]]
"""Element n takes the tables of a subject from version n to version n + 1."""


def script(text: str) -> Callable[[sqlite3.Connection], None]:
    """A migration that consists of statements, each ended by a semicolon.

    Example:
        >>> MIGRATIONS = (script("CREATE TABLE rules (name TEXT PRIMARY KEY);"),)
    """

    def run(db: sqlite3.Connection) -> None:
        for statement in text.split(";"):
            if statement.strip():
                db.execute(statement)

    return run


def migrate(db: sqlite3.Connection, subject: str, migrations: Migrations) -> None:
    """Brings the tables of a subject to the last version; does nothing if they have it.

    Raises:
        StoreError: the file was written by a later version of the service.
        sqlite3.Error: a statement failed; the tables are as before.
    """
    db.execute(
        "CREATE TABLE IF NOT EXISTS schema_version "
        "(subject TEXT PRIMARY KEY, version INTEGER NOT NULL)"
    )
    db.execute("BEGIN IMMEDIATE")
    try:
        for step in migrations[_version(db, subject, len(migrations)) :]:
            step(db)
        db.execute("REPLACE INTO schema_version VALUES (?, ?)", (subject, len(migrations)))
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


def _version(db: sqlite3.Connection, subject: str, known: int) -> int:
    row = db.execute("SELECT version FROM schema_version WHERE subject = ?", (subject,)).fetchone()
    version = int(row[0]) if row else 0
    if version > known:
        raise StoreError(
            f"the tables for {subject} are of version {version}; this service knows {known}: "
            "use the newer service, or another file"
        )
    return version


def exists(db: sqlite3.Connection, table: str) -> bool:
    """Whether there is a table of that name."""
    found = db.execute("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?", (table,))
    return found.fetchone() is not None
