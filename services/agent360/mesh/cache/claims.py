"""Single-flight: of all callers that miss a key, one fills it and the others wait."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import grpc

from agent360.client.errors import MeshError
from agent360.mesh.cache.entry import Entry, Space
from agent360.mesh.cache.ports import Clock, Timer


class Grant(NamedTuple):
    """The right to fill a key."""

    token: str
    """Names the claim."""
    timeout_s: float
    """Seconds until the claim falls to the next caller."""


class Claimed(NamedTuple):
    """What a claim found or gave."""

    entry: Entry | None
    """The entry: fresh, or stale where that is allowed."""
    grant: Grant | None = None
    """The right, and the duty, to fill the key."""
    fail_safe: bool = False
    """Whether the entry stands in because loading failed or the shared store is away."""
    degraded: bool = False
    """Whether the shared store was away and only this replica was asked."""


class Waiter(NamedTuple):
    """What a caller that waits would do."""

    timeout_s: float
    """How long its own fill may take, should the claim fall to it."""
    allow_stale: bool
    """Whether it takes a stale entry instead of waiting."""


class Claim:
    """A key that is being filled.

    Invariant: while ``token`` is not empty only its holder may fill the key; each future in
    ``waiters`` belongs to a caller that waits for it. An open claim without a token is decided
    elsewhere, or pauses after a failure: then ``stand_in`` is what everybody gets.
    """

    __slots__ = (
        "asking", "began", "decided", "decided_at", "doubted", "eager", "ended", "floor", "key",
        "released", "result", "space", "stand_in", "timeout_s", "timer", "token", "uncounted",
        "void_tags", "waiters",
    )  # fmt: skip

    def __init__(self, space: Space, key: str) -> None:
        self.space = space
        self.key = key
        self.token = ""
        self.began = 0.0
        self.timer: Timer | None = None
        self.stand_in: Entry | None = None
        self.void_tags: set[str] = set()
        """Tags that were invalidated since the claim: an entry with one of them is outdated."""
        self.waiters: OrderedDict[asyncio.Future[Claimed], Waiter] = OrderedDict()
        """Those who wait, in order."""
        self.ended = False
        """Whether it is no longer open: who comes to wait for it now is not answered any more."""
        self.result: Claimed | None = None
        """What those who waited got when it ended, if it was a result."""
        self.asking = False
        """Whether the shared store is deciding: who may fill, or whether a fill is still wanted."""
        self.timeout_s = 0.0
        """How long the fill of the caller that began it may take."""
        self.eager = False
        """Whether it is to refresh an entry that is still fresh."""
        self.decided = False
        """Whether the shared store has decided before."""
        self.decided_at = 0
        """The last version that had been given when the shared store decided."""
        self.floor = 0
        """The version of the last change of the key that was heard of."""
        self.released = False
        """Whether the holder was heard to have given up while the store was being asked."""
        self.doubted = False
        """Whether something was heard, or may have gone unheard, that may concern the entry."""
        self.uncounted = 0
        """Lookups of those who wait for the store's first answer: hits or misses, it will show."""


class Claims:
    """All claims of this replica. A claim belongs to no call: it outlives its filler's."""

    def __init__(
        self,
        clock: Clock,
        new_token: Callable[[], str],
        max_open: int,
        *,
        orphaned: Callable[[Claim], None] | None = None,
    ) -> None:
        """Makes an empty table.

        Args:
            clock: says when claims expire.
            new_token: makes a token that cannot be guessed.
            max_open: how many claims a tenant may have.
            orphaned: told of a claim whose filler is out; None: the next caller that waits gets it.
        """
        self._clock = clock
        self._new_token = new_token
        self._max_open = max_open
        self._orphaned = orphaned or self.pass_on
        self._by_space: dict[Space, dict[str, Claim]] = {}
        self._by_tenant: Counter[str] = Counter()
        self._by_token: dict[str, Claim] = {}

    def __len__(self) -> int:
        """How many claims are open."""
        return self._by_tenant.total()

    def find(self, space: Space, key: str) -> Claim | None:
        """The open claim of a key."""
        claims = self._by_space.get(space)
        return None if claims is None else claims.get(key)

    def redeem(self, token: str, tenant: str) -> Claim | None:
        """The open claim that a token of the tenant names."""
        claim = self._by_token.get(token)
        return claim if claim is not None and claim.space.tenant == tenant else None

    def open(self, space: Space, key: str, timeout_s: float) -> Grant:
        """Claims a key that nobody claims.

        Raises:
            MeshError: the tenant has as many open claims as it may.
        """
        return self.grant(self.begin(space, key), timeout_s)

    def begin(self, space: Space, key: str) -> Claim:
        """Opens a claim that nobody holds yet, of a key that nobody claims.

        Raises:
            MeshError: the tenant has as many open claims as it may.
        """
        open_now = self._by_tenant[space.tenant]
        if open_now >= self._max_open:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "CLAIMS_EXHAUSTED",
                f"{open_now:,} keys are being filled, which is the most a tenant may have",
            )
        claim = self._by_space.setdefault(space, {})[key] = Claim(space, key)
        self._by_tenant[space.tenant] += 1
        return claim

    def grant(self, claim: Claim, timeout_s: float, token: str = "") -> Grant:
        """Gives a claim that nobody holds a holder.

        Args:
            claim: an open claim.
            timeout_s: how long the holder has.
            token: names it; empty: a new one.
        """
        token = token or self._new_token()
        now = self._clock.now()
        claim.token = token
        claim.began = now
        claim.void_tags.clear()
        claim.timer = self._clock.call_at(now + timeout_s, lambda: self._expired(claim))
        self._by_token[token] = claim
        return Grant(token, timeout_s)

    async def wait(self, claim: Claim, timeout_s: float, *, allow_stale: bool = False) -> Claimed:
        """Waits for the fill.

        Args:
            claim: an open claim.
            timeout_s: how long the caller's own fill may take, should the claim fall to it.
            allow_stale: whether the caller takes a stale entry instead, should there be one.

        Returns:
            The entry that was filled in, or the right to fill it.
        """
        future: asyncio.Future[Claimed] = asyncio.get_running_loop().create_future()
        claim.waiters[future] = Waiter(timeout_s, allow_stale)
        try:
            return await future
        except asyncio.CancelledError:
            claim.waiters.pop(future, None)
            if future.done() and not future.cancelled() and future.exception() is None:
                self.hand_back(future.result())
            raise

    def settle(self, claim: Claim, result: Claimed) -> None:
        """Ends a claim: all who wait get the result."""
        claim.result = result
        self.end(claim)
        self.answer(claim, result)

    def settle_stale(self, claim: Claim, result: Claimed) -> None:
        """All who wait and take a stale entry get it; the claim goes on."""
        for future, waiter in list(claim.waiters.items()):
            if waiter.allow_stale:
                del claim.waiters[future]
                if not future.done():
                    future.set_result(result)

    def fail(self, claim: Claim, stand_in: Entry, pause_s: float) -> None:
        """Loading failed: for a while all get an entry that stands in, then it is tried again."""
        self.revoke(claim)
        claim.stand_in = stand_in
        claim.timer = self._clock.call_at(self._clock.now() + pause_s, lambda: self.end(claim))
        self.answer(claim, Claimed(stand_in, fail_safe=True))

    def pass_on(self, claim: Claim) -> None:
        """Takes the claim from its filler: the next caller that waits gets it, if there is one."""
        self.revoke(claim)
        waiter = self.first_waiter(claim)
        if waiter is None:
            self.end(claim)
        else:
            self.give(claim, Claimed(None, self.grant(claim, waiter.timeout_s)))

    def first_waiter(self, claim: Claim) -> Waiter | None:
        """Who waits longest; None if nobody waits."""
        for future in list(claim.waiters):
            if not future.done():
                return claim.waiters[future]
            del claim.waiters[future]
        return None

    def answer(self, claim: Claim, result: Claimed) -> None:
        """All who wait get a result; the claim goes on."""
        for future in claim.waiters:
            if not future.done():
                future.set_result(result)
        claim.waiters.clear()

    def give(self, claim: Claim, result: Claimed) -> None:
        """Hands a grant to who waits longest; there must be somebody."""
        future, _ = claim.waiters.popitem(last=False)
        future.set_result(result)

    def hand_back(self, result: Claimed) -> None:
        """A caller left in the moment in which it got the claim: the next one gets it."""
        if result.grant is not None:
            claim = self._by_token.get(result.grant.token)
            if claim is not None:
                self._orphaned(claim)

    def outdate(self, space: Space, concerned: Callable[[str], bool]) -> None:
        """Takes the claims of a namespace's keys from fillers that began before an invalidation."""
        for claim in self.of_space(space):
            if concerned(claim.key):
                self._orphaned(claim)

    def outdate_tags(self, space: Space, tags: Iterable[str]) -> None:
        """Makes fills of open claims outdated that turn out to have one of the tags."""
        for claim in self.of_space(space):
            claim.void_tags.update(tags)

    def of_space(self, space: Space) -> list[Claim]:
        """The open claims of a namespace."""
        return list(self._by_space.get(space, {}).values())

    def all(self) -> list[Claim]:
        """All open claims."""
        return [claim for claims in self._by_space.values() for claim in claims.values()]

    def close(self) -> None:
        """Ends all claims; who waits is told to ask again."""
        error = MeshError(
            grpc.StatusCode.UNAVAILABLE, "STOPPING", "the service stops; ask another replica"
        )
        for claim in self.all():
            self.abandon(claim, error)

    def abandon(self, claim: Claim, error: MeshError) -> None:
        """Ends a claim: all who wait fail."""
        self.end(claim)
        for future in claim.waiters:
            if not future.done():
                future.set_exception(error)
        claim.waiters.clear()

    def revoke(self, claim: Claim) -> None:
        """Takes a claim from its holder, or ends its pause."""
        self._by_token.pop(claim.token, None)
        claim.token = ""
        claim.stand_in = None
        if claim.timer is not None:
            claim.timer.cancel()
            claim.timer = None

    def _expired(self, claim: Claim) -> None:
        claim.space.counts.fill_failures += 1
        self._orphaned(claim)

    def end(self, claim: Claim) -> None:
        """Ends a claim that nobody waits for."""
        self.revoke(claim)
        if claim.ended:
            return
        claim.ended = True
        space = claim.space
        claims = self._by_space[space]
        del claims[claim.key]
        if not claims:
            del self._by_space[space]
        self._by_tenant[space.tenant] -= 1
        if not self._by_tenant[space.tenant]:
            del self._by_tenant[space.tenant]
