"""What only one process may do at a time, agreed on by the nodes with conditional writes."""

from __future__ import annotations

import asyncio
import time
import uuid
from types import TracebackType
from typing import Final, Self

from agent360.mesh.metrics.ports import StoreError
from agent360.mesh.metrics.stores.cassandra.session import Session, Statement

TABLE: Final = "leases"

_TAKE: Final = "INSERT INTO leases (name, holder) VALUES (?, ?) IF NOT EXISTS USING TTL ?"
_RENEW: Final = "UPDATE leases USING TTL ? SET holder = ? WHERE name = ? IF holder = ?"
_GIVE_BACK: Final = "DELETE FROM leases WHERE name = ? IF holder = ?"
_POLL_S: Final = 0.1


class Lease:
    """The right to do something, for a time; it ends by itself if its holder dies.

    What is done under a lease must do no harm if it is done twice: a process that is stopped for
    longer than the lease lasts goes on without it.

    Example:
        >>> async with Lease(session, "schema", lasts_s=60) as lease:
        ...     await lease.renew()
    """

    def __init__(self, session: Session, name: str, *, lasts_s: int, wait_s: float = 120.0) -> None:
        self._session = session
        self._name = name
        self._holder = uuid.uuid4().hex
        self.lasts_s = lasts_s
        """Seconds from the last time that it was taken or renewed."""
        self._wait_s = wait_s

    async def __aenter__(self) -> Self:
        """Waits until it is had.

        Raises:
            StoreError: others have it for too long.
        """
        until_s = time.monotonic() + self._wait_s
        while not await self.take():
            if time.monotonic() > until_s:
                raise StoreError(
                    f"another process holds the lease {self._name!r} in the keyspace "
                    f"{self._session.target.keyspace} for more than {self._wait_s:.0f} s"
                )
            await asyncio.sleep(_POLL_S)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.give_back()

    async def take(self) -> bool:
        """Tries to get it."""
        values = (self._name, self._holder, self.lasts_s)
        answer = await self._session.run(Statement(_TAKE, values))
        # An attempt that seemed to fail may have been carried out.
        return bool(answer[0][0]) or self._holder in answer[0]

    async def renew(self) -> bool:
        """Begins its time anew; False: it has ended and somebody else may have it."""
        values = (self.lasts_s, self._holder, self._name, self._holder)
        answer = await self._session.run(Statement(_RENEW, values))
        return bool(answer[0][0])

    async def give_back(self) -> None:
        """Ends it."""
        await self._session.run(Statement(_GIVE_BACK, (self._name, self._holder)))
