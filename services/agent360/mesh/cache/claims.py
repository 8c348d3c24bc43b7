"""Single-flight: of all callers that miss a key, one fills it and the others wait."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
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


class Claim:
    """A key that is being filled.

    Invariant: while ``token`` is not empty the claim is open, only its filler may fill the key;
    each future in ``waiters`` belongs to a caller that waits for it.
    """

    __slots__ = ("began", "key", "space", "timer", "token", "void_tags", "waiters")

    def __init__(self, space: Space, key: str) -> None:
        self.space = space
        self.key = key
        self.token = ""
        self.began = 0.0
        self.timer: Timer | None = None
        self.void_tags: set[str] = set()
        """Tags that were invalidated since the claim: an entry with one of them is outdated."""
        self.waiters: OrderedDict[asyncio.Future[Entry | Grant], float] = OrderedDict()
        """Those who wait, in order, with the fill timeouts that they asked for."""


class Claims:
    """All claims of this replica. A claim belongs to no call: it outlives its filler's."""

    def __init__(self, clock: Clock, new_token: Callable[[], str], max_open: int) -> None:
        """Makes an empty table.

        Args:
            clock: says when claims expire.
            new_token: makes a token that cannot be guessed.
            max_open: how many claims there may be.
        """
        self._clock = clock
        self._new_token = new_token
        self._max_open = max_open
        self._by_key: dict[tuple[Space, str], Claim] = {}
        self._by_token: dict[str, Claim] = {}

    def __len__(self) -> int:
        """How many claims are open."""
        return len(self._by_key)

    def find(self, space: Space, key: str) -> Claim | None:
        """The open claim of a key."""
        return self._by_key.get((space, key))

    def redeem(self, token: str, tenant: str) -> Claim | None:
        """The open claim that a token of the tenant names."""
        claim = self._by_token.get(token)
        return claim if claim is not None and claim.space.tenant == tenant else None

    def open(self, space: Space, key: str, timeout_s: float) -> Grant:
        """Claims a key that nobody claims.

        Raises:
            MeshError: too many claims are open.
        """
        if len(self._by_key) >= self._max_open:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "CLAIMS_EXHAUSTED",
                f"{len(self._by_key):,} keys are being filled, which is the most there may be",
            )
        claim = Claim(space, key)
        self._by_key[space, key] = claim
        return self._grant(claim, timeout_s)

    async def wait(self, claim: Claim, timeout_s: float) -> Entry | Grant:
        """Waits for the fill.

        Args:
            claim: an open claim.
            timeout_s: how long the caller's own fill may take, should the claim fall to it.

        Returns:
            The entry that was filled in, or the right to fill it.
        """
        future: asyncio.Future[Entry | Grant] = asyncio.get_running_loop().create_future()
        claim.waiters[future] = timeout_s
        try:
            return await future
        except asyncio.CancelledError:
            claim.waiters.pop(future, None)
            if not future.cancelled():
                self._hand_back(future.result())
            raise

    def settle(self, claim: Claim, entry: Entry) -> None:
        """Ends a claim: all who wait get the entry."""
        self._close(claim)
        for future in claim.waiters:
            if not future.done():
                future.set_result(entry)
        claim.waiters.clear()

    def pass_on(self, claim: Claim) -> None:
        """Takes the claim from its filler: the next caller that waits gets it, if there is one."""
        self._revoke(claim)
        while claim.waiters:
            future, timeout_s = claim.waiters.popitem(last=False)
            if not future.done():
                future.set_result(self._grant(claim, timeout_s))
                return
        self._close(claim)

    def outdate(self, space: Space, concerned: Callable[[str], bool]) -> None:
        """Takes the claims of a namespace's keys from fillers that began before an invalidation."""
        if not self._by_key:
            return
        for claim in list(self._by_key.values()):
            if claim.space is space and concerned(claim.key):
                self.pass_on(claim)

    def outdate_tags(self, space: Space, tags: Iterable[str]) -> None:
        """Makes fills of open claims outdated that turn out to have one of the tags."""
        for claim in self._by_key.values():
            if claim.space is space:
                claim.void_tags.update(tags)

    def close(self) -> None:
        """Ends all claims; who waits is told to ask again."""
        error = MeshError(
            grpc.StatusCode.UNAVAILABLE, "STOPPING", "the service stops; ask another replica"
        )
        for claim in list(self._by_key.values()):
            self._close(claim)
            for future in claim.waiters:
                if not future.done():
                    future.set_exception(error)

    def _grant(self, claim: Claim, timeout_s: float) -> Grant:
        token = self._new_token()
        now = self._clock.now()
        claim.token = token
        claim.began = now
        claim.void_tags.clear()
        claim.timer = self._clock.call_at(now + timeout_s, lambda: self.pass_on(claim))
        self._by_token[token] = claim
        return Grant(token, timeout_s)

    def _hand_back(self, result: Entry | Grant) -> None:
        """The caller left in the moment in which it got the claim: the next one gets it."""
        if isinstance(result, Grant):
            claim = self._by_token.get(result.token)
            if claim is not None:
                self.pass_on(claim)

    def _revoke(self, claim: Claim) -> None:
        self._by_token.pop(claim.token, None)
        claim.token = ""
        if claim.timer is not None:
            claim.timer.cancel()
            claim.timer = None

    def _close(self, claim: Claim) -> None:
        self._revoke(claim)
        self._by_key.pop((claim.space, claim.key), None)
