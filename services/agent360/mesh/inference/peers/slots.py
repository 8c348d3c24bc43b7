"""Concurrency slots of the ratelimit service, held while a model runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Final

from agent360.client import Decision
from agent360.client.decisions import Slot
from agent360.client.errors import MeshError
from agent360.client.ratelimit import RateLimitClient

SLOTS: Final = "inference.concurrent"
"""Name that concurrency limits match; one slot for each request that runs a model."""


class Slots:
    """Takes slots, keeps them as long as they are needed, and gives them back.

    Example:
        >>> async with slots.held("acme", {"model": "small"}, denied=..., unanswered=...):
        ...     await run()
    """

    def __init__(self, ratelimit: RateLimitClient, ttl_s: float, timeout_s: float) -> None:
        self._ratelimit = ratelimit
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._returning: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Waits until what is being given back has been, or is not answered in time."""
        if self._returning:
            await asyncio.wait(self._returning, timeout=2 * self._timeout_s)

    @contextlib.asynccontextmanager
    async def held(
        self,
        tenant: str,
        descriptor: Mapping[str, str],
        *,
        denied: Callable[[Decision], MeshError],
        unanswered: Callable[[MeshError], None],
    ) -> AsyncIterator[None]:
        """Holds one slot inside.

        Args:
            tenant: whose slots.
            descriptor: facts for matching.
            denied: makes the error where all slots are taken.
            unanswered: told that the service does not answer; may raise.
        """
        slot_id = await self._taken(tenant, descriptor, denied, unanswered)
        if not slot_id:
            yield
            return
        renewing = asyncio.ensure_future(self._renew(slot_id, tenant))
        try:
            yield
        finally:
            renewing.cancel()
            self._later(self._give_back(slot_id, tenant))

    async def _taken(
        self,
        tenant: str,
        descriptor: Mapping[str, str],
        denied: Callable[[Decision], MeshError],
        unanswered: Callable[[MeshError], None],
    ) -> str:
        """Id of the slot that was taken; empty where no limit applies or nobody answers."""
        taking = asyncio.ensure_future(
            self._ratelimit.acquire(
                SLOTS,
                descriptor=descriptor,
                ttl=self._ttl_s,
                timeout=self._timeout_s,
                tenant=tenant,
            )
        )
        try:
            slot = await asyncio.shield(taking)
        except MeshError as error:
            unanswered(error)
            return ""
        except asyncio.CancelledError:
            # Taken or not, nobody will use it.
            self._later(self._give_back_when(taking, tenant))
            raise
        if not slot.decision.allowed:
            raise denied(slot.decision)
        return slot.slot_id

    async def _renew(self, slot_id: str, tenant: str) -> None:
        """Keeps a slot; a renewal that fails is tried again before the slot's time is over."""
        while True:
            await asyncio.sleep(self._ttl_s / 3)
            with contextlib.suppress(MeshError):
                await self._ratelimit.renew(
                    slot_id, ttl=self._ttl_s, timeout=self._timeout_s, tenant=tenant
                )

    async def _give_back_when(self, taking: asyncio.Future[Slot], tenant: str) -> None:
        with contextlib.suppress(MeshError):
            slot = await taking
            if slot.slot_id:
                await self._give_back(slot.slot_id, tenant)

    async def _give_back(self, slot_id: str, tenant: str) -> None:
        # A slot that cannot be given back comes back when its time is over.
        with contextlib.suppress(MeshError):
            await self._ratelimit.release(slot_id, timeout=self._timeout_s, tenant=tenant)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)
