"""Leases: tokens of a limit that were charged in advance and are spent without asking again."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from time import monotonic
from typing import Any, Final, TypeVar

from msgspec import Struct

from agent360.client.decisions import Decision
from agent360.client.errors import MeshError

T = TypeVar("T")

_FIRST_TOKENS: Final = 8
_MOST_TOKENS: Final = 65_536
_FAST_S: Final = 0.25
"""A lease that is spent faster than this is followed by a larger one."""
_DENIED_S: Final = 0.05
"""How long a denial is believed at most."""
_ASK_AGAIN_S: Final = 5.0
"""How long the answer that a limit allows no leases is believed."""
_MAX_POOLS: Final = 10_000
_UNLIMITED: Final = 1 << 62

PoolKey = tuple[Any, ...]


class Lease(Struct, frozen=True, gc=False):
    """Tokens that may be spent without asking, or the decision that there are none."""

    decision: Decision
    """The decision; ``granted`` says how many tokens were leased."""
    lease_id: str
    """For ``return_lease``; empty when nothing was granted or no limit applies."""
    ttl_s: float
    """Seconds for which they may be spent."""
    strict: bool
    """True where a limit allows no leases."""


class _Held:
    """A lease that is being spent."""

    __slots__ = ("ends", "lease_id", "left")

    def __init__(self, lease: Lease, asked_at: float) -> None:
        self.lease_id = lease.lease_id
        self.left = lease.decision.granted if lease.lease_id else _UNLIMITED
        self.ends = asked_at + lease.ttl_s


class LeasePool:
    """The leases of one name and descriptor of one tenant.

    Invariant: every token in ``_held`` was charged before, and none is spent after its lease's end.
    The first lease is spent first.
    """

    __slots__ = (
        "_asking",
        "_background",
        "_denial",
        "_denied_until",
        "_give_back",
        "_held",
        "_lease",
        "_limit",
        "_limit_id",
        "_low",
        "_reset_after_s",
        "_size",
        "_spent_since",
        "strict_until",
    )

    def __init__(
        self,
        lease: Callable[[int], Awaitable[Lease]],
        give_back: Callable[[str, int], Awaitable[object]],
        background: Background,
    ) -> None:
        """Makes a pool that holds nothing.

        Args:
            lease: asks for tokens.
            give_back: returns unspent ones.
            background: runs what nobody waits for.
        """
        self._lease = lease
        self._give_back = give_back
        self._background = background
        self._held: deque[_Held] = deque()
        self._asking: asyncio.Task[None] | None = None
        self._size = _FIRST_TOKENS
        self._low = 0
        self._spent_since = 0.0
        self._denial: Decision | None = None
        self._denied_until = 0.0
        self._limit = 0
        self._limit_id = ""
        self._reset_after_s = 0.0
        self.strict_until = 0.0
        """Until when the limit is known to allow no leases."""

    def take(self, hits: int, now: float) -> Decision | None:
        """Spends tokens, or repeats a denial that is believed; None: the service must be asked."""
        held = self._held
        while held:
            first = held[0]
            left = first.left - hits
            if left >= 0 and now < first.ends:
                first.left = left
                if left < self._low and self._asking is None and len(held) == 1:
                    self.ask(hits)
                return Decision(
                    True,
                    hits,
                    left if self._limit else 0,
                    self._limit,
                    self._reset_after_s,
                    None,
                    self._limit_id,
                    False,
                )
            if now < first.ends and len(held) == 1:
                break
            held.popleft()
            self._return(first)
        if self._denial is not None and now < self._denied_until and hits >= 1:
            return self._denial
        return None

    async def lease(self, hits: int) -> Decision | None:
        """Asks the service, or waits for who has asked, and spends; None: not enough was leased.

        Raises:
            MeshError: the service could not be asked.
        """
        while True:
            mine = self._asking is None
            await asyncio.shield(self._asking or self.ask(hits))
            now = monotonic()
            if now < self.strict_until:
                return None
            decision = self.take(hits, now)
            if decision is not None:
                return decision
            if mine:  # less is left than it takes: what there is must not be held back
                await self.close()
                return None

    @property
    def idle(self) -> bool:
        """Whether it holds nothing and has asked for nothing."""
        return not self._held and self._asking is None

    def ask(self, hits: int) -> asyncio.Task[None]:
        """Has tokens leased; whoever waits is told of an error."""
        task = self._asking = self._background.spawn(self._ask(hits))
        return task

    async def close(self) -> None:
        """Gives everything back."""
        if self._asking is not None:
            await asyncio.wait((self._asking,))
        held, self._held = self._held, deque()
        for each in held:
            if each.left and each.lease_id:
                await self._give_back(each.lease_id, each.left)

    async def _ask(self, hits: int) -> None:
        try:
            asked_at = monotonic()
            if asked_at - self._spent_since < _FAST_S:
                self._size = min(_MOST_TOKENS, 2 * self._size)
            self._spent_since = asked_at
            lease = await self._lease(max(hits, self._size))
        finally:
            self._asking = None
        decision = lease.decision
        if lease.strict:
            self.strict_until = asked_at + _ASK_AGAIN_S
            return
        self._limit, self._limit_id = decision.limit, decision.limit_id
        self._reset_after_s = decision.reset_after_s
        if not decision.granted:
            self._size = max(1, self._size // 2)
            self._denial = decision
            wait_s = decision.retry_after_s
            self._denied_until = asked_at + min(_DENIED_S if wait_s is None else wait_s, _DENIED_S)
            return
        self._denial = None
        held = _Held(lease, asked_at)
        self._low = held.left // 4 if held.lease_id else 0
        self._held.append(held)
        asyncio.get_running_loop().call_at(held.ends, self._expire, held)

    def _expire(self, held: _Held) -> None:
        """What was not spent in time goes back, and less is leased next."""
        if held in self._held:
            self._held.remove(held)
            if held.left > self._size // 2:
                self._size = max(1, self._size // 2)
            self._return(held)

    def _return(self, held: _Held) -> None:
        if held.left and held.lease_id:
            left, held.left = held.left, 0
            self._background.spawn(self._give_back_quietly(held.lease_id, left))

    async def _give_back_quietly(self, lease_id: str, unspent: int) -> None:
        with contextlib.suppress(MeshError):  # then they count as spent
            await self._give_back(lease_id, unspent)


class Background:
    """Tasks that nobody waits for, in an empty context: no caller's tenant or trace leaks."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts one."""
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def settle(self) -> None:
        """Waits for all."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits has it


class Leases:
    """All pools of a client."""

    def __init__(
        self,
        lease: Callable[[str, int, Mapping[str, str] | None, str], Awaitable[Lease]],
        give_back: Callable[[str, int, str], Awaitable[object]],
    ) -> None:
        """Makes none yet.

        Args:
            lease: asks for tokens: name, how many, descriptor, tenant.
            give_back: returns unspent ones: lease id, how many, tenant.
        """
        self._lease = lease
        self._give_back = give_back
        self._background = Background()
        self._pools: dict[PoolKey, LeasePool] = {}

    def pool(self, tenant: str, name: str, descriptor: Mapping[str, str] | None) -> LeasePool:
        """The pool of a name and descriptor."""
        key: PoolKey = (tenant, name, *descriptor.items()) if descriptor else (tenant, name)
        pool = self._pools.get(key)
        if pool is None:
            facts = dict(descriptor) if descriptor else None
            if len(self._pools) >= _MAX_POOLS:
                self._background.spawn(self._pools.pop(next(iter(self._pools))).close())
            pool = self._pools[key] = LeasePool(
                lambda tokens: self._lease(name, tokens, facts, tenant),
                lambda lease_id, unspent: self._give_back(lease_id, unspent, tenant),
                self._background,
            )
        return pool

    async def close(self, grace_s: float) -> None:
        """Gives everything back, within ``grace_s`` seconds."""
        pools = list(self._pools.values())
        self._pools.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await asyncio.gather(*(pool.close() for pool in pools), return_exceptions=True)
                await self._background.settle()
