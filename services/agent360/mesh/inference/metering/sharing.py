"""How one call of a model is charged to all whose requests it answers."""

from __future__ import annotations

from collections.abc import Callable

from agent360.mesh.inference.caching.settings import Billing
from agent360.mesh.inference.metering.till import Charge
from agent360.mesh.inference.ports import Amount


class SharedBill:
    """The charges of a flight: that of the one it began for, and those of who joined.

    ``leader``: who joins pays nothing. ``each``: everyone pays all of it. ``split``: those who are
    there when it ends pay equal parts, and the leader what cannot be divided.

    Example:
        >>> bill = SharedBill("split")
        >>> bill.leader = charge
        >>> bill.join(another)
        >>> bill.settle(Amount(tokens=100))
        >>> another.settled
        Amount(tokens=50, micro_usd=0)
    """

    __slots__ = ("_afterwards", "_billing", "_joined", "leader", "total")

    def __init__(self, billing: Billing) -> None:
        self._billing = billing
        self._joined: list[Charge] = []
        self._afterwards: list[Callable[[], None]] = []
        self.leader: Charge | None = None
        """The charge of the one for whom the call is made; None: nothing was set aside yet."""
        self.total: Amount | None = None
        """What the call used; None: it has not ended."""

    @property
    def joiners_pay(self) -> bool:
        """Whether who joins must set something aside."""
        return self._billing != "leader"

    def join(self, charge: Charge) -> None:
        """Takes the charge of one who joined; parts are not made anew for who comes too late."""
        if self.total is None:
            self._joined.append(charge)
        elif self._billing == "each":
            charge.settle(self.total)
        else:
            charge.settle(Amount(), 0.0)

    def leave(self, charge: Charge, produced: Amount) -> None:
        """One who joined left; it pays for what was produced, or not at all where parts are paid.

        Args:
            charge: its charge.
            produced: what the call has used so far.
        """
        if self.total is None:
            self._joined.remove(charge)
            if self._billing == "each":
                charge.settle(produced)
            else:
                charge.settle(Amount(), 0.0)

    def settle(self, total: Amount) -> None:
        """The call ended; everyone is charged. Told again, nothing changes."""
        if self.total is not None:
            return
        self.total = total
        others = len(self._joined)
        own, share, part = total, total, 1.0
        if self._billing == "split":
            part = 1 / (others + 1)
            share = Amount(total.tokens // (others + 1), total.micro_usd // (others + 1))
            own = Amount(
                total.tokens - others * share.tokens, total.micro_usd - others * share.micro_usd
            )
        for charge in self._joined:
            charge.settle(share, part)
        if self.leader is not None:
            self.leader.settle(own, part)
        for call in self._afterwards:
            call()

    def when_settled(self, call: Callable[[], None]) -> None:
        """Calls back when everyone has been charged: at once if that is so already."""
        if self.total is None:
            self._afterwards.append(call)
        else:
            call()
