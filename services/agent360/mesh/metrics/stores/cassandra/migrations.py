"""Versions of the tables, by subject; safe when several processes start at once.

A migration is a list of statements of which each may be repeated. They are carried out under a
lease, and the version is written after them: a process that dies in between leaves a migration
that the next one begins again.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Final

from agent360.mesh.metrics.ports import StoreError
from agent360.mesh.metrics.stores.cassandra import lease
from agent360.mesh.metrics.stores.cassandra.lease import Lease
from agent360.mesh.metrics.stores.cassandra.session import Session, Statement

Migrations = Sequence[Sequence[str]]
"""Element n takes the tables of a subject from version n to version n + 1."""

_LEASE_S: Final = 120
_IDS: Final = uuid.UUID("8d6e1c0a-6d5e-5a35-9c61-2f8f6a0f4a11")
_TABLES: Final = {
    lease.TABLE: "name text PRIMARY KEY, holder text",
    "schema_versions": "subject text PRIMARY KEY, version int",
}


async def migrate(session: Session, subjects: Mapping[str, Migrations]) -> None:
    """Brings the tables of all subjects to their last versions; does nothing if they have them.

    Raises:
        StoreError: they are of a later version, or a statement failed.
    """
    versions = await _versions(session, subjects)
    if _pending(session, subjects, versions):
        for table, columns in _TABLES.items():
            # Two nodes that make a table at once would give it two identities, and lose what is
            # written to one: so these have the same, whoever makes them.
            identity = uuid.uuid5(_IDS, f"{session.target.keyspace}.{table}")
            await session.change_schema(
                f"CREATE TABLE IF NOT EXISTS {table} ({columns}) WITH ID = {identity}"
            )
        async with Lease(session, "schema", lasts_s=_LEASE_S) as held:
            versions = await _versions(session, subjects)
            for subject, step in _pending(session, subjects, versions):
                for statement in subjects[subject][step]:
                    if not await held.renew():
                        raise StoreError("changing the tables took too long; start again")
                    await session.change_schema(statement)
                await session.run(
                    Statement(
                        "UPDATE schema_versions SET version = ? WHERE subject = ?",
                        (step + 1, subject),
                    )
                )


async def _versions(session: Session, subjects: Mapping[str, Migrations]) -> dict[str, int]:
    found = await session.run(
        Statement(
            "SELECT table_name FROM system_schema.tables "
            "WHERE keyspace_name = ? AND table_name = 'schema_versions'",
            (session.target.keyspace,),
        )
    )
    if not found:
        return {}
    rows = await session.run_all(
        [
            Statement("SELECT version FROM schema_versions WHERE subject = ?", (subject,))
            for subject in subjects
        ]
    )
    return {subject: row[0][0] for subject, row in zip(subjects, rows, strict=True) if row}


def _pending(
    session: Session, subjects: Mapping[str, Migrations], versions: Mapping[str, int]
) -> list[tuple[str, int]]:
    """Subject and index of the migrations that are still to be carried out, in order."""
    for subject, migrations in subjects.items():
        version = versions.get(subject, 0)
        if version > len(migrations):
            raise StoreError(
                f"the tables for {subject} in the keyspace {session.target.keyspace} are of "
                f"version {version}; this service knows {len(migrations)}: use the newer service, "
                "or another keyspace"
            )
    return [
        (subject, step)
        for subject, migrations in subjects.items()
        for step in range(versions.get(subject, 0), len(migrations))
    ]
