"""The embedded store: one SQLite file in WAL mode."""

from agent360.mesh.metrics.ports import Stores
from agent360.mesh.metrics.stores.sqlite.database import Database
from agent360.mesh.metrics.stores.sqlite.events import SqliteEventStore
from agent360.mesh.metrics.stores.sqlite.logs import SqliteLogStore
from agent360.mesh.metrics.stores.sqlite.rollups import SqliteRollupStore
from agent360.mesh.metrics.stores.sqlite.rules import SqliteRuleStore

__all__ = [
    "Database",
    "SqliteEventStore",
    "SqliteLogStore",
    "SqliteRollupStore",
    "SqliteRuleStore",
    "open_sqlite",
]


def open_sqlite(path: str) -> Stores:
    """Opens the store, made or brought up to date if need be; ``:memory:`` ends with the process.

    Raises:
        StoreError: the file cannot be used, or is of a later version.
    """
    database = Database(path)
    return Stores(
        SqliteRollupStore(database),
        SqliteEventStore(database),
        SqliteLogStore(database),
        SqliteRuleStore(database),
        database.close,
    )
