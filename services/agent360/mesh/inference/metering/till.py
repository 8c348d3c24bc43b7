"""Sets tokens and money aside before a model runs and settles each exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

from agent360.client.errors import MeshError
from agent360.mesh.inference.answers import Usage
from agent360.mesh.inference.billing import Bill
from agent360.mesh.inference.catalogue import cost_usd
from agent360.mesh.inference.ports import Amount, Payer, Quota, Reservation
from agent360.mesh.inference.settings import ModelSettings


class Charge:
    """What was set aside for one request, until it is settled.

    Invariant: it is settled once; whoever settles it again changes nothing.
    """

    __slots__ = ("_reservation", "_till", "part", "payer", "settled")

    def __init__(self, till: Till, payer: Payer, reservation: Reservation) -> None:
        self._till = till
        self._reservation = reservation
        self.payer = payer
        self.settled: Amount | None = None
        """What it was settled with; None: it is open."""
        self.part = 0.0
        """Which part of what the model cost this is, 0 to 1; right once it is settled."""

    def settle(self, used: Amount, part: float = 1.0) -> None:
        """Replaces what was set aside by what was used, in the background.

        Args:
            used: what is charged.
            part: which part of the model's cost that is.
        """
        if self.settled is None:
            self.settled, self.part = used, part
            self._till.settle_later(self.payer, self._reservation, used)


class Till:
    """Opens charges, and finishes what nobody waits for.

    Example:
        >>> charge = await till.open(payer, most_of([model], prompt_tokens, output_tokens))
        >>> try:
        ...     ...
        ... finally:
        ...     charge.settle(used_of(bill))
    """

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._afterwards: set[asyncio.Task[None]] = set()

    async def open(self, payer: Payer, most: Amount) -> Charge:
        """Sets aside the most that a request can use.

        Raises:
            RateLimitedError: a limit denies it; nothing is set aside.
        """
        if self._quota.free(payer, most):
            return Charge(self, payer, _NOTHING)
        reserving = asyncio.ensure_future(self._quota.reserve(payer, most))
        try:
            reservation = await asyncio.shield(reserving)
        except asyncio.CancelledError:
            self.do_afterwards(self._let_go(payer, reserving))
            raise
        return Charge(self, payer, reservation)

    def settle_later(self, payer: Payer, reservation: Reservation, used: Amount) -> None:
        """Settles in the background; for charges."""
        if reservation != _NOTHING:
            self.do_afterwards(self._quota.settle(payer, reservation, used))

    def do_afterwards(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs ``work`` even if the task it comes from is being cancelled."""
        task = asyncio.get_running_loop().create_task(work)
        self._afterwards.add(task)
        task.add_done_callback(self._afterwards.discard)

    async def close(self, grace_s: float) -> None:
        """Waits for what is settled in the background, ``grace_s`` seconds at most."""
        if self._afterwards:
            await asyncio.wait(self._afterwards, timeout=grace_s)

    async def _let_go(self, payer: Payer, reserving: asyncio.Future[Reservation]) -> None:
        try:
            reservation = await reserving
        except MeshError:
            return
        await self._quota.settle(payer, reservation, Amount())


_NOTHING = Reservation()


def most_of(models: Iterable[ModelSettings], input_tokens: int, output_tokens: int) -> Amount:
    """The most that a request can use of any of these models."""
    usage = Usage(input_tokens, output_tokens)
    dearest = max(cost_usd(model, usage) for model in models)
    # Rounded up: a budget may not be passed by fractions.
    return Amount(input_tokens + output_tokens, -int(-dearest * 1e6 // 1))


def used_of(bill: Bill) -> Amount:
    """What a request used, without tries whose words reached nobody."""
    usd = sum(cost_usd(each.model, each.usage) for each in bill.spent if not each.wasted)
    return Amount(bill.tokens, round(usd * 1e6))
