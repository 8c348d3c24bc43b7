"""Single-flight among replicas: the shared store decides who fills a key that is claimed here."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from agent360.client.errors import MeshError
from agent360.mesh.cache.claims import Claim, Claimed, Claims
from agent360.mesh.cache.entry import Entry, Space
from agent360.mesh.cache.ports import Clock
from agent360.mesh.cache.sharing import Away, SharedAsk, SharedClaim, SharedEntry, SharedStore

_DEAF_LOOK_S: Final = 0.05
"""How often another's claim is looked at while changes go unheard."""
_LOOK_AFTER_S: Final = 0.01
"""How long after another's claim should have ended it is looked at."""


class Replica(Protocol):
    """What this needs of the service around it."""

    def hold(self, space: Space, key: str, found: SharedEntry) -> Entry:
        """Keeps a copy."""

    def in_memory(self, space: Space, key: str) -> Entry | None:
        """The copy that is here."""

    def believes(self, space: Space, key: str, found: SharedEntry) -> bool:
        """Whether an entry of the shared store may be served."""

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs work that belongs to no call."""

    def note_miss(self, space: Space, key: str, now: float) -> None:
        """Counts a lookup that found nothing."""


class Sealed(NamedTuple):
    """What a fill token says: it may be redeemed at any replica."""

    nonce: str
    namespace: str
    key: str


def seal_token(nonce: str, namespace: str, key: str) -> str:
    """A fill token."""
    return base64.urlsafe_b64encode(msgspec.msgpack.encode((nonce, namespace, key))).decode()


def open_token(token: str) -> Sealed | None:
    """What a token says; None if it was given by one replica alone, or is garbled."""
    try:
        packed = base64.urlsafe_b64decode(token)
        return Sealed(*msgspec.msgpack.decode(packed, type=tuple[str, str, str]))
    except (binascii.Error, ValueError, msgspec.DecodeError):
        return None


def nonce_of(token: str) -> str:
    """The part of a token that cannot be guessed.

    Raises:
        ValueError: it is not a token of this kind.
    """
    sealed = open_token(token)
    if sealed is None:
        raise ValueError("the token was given by one replica alone")
    return sealed.nonce


class Asking:
    """Asks the shared store about claims that were begun here, all that wait at once.

    A claim without a token is one that the store is asked about (``asking``), or that another
    replica holds: then something is heard when it ends, or its timer looks.
    """

    def __init__(
        self,
        shared: SharedStore,
        claims: Claims,
        clock: Clock,
        new_nonce: Callable[[], str],
        replica: Replica,
        *,
        away: Callable[[Claim], MeshError | None],
    ) -> None:
        """Makes it.

        Args:
            shared: decides.
            claims: of this replica.
            clock: of this replica.
            new_nonce: makes a text that cannot be guessed.
            replica: the service around it.
            away: what a claim's callers fail with while the store is away; None: they fill alone.
        """
        self._shared = shared
        self._claims = claims
        self._clock = clock
        self._new_nonce = new_nonce
        self._replica = replica
        self._away = away
        self._waiting: list[Claim] = []

    def ask(self, claim: Claim) -> None:
        """Asks who may fill, together with whatever else is asked in this turn of the loop."""
        if claim.asking:
            return
        claim.asking, claim.released, claim.doubted = True, False, False
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._send)
        self._waiting.append(claim)

    @contextmanager
    def deciding(self, claim: Claim | None) -> Iterator[None]:
        """While a fill or a release is on its way, what is heard of its key is not acted upon."""
        if claim is not None:
            claim.asking = True
        try:
            yield
        finally:
            if claim is not None:
                claim.asking = False

    # ---------------------------------------------------------------- what is heard

    def heard(self, claim: Claim, version: int) -> None:
        """The key was written or removed: the filler, here or elsewhere, is out."""
        claim.floor = max(claim.floor, version)
        if not claim.asking and version > claim.decided_at:
            self.lost(claim)

    def released(self, claim: Claim, nonce: str) -> None:
        """A filler gave up, or may have: the one whose nonce it is, here or elsewhere."""
        sealed = open_token(claim.token) if claim.token else None
        if claim.asking:
            claim.released = True
        elif (not claim.token and claim.stand_in is None) or (
            sealed is not None and sealed.nonce == nonce
        ):
            self.lost(claim)

    def restart(self, claim: Claim) -> None:
        """Changes were not heard for a while, or the store was away."""
        if not claim.asking and (not claim.token or open_token(claim.token) is None):
            self.lost(claim)

    def filled(self, claim: Claim, entry: Entry) -> None:
        """The key was written here: all who wait get that."""
        self._claims.settle(claim, Claimed(entry))

    def lost(self, claim: Claim) -> None:
        """Nobody here fills any more: it is asked again if anybody waits."""
        self._claims.revoke(claim)
        if self._claims.first_waiter(claim) is None:
            self._claims.end(claim)
        else:
            self.ask(claim)

    def orphaned(self, claim: Claim) -> None:
        """The filler is out of time or has left: the store is told, so that others may fill."""
        sealed = open_token(claim.token) if claim.token else None
        if sealed is not None:
            self._replica.spawn(self._give_back(claim.space, claim.key, sealed.nonce))
        self.lost(claim)

    # ---------------------------------------------------------------- asking

    def _send(self) -> None:
        claims, self._waiting = self._waiting, []
        self._replica.spawn(self._ask_all(claims))

    async def _ask_all(self, claims: Sequence[Claim]) -> None:
        asks = [self._asked(claim) for claim in claims]
        answers = await self._shared.claim(asks)
        for claim, ask, answer in zip(claims, asks, answers, strict=True):
            claim.asking = False
            if not claim.ended:
                self._decide(claim, ask, answer)
                continue
            self._count_misses(claim)
            if isinstance(answer, SharedClaim) and answer.granted:
                self._replica.spawn(self._give_back(claim.space, claim.key, ask.nonce))

    def _asked(self, claim: Claim) -> SharedAsk:
        waiter = self._claims.first_waiter(claim)
        if waiter is not None:
            claim.timeout_s = waiter.timeout_s
        refreshed = self._to_refresh(claim)
        return SharedAsk(
            claim.space,
            claim.key,
            self._new_nonce(),
            claim.timeout_s,
            0 if refreshed is None else refreshed.version,
        )

    def _decide(self, claim: Claim, ask: SharedAsk, answer: SharedClaim | Away) -> None:
        if isinstance(answer, Away):
            self._decide_alone(claim, degraded=True)
            return
        entry = answer.entry
        believed = entry is not None and self._replica.believes(claim.space, claim.key, entry)
        if not answer.granted and not answer.remaining_s:
            if entry is None or entry.version < claim.floor or claim.doubted:
                self.ask(claim)
            elif not believed:
                self._decide_alone(claim, degraded=False)
            else:
                self._settle_fresh(claim, entry)
            return
        claim.decided, claim.decided_at = True, answer.decided_at
        self._count_misses(claim)
        if answer.granted and claim.floor > answer.decided_at:
            self._replica.spawn(self._ask_anew(claim, ask.nonce))
            return
        if claim.floor > answer.decided_at or (claim.released and not answer.granted):
            self.ask(claim)
            return
        held = None
        if believed and entry is not None and not claim.doubted:
            held = self._replica.hold(claim.space, claim.key, entry)
        if answer.granted:
            self._grant(claim, ask, held)
        else:
            self._wait_for_another(claim, answer, held)

    def _settle_fresh(self, claim: Claim, entry: SharedEntry) -> None:
        claim.space.counts.shared_hits += claim.uncounted
        claim.uncounted = 0
        held = self._replica.hold(claim.space, claim.key, entry)
        self._claims.settle(claim, Claimed(held))

    def _grant(self, claim: Claim, ask: SharedAsk, held: Entry | None) -> None:
        waiter = self._claims.first_waiter(claim)
        if waiter is None:
            self._replica.spawn(self._give_back(claim.space, claim.key, ask.nonce))
            self._claims.end(claim)
            return
        token = seal_token(ask.nonce, claim.space.name, claim.key)
        grant = self._claims.grant(claim, ask.timeout_s, token)
        stale, fresh = self._stale(held), self._to_refresh(claim)
        entry = fresh or (stale if waiter.allow_stale else None)
        self._claims.give(claim, Claimed(entry, grant))
        self._answer_with_what_is_there(claim, fresh, stale)

    def _wait_for_another(self, claim: Claim, answer: SharedClaim, held: Entry | None) -> None:
        if answer.failed and held is not None:
            self._claims.fail(claim, held, answer.remaining_s)
            return
        self._answer_with_what_is_there(claim, self._to_refresh(claim), self._stale(held))
        delay_s = answer.remaining_s + _LOOK_AFTER_S
        if not self._shared.listening:
            delay_s = min(delay_s, _DEAF_LOOK_S)
        self._claims.revoke(claim)
        claim.timer = self._clock.call_at(self._clock.now() + delay_s, lambda: self.lost(claim))

    def _decide_alone(self, claim: Claim, *, degraded: bool) -> None:
        """The store cannot decide: the first who waits fills for this replica."""
        if degraded:
            claim.space.counts.degraded += claim.uncounted
        self._count_misses(claim)
        error = self._away(claim) if degraded else None
        waiter = self._claims.first_waiter(claim)
        if error is not None:
            self._claims.abandon(claim, error)
        elif waiter is None:
            self._claims.end(claim)
        else:
            copy = self._replica.in_memory(claim.space, claim.key) if degraded else None
            stale = self._stale(copy) if waiter.allow_stale else None
            grant = self._claims.grant(claim, waiter.timeout_s)
            self._claims.give(claim, Claimed(stale, grant, degraded=degraded))

    def _answer_with_what_is_there(
        self, claim: Claim, fresh: Entry | None, stale: Entry | None
    ) -> None:
        if fresh is not None:
            self._claims.answer(claim, Claimed(fresh))
        elif stale is not None:
            self._claims.settle_stale(claim, Claimed(stale))

    def _to_refresh(self, claim: Claim) -> Entry | None:
        """The entry that an eager claim is to refresh, as long as it is fresh."""
        if not claim.eager:
            return None
        entry = self._replica.in_memory(claim.space, claim.key)
        fresh = entry is not None and self._clock.now() < entry.fresh_until
        return entry if fresh else None

    def _stale(self, entry: Entry | None) -> Entry | None:
        """An entry, if it may be handed to who takes a stale one."""
        if entry is None or self._clock.now() >= entry.stale_until:
            return None
        return entry

    def _count_misses(self, claim: Claim) -> None:
        now = self._clock.now()
        for _ in range(claim.uncounted):
            self._replica.note_miss(claim.space, claim.key, now)
        claim.uncounted = 0

    async def _ask_anew(self, claim: Claim, nonce: str) -> None:
        """What was granted was taken away again by a change: it is given back and asked for."""
        with self.deciding(claim):
            await self._give_back(claim.space, claim.key, nonce)
        if not claim.ended:
            self.lost(claim)

    async def _give_back(self, space: Space, key: str, nonce: str) -> None:
        await self._shared.release(space, key, nonce, 0.0)
