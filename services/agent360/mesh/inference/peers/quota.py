"""Limits of requests, tokens, money and slots, decided by the ratelimit service."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Final, Literal

import structlog

from agent360.client import Decision, Mesh
from agent360.client.context import current_scope
from agent360.client.decisions import Reservation as Held
from agent360.client.errors import MeshError, QuotaViolation, RateLimitedError, UnavailableError
from agent360.mesh.inference.peers.reachability import Reachability
from agent360.mesh.inference.peers.slots import Slots
from agent360.mesh.inference.ports import Amount, Payer, Reservation

REQUESTS: Final = "inference.requests"
"""Name that limits of requests match; one hit a request."""
TOKENS: Final = "inference.tokens"
"""Name that limits of tokens match; reserved before a model runs, settled after."""
COST: Final = "inference.cost"
"""Name that budgets match, in millionths of a US dollar; reserved and settled as tokens are."""

_MAX_FREE: Final = 10_000
_SETTLE_S: Final = 5.0
_MOST: Final = 2**32 - 1
"""The largest amount that the contract has room for: 4,294 US dollars in one request."""


class MeshQuota:
    """The port ``Quota`` over the mesh's ratelimit service.

    The descriptor of all names is ``model`` and, where the request names one, ``user``. Requests
    are charged with leased tokens, so that normally nobody is asked; that no limit of tokens or
    money applies is believed for a while.
    """

    def __init__(
        self,
        mesh: Mesh,
        log: structlog.stdlib.BoundLogger,
        *,
        timeout_s: float,
        when_away: Literal["open", "closed"],
        unlimited_s: float,
        slot_ttl_s: float,
    ) -> None:
        self._mesh = mesh
        self._timeout_s = timeout_s
        self._unlimited_s = unlimited_s
        self._open = when_away == "open"
        consequence = "requests are served without limits" if self._open else "requests are refused"
        self._reach = Reachability("ratelimit", consequence, log)
        self._free_until: dict[tuple[str, Payer], float] = {}
        self._slots = Slots(mesh.ratelimit, slot_ttl_s, timeout_s)

    async def close(self) -> None:
        """See ``Quota.close``."""
        await self._slots.close()

    def admit_at_once(self, payer: Payer) -> bool:
        """See ``Quota.admit_at_once``."""
        decision = self._mesh.ratelimit.spend(
            REQUESTS, descriptor=_descriptor(payer), tenant=payer.tenant
        )
        if decision is None:
            return False
        if not decision.allowed:
            raise _denied(payer, "requests", decision)
        return True

    async def admit(self, payer: Payer) -> None:
        """See ``Quota.admit``."""
        if not self._worth_asking(payer):
            return
        try:
            decision = await self._mesh.ratelimit.check(
                REQUESTS,
                descriptor=_descriptor(payer),
                leased=True,
                timeout=self._timeout_s,
                tenant=payer.tenant,
            )
        except MeshError as error:
            if _own_deadline_passed():
                # The caller gave no time to answer; that must not open the limits for others.
                raise
            self._unanswered(payer, error)
            return
        self._reach.answered()
        if not decision.allowed:
            raise _denied(payer, "requests", decision)

    def free(self, payer: Payer, most: Amount) -> bool:
        """See ``Quota.free``."""
        return not self._wanted(payer, most)

    async def reserve(self, payer: Payer, most: Amount) -> Reservation:
        """See ``Quota.reserve``."""
        wanted = self._wanted(payer, most)
        if not wanted or not self._worth_asking(payer):
            return Reservation()
        if len(wanted) == 1:
            held = [await self._hold(payer, *wanted[0])]
        else:
            held = await asyncio.gather(*(self._hold(payer, *each) for each in wanted))
        ids = {name: got.reservation_id for (name, _), got in zip(wanted, held, strict=True) if got}
        reservation = Reservation(ids.get(TOKENS, ""), ids.get(COST, ""))
        for (name, amount), got in zip(wanted, held, strict=True):
            if got is not None and not got.decision.allowed:
                await self.settle(payer, reservation, Amount())
                raise _denied(payer, _what(name, amount), got.decision)
        if None in held:
            try:
                self._decide_alone(payer, None)
            except UnavailableError:
                await self.settle(payer, reservation, Amount())
                raise
        return reservation

    async def settle(self, payer: Payer, reservation: Reservation, used: Amount) -> None:
        """See ``Quota.settle``."""
        pairs = ((reservation.tokens, used.tokens), (reservation.money, used.micro_usd))
        due = [(reservation_id, amount) for reservation_id, amount in pairs if reservation_id]
        if len(due) == 1:
            await self._settle(payer, *due[0])
        elif due:
            await asyncio.gather(*(self._settle(payer, *each) for each in due))

    def slot(self, payer: Payer) -> AbstractAsyncContextManager[None]:
        """See ``Quota.slot``."""
        if not self._worth_asking(payer):
            return nullcontext()
        return self._slots.held(
            payer.tenant,
            _descriptor(payer),
            denied=lambda decision: _denied(payer, "requests at a time", decision),
            unanswered=lambda error: self._unanswered(payer, error),
        )

    def _wanted(self, payer: Payer, most: Amount) -> list[tuple[str, int]]:
        """What limits may apply to, by name."""
        now, until = time.monotonic(), self._free_until
        amounts = ((TOKENS, most.tokens), (COST, most.micro_usd))
        return [
            (name, min(amount, _MOST))
            for name, amount in amounts
            if amount and until.get((name, payer), 0.0) <= now
        ]

    async def _hold(self, payer: Payer, name: str, amount: int) -> Held | None:
        """Reserves; None: the service does not answer."""
        try:
            # With an id of its own, it can be sent again when a connection breaks.
            held = await self._mesh.ratelimit.reserve(
                name,
                amount,
                descriptor=_descriptor(payer),
                request_id=str(uuid.uuid4()),
                timeout=self._timeout_s,
                tenant=payer.tenant,
            )
        except MeshError as error:
            self._reach.failed(error)
            return None
        self._reach.answered()
        if held.decision.allowed and not held.decision.limit:
            if len(self._free_until) >= _MAX_FREE:
                self._free_until.clear()
            self._free_until[name, payer] = time.monotonic() + self._unlimited_s
        return held

    async def _settle(self, payer: Payer, reservation_id: str, amount: int) -> None:
        try:
            # Nobody waits for it, and repeating it changes nothing: it may take its time.
            await self._mesh.ratelimit.settle(
                reservation_id, min(amount, _MOST), timeout=_SETTLE_S, tenant=payer.tenant
            )
        except MeshError as error:
            # Unsettled, the reservation counts as spent when its time is over.
            self._reach.failed(error)

    def _worth_asking(self, payer: Payer) -> bool:
        if self._reach.worth_asking():
            return True
        self._decide_alone(payer, None)
        return False

    def _unanswered(self, payer: Payer, error: MeshError) -> None:
        self._reach.failed(error)
        self._decide_alone(payer, error)

    def _decide_alone(self, payer: Payer, error: MeshError | None) -> None:
        self._mesh.metrics.count("inference_ratelimit_unanswered_total", tenant=payer.tenant)
        if not self._open:
            raise UnavailableError(
                "the ratelimit service does not answer, and nothing is served without it",
                reason="RATELIMIT_UNAVAILABLE",
                retry_after_s=1.0,
            ) from error


class NoQuota:
    """The port ``Quota`` where nothing is limited."""

    async def close(self) -> None:
        """See ``Quota.close``."""

    def admit_at_once(self, payer: Payer) -> bool:  # noqa: ARG002
        """See ``Quota.admit_at_once``."""
        return True

    async def admit(self, payer: Payer) -> None:
        """See ``Quota.admit``."""

    def free(self, payer: Payer, most: Amount) -> bool:  # noqa: ARG002
        """See ``Quota.free``."""
        return True

    async def reserve(self, payer: Payer, most: Amount) -> Reservation:  # noqa: ARG002
        """See ``Quota.reserve``."""
        return Reservation()

    async def settle(self, payer: Payer, reservation: Reservation, used: Amount) -> None:
        """See ``Quota.settle``."""

    def slot(self, payer: Payer) -> AbstractAsyncContextManager[None]:  # noqa: ARG002
        """See ``Quota.slot``."""
        return nullcontext()


def _own_deadline_passed() -> bool:
    deadline = current_scope().deadline
    return deadline is not None and deadline <= time.monotonic()


def _descriptor(payer: Payer) -> dict[str, str]:
    if payer.user:
        return {"model": payer.model, "user": payer.user}
    return {"model": payer.model}


def _what(name: str, amount: int) -> str:
    if name == COST:
        return f"cost (up to ${amount / 1e6:.6f} wanted)"
    return f"tokens ({amount:,} wanted)"


def _denied(payer: Payer, what: str, decision: Decision) -> RateLimitedError:
    when = decision.retry_after_s
    hint = "" if when is None else f"; try again in {when:.3g} s"
    return RateLimitedError(
        f"limit {decision.limit_id} of {what} is exceeded{hint}",
        metadata={"limit_id": decision.limit_id, "remaining": str(decision.remaining)},
        retry_after_s=when,
        quotas=[QuotaViolation(f"tenant:{payer.tenant}", f"limit {decision.limit_id} of {what}")],
    )
