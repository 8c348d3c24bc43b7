"""Counts in Redis: one round trip to each slot, whatever is asked at once."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import structlog

from agent360.mesh.ratelimit.counts import CountKey, counts_of
from agent360.mesh.ratelimit.decisions import Decision
from agent360.mesh.ratelimit.domain import Ask
from agent360.mesh.ratelimit.failures import reservation_unknown
from agent360.mesh.ratelimit.limits import Limit, LimitSet
from agent360.mesh.ratelimit.sharing import AWAY, Away, Decided, Run, SharedUsage
from agent360.mesh.ratelimit.stores.redis.batch import Batch, results_of
from agent360.mesh.ratelimit.stores.redis.keys import Count, Keys, spec_of
from agent360.mesh.ratelimit.stores.redis.scripts import script_source
from agent360.mesh.runtime.redis import Command, Redis

_SLICES: Final = 8
_MAX_LISTED: Final = 10_000
_ASKED_AT_ONCE: Final = 200
_COUNT_KEY_SIZE: Final = 4
"""Parts of a count's key before the values of facts."""

Counts = tuple[Count, ...]
T = TypeVar("T")


class _Part(NamedTuple):
    """The counts of one slot."""

    tag: str
    counts: Counts


class RedisStore:
    """Decides by the script, in whose run nothing comes between deciding and charging.

    On a single server a request's counts are decided by one run, whatever they count. In a cluster
    the counts of one tenant are in one slot; a limit that counts several tenants together is in a
    slot of its own. A request with counts in several slots is charged in all of them at once, and
    what was charged is given back if one denies: no more is admitted than by one run, but for as
    long as that takes others may be denied what is given back.
    """

    def __init__(
        self,
        redis: Redis,
        log: structlog.stdlib.BoundLogger,
        *,
        prefix: str,
        answer_s: float,
        lease_ttl_s: float,
        records_kept_s: float,
    ) -> None:
        """Prepares a store.

        Args:
            redis: a client, not started.
            log: of the service.
            prefix: of all keys.
            answer_s: how long replies are waited for.
            lease_ttl_s: longest time to live of a lease.
            records_kept_s: how long a reservation can be settled after its time to live.
        """
        self._redis = redis
        self._log = log
        self._keys = Keys(prefix)
        self._script = redis.script(script_source())
        self._answer_s = answer_s
        self._lease_ttl_us = round(lease_ttl_s * 1e6)
        self._records_kept_s = records_kept_s
        self._clustered = redis.topology.clustered
        self._complained: set[str] = set()
        self._running: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Returns when the servers answer."""
        await self._redis.start()

    async def close(self) -> None:
        """Closes all connections."""
        await self._redis.close()

    def counts(
        self, limits: LimitSet, tenant: str, name: str, facts: Mapping[str, str], **choice: bool
    ) -> Counts:
        """The counts that a request is charged to."""
        return tuple(
            self._keys.count(limit, key, tenant)
            for limit, key in counts_of(limits, tenant, name, facts, **choice)
        )

    # ---------------------------------------------------------------- checks

    def in_one_place(self, counts: Counts) -> bool:
        """See ``SharedStore.in_one_place``."""
        return not self._clustered or len({count.tag for count in counts}) == 1

    async def decide(self, runs: Sequence[Run]) -> list[tuple[Decided, Sequence[str]] | Away]:
        """See ``SharedStore.decide``."""
        return await self._wholly(self._decide(runs))

    async def _decide(self, runs: Sequence[Run]) -> list[tuple[Decided, Sequence[str]] | Away]:
        batches = _Batches(self._spec)
        asked = [
            [(part, *batches.add_decide(part, *run)) for part in self._parts(run.ask.plan)]
            for run in runs
        ]
        results = await self._run(batches)
        found: list[tuple[Decided, Sequence[str]] | Away] = []
        undo = _Batches(self._spec)
        for run, parts in zip(runs, asked, strict=True):
            rows = [(part, results[tag][at]) for part, tag, at in parts]
            if len(rows) == 1:
                part, row = rows[0]
                if row is AWAY:
                    found.append(AWAY)
                elif run.times > 1:
                    found.append(_expanded(part, row, run))
                else:
                    found.append(((_decision(part, row),), _denied(part, row)))
                continue
            decision = self._joined(rows, undo)
            denied = [] if decision is AWAY else [each for row in rows for each in _denied(*row)]
            found.append(AWAY if decision is AWAY else ((decision,), denied))
        if undo:
            await self._run(undo)
        return found

    def _joined(self, rows: Sequence[tuple[_Part, Any]], undo: _Batches) -> Any:
        """One decision of several parts; what was charged in vain is to be undone."""
        granted = min((0 if row is AWAY else row[1]) for _, row in rows)
        denied = any(row is AWAY or not row[0] for _, row in rows)
        for part, row in rows:
            if row is AWAY:
                continue
            excess = row[1] - (0 if denied else granted)
            if excess > 0:
                undo.add_give_back(part, excess, row[6], row[1])
        if any(row is AWAY for _, row in rows):
            return AWAY
        decisions = [_decision(part, row) for part, row in rows]
        if denied:
            return max(
                (each for each in decisions if not each.allowed),
                key=lambda each: (each.retry_after_s is None, each.retry_after_s or 0.0),
            )
        tightest = min(decisions, key=lambda each: each.remaining + each.granted)
        lower = next((each for each in decisions if each.granted == granted), tightest)
        return tightest._replace(granted=granted, retry_after_s=lower.retry_after_s)

    # ---------------------------------------------------------------- token budgets

    async def reserve(
        self, tenant: str, name: str, counts: Counts, tokens: int, ttl_s: float, request_id: str
    ) -> tuple[Decision, str] | Away:
        """Charges an estimate and remembers it; the id tells in which slots."""
        return await self._wholly(self._reserve(tenant, name, counts, tokens, ttl_s, request_id))

    async def _reserve(
        self, tenant: str, name: str, counts: Counts, tokens: int, ttl_s: float, request_id: str
    ) -> tuple[Decision, str] | Away:
        parts = self._parts(counts)
        reservation_id = _record_id(tenant, parts)
        kept_ms = round((ttl_s + self._records_kept_s) * 1e3)
        batches = _Batches(self._spec)
        places = []
        for part in parts:
            batch = batches.of(part.tag)
            which = batch.places(part.counts)
            record = batch.record(self._keys.record(part.tag, tenant, reservation_id))
            request: Any = 0
            if request_id:
                request = batch.record(self._keys.request(part.tag, tenant, request_id, name))
            places.append(batch.add("v", tokens, which, record, request, kept_ms, reservation_id))
        results = await self._run(batches)
        rows = [(part, results[part.tag][at]) for part, at in zip(parts, places, strict=True)]
        if all(row is not AWAY and row[0][0] for _, row in rows):
            decision = self._joined([(part, row[0]) for part, row in rows], _Batches(self._spec))
            return decision, rows[0][1][1]
        taken = [part for part, row in rows if row is not AWAY and row[0][0]]
        if taken:
            await self._settle_parts(tenant, [part.tag for part in taken], reservation_id, 0)
        if any(row is AWAY for _, row in rows):
            return AWAY
        _, row = next((part, row) for part, row in rows if not row[0][0])
        part = next(part for part, each in rows if each is row)
        return _decision(part, row[0]), ""

    async def settle(self, tenant: str, reservation_id: str, tokens: int) -> Any:
        """Replaces a reservation by what was used; (repeated, adjustment, remaining).

        Raises:
            MeshError: NOT_FOUND; there is no such reservation of the tenant.
        """
        rows = await self._settle_parts(
            tenant, _tags(tenant, reservation_id), reservation_id, tokens
        )
        if any(row is AWAY for row in rows):
            return AWAY
        if any(row[0] < 0 for row in rows):
            raise reservation_unknown(reservation_id)
        return bool(rows[0][0]), rows[0][1], min(row[2] for row in rows)

    async def _settle_parts(
        self, tenant: str, tags: Sequence[str], reservation_id: str, tokens: int
    ) -> Any:
        batches = _Batches(self._spec)
        for tag in tags:
            batch = batches.of(tag)
            batch.add("s", batch.record(self._keys.record(tag, tenant, reservation_id)), tokens)
        results = await self._run(batches)
        return [results[tag][0] for tag in tags]

    # ---------------------------------------------------------------- leases

    async def lease(self, tenant: str, counts: Counts, tokens: int) -> Any:
        """Charges tokens in advance; (decision, id, ttl in us), None where that is not possible."""
        parts = self._parts(counts)
        if len(parts) > 1:
            return None
        (part,) = parts
        lease_id = _record_id(tenant, parts)
        batches = _Batches(self._spec)
        batch = batches.of(part.tag)
        which = batch.places(part.counts)
        record = batch.record(self._keys.record(part.tag, tenant, lease_id))
        batch.add("l", tokens, which, record, self._lease_ttl_us, lease_id)
        row = (await self._run(batches))[part.tag][0]
        if row is AWAY:
            return AWAY
        return _decision(part, row[0]), lease_id if row[0][0] else "", row[1]

    async def return_lease(self, tenant: str, lease_id: str, unspent: int) -> int | Away:
        """Gives unspent tokens back, once; returns how many."""
        return await self._on_record("b", tenant, lease_id, unspent)  # type: ignore[no-any-return]

    # ---------------------------------------------------------------- slots

    async def acquire(
        self, tenant: str, counts: Counts, slots: int, ttl_s: float
    ) -> tuple[Decision, str] | Away:
        """Takes slots of all limits, or of none."""
        return await self._wholly(self._acquire(tenant, counts, slots, ttl_s))

    async def _acquire(
        self, tenant: str, counts: Counts, slots: int, ttl_s: float
    ) -> tuple[Decision, str] | Away:
        parts = self._parts(counts)
        slot_id = _record_id(tenant, parts)
        batches = _Batches(self._spec)
        for part in parts:
            batch = batches.of(part.tag)
            which = batch.places(part.counts)
            record = batch.record(self._keys.record(part.tag, tenant, slot_id))
            batch.add("a", slots, which, record, round(ttl_s * 1e6), slot_id)
        results = await self._run(batches)
        rows = [(part, results[part.tag][0]) for part in parts]
        if all(row is not AWAY and row[0] for _, row in rows):
            return self._joined(rows, _Batches(self._spec)), slot_id
        taken = [part.tag for part, row in rows if row is not AWAY and row[0]]
        if taken:
            await self._on_records("f", tenant, taken, slot_id)
        if any(row is AWAY for _, row in rows):
            return AWAY
        part, row = next((part, row) for part, row in rows if not row[0])
        return _decision(part, row), ""

    async def renew(self, tenant: str, slot_id: str, ttl_s: float | None) -> Any:
        """Keeps slots for longer; returns their time to live in us, below 0 if they came back."""
        ttl_us = -1 if ttl_s is None else round(ttl_s * 1e6)
        return await self._on_record("n", tenant, slot_id, ttl_us)

    async def release(self, tenant: str, slot_id: str) -> Any:
        """Gives slots back; 0 if they had come back."""
        return await self._on_record("f", tenant, slot_id)

    async def _on_record(self, kind: str, tenant: str, record_id: str, *rest: int) -> Any:
        rows = await self._on_records(kind, tenant, _tags(tenant, record_id), record_id, *rest)
        return AWAY if any(row is AWAY for row in rows) else min(rows)

    async def _on_records(
        self, kind: str, tenant: str, tags: Sequence[str], record_id: str, *rest: int
    ) -> list[Any]:
        batches = _Batches(self._spec)
        for tag in tags:
            batch = batches.of(tag)
            batch.add(kind, batch.record(self._keys.record(tag, tenant, record_id)), *rest)
        results = await self._run(batches)
        return [results[tag][0] for tag in tags]

    # ---------------------------------------------------------------- usage

    async def usage(
        self, limits: LimitSet, tenant: str, key: CountKey | None
    ) -> list[SharedUsage] | Away:
        """See ``SharedStore.usage``."""
        keys = await self._listed(tenant) if key is None else [key]
        if keys is AWAY:
            return AWAY
        counts = []
        for counted in keys:
            limit = limits.find(*counted[:3])
            if limit is not None and _counts_for(limit, counted):
                counts.append((self._keys.count(limit, counted, tenant), counted))
        found: list[SharedUsage] = []
        for first in range(0, len(counts), _ASKED_AT_ONCE):
            chunk = counts[first : first + _ASKED_AT_ONCE]
            batches = _Batches(self._spec)
            batch = batches.of(tenant)
            for count, _ in chunk:
                batch.add("u", batch.place(count))
            rows = (await self._run(batches))[tenant]
            if isinstance(rows, _AllAway):
                return AWAY
            for (count, counted), (room, reset_us) in zip(chunk, rows, strict=True):
                found.append(SharedUsage(count.limit, counted, room, reset_us))
        return found

    async def _listed(self, tenant: str) -> list[CountKey] | Away:
        index = self._keys.index(tenant)
        listing = Command(index.encode(), ("ZREVRANGE", index, 0, _MAX_LISTED - 1))
        (reply,) = await self._redis.run([listing], repeatable=True)
        if isinstance(reply, Exception):
            return self._away(reply)
        keys = [self._keys.counted(name.decode()) for name in reply]
        return [key for key in keys if len(key) >= _COUNT_KEY_SIZE]

    # ---------------------------------------------------------------- within

    def _parts(self, counts: Counts) -> list[_Part]:
        if not self._clustered:
            return [_Part(counts[0].tag, counts)]
        by_tag: dict[str, list[Count]] = {}
        for count in counts:
            by_tag.setdefault(count.tag, []).append(count)
        return [_Part(tag, tuple(part)) for tag, part in by_tag.items()]

    def _spec(self, limit: Limit) -> Sequence[Any]:
        """What the script is told of a limit."""
        if limit.calendar is None:
            return spec_of(limit, 0)
        return spec_of(limit, self._redis.now_us())

    async def _wholly(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits work that goes on if the caller is cancelled: it gives back what it must."""
        if not self._clustered:
            return await work
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def _run(self, batches: _Batches) -> Mapping[str, Sequence[Any]]:
        """The results by tag; AWAY for all operations of a tag whose server is away."""
        tags = list(batches.by_tag)
        commands = [batches.by_tag[tag].command(self._script) for tag in tags]
        task = asyncio.ensure_future(self._redis.run(commands))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        # In slices: a process that could not run for a while has not waited.
        for _ in range(_SLICES):
            done, _ = await asyncio.wait((task,), timeout=self._answer_s / _SLICES)
            if done:
                break
        else:
            return {tag: _AllAway(self._away(TimeoutError("no reply in time"))) for tag in tags}
        return {
            tag: _AllAway(self._away(reply)) if isinstance(reply, Exception) else results_of(reply)
            for tag, reply in zip(tags, task.result(), strict=True)
        }

    def _away(self, error: Exception) -> Away:
        text = f"{type(error).__name__}: {error}"
        kind = text[:60]
        if kind not in self._complained and len(self._complained) < 100:
            self._complained.add(kind)
            self._log.warning("the shared store does not serve", error=text)
        return AWAY


def _counts_for(limit: Limit, key: CountKey) -> bool:
    """Whether a count is of one tenant, and is not of a limit that has changed since."""
    whole = len(key) == _COUNT_KEY_SIZE + len(limit.per)
    return whole and limit.kind == key[3] and limit.tenants_apart


class _Batches:
    """Batches by tag."""

    def __init__(self, spec: Any) -> None:
        self._spec = spec
        self.by_tag: dict[str, Batch] = {}

    def __bool__(self) -> bool:
        return bool(self.by_tag)

    def of(self, tag: str) -> Batch:
        """The batch of a tag."""
        batch = self.by_tag.get(tag)
        if batch is None:
            batch = self.by_tag[tag] = Batch(self._spec)
        return batch

    def add_decide(self, part: _Part, ask: Ask, times: int) -> tuple[str, int]:
        """Adds decisions; returns where their result will be."""
        batch = self.of(part.tag)
        places = batch.places(part.counts)
        if times > 1:
            return part.tag, batch.add("m", ask.hits, places, times)
        return part.tag, batch.add("d", ask.hits, int(ask.allow_partial), places)

    def add_give_back(self, part: _Part, hits: int, marks: Sequence[int], charged: int) -> None:
        """Adds the undoing of a charge."""
        batch = self.of(part.tag)
        batch.add("g", hits, batch.places(part.counts), list(marks), charged)


class _AllAway(Sequence[Any]):
    """The results of operations whose server is away, however many."""

    def __init__(self, away: Away) -> None:
        self._away = away

    def __len__(self) -> int:
        return 0

    def __getitem__(self, at: Any) -> Any:
        return self._away


def _decision(part: _Part, row: Sequence[Any]) -> Decision:
    allowed, granted, remaining, tightest, reset_us, retry_us = row[:6]
    limit = part.counts[tightest - 1].limit
    return Decision(
        bool(allowed),
        granted,
        remaining,
        limit.size,
        reset_us / 1e6,
        None if retry_us < 0 else retry_us / 1e6,
        limit.limit_id,
    )


def _expanded(part: _Part, row: Sequence[Any], run: Run) -> tuple[Decided, Sequence[str]]:
    """The decisions on a run, of which the first so many were allowed."""
    fit, room, tightest, reset_us, retry_us, denier, denier_reset_us = row
    hits, limit = run.ask.hits, part.counts[tightest - 1].limit
    size, limit_id, reset_s = limit.size, limit.limit_id, reset_us / 1e6
    decisions = [
        Decision(True, hits, room - done * hits, size, reset_s, None, limit_id)
        for done in range(1, fit + 1)
    ]
    missing = run.times - fit
    if not missing:
        return decisions, ()
    wait_s = None if retry_us < 0 else retry_us / 1e6
    left = max(0, room - fit * hits)
    limit = part.counts[denier - 1].limit
    denial = Decision(False, 0, left, limit.size, denier_reset_us / 1e6, wait_s, limit.limit_id)
    return [*decisions, *[denial] * missing], [limit.limit_id] * missing


def _denied(part: _Part, row: Sequence[Any]) -> Sequence[str]:
    return [part.counts[at - 1].limit.limit_id for at in row[7]] if row[7] else ()


def _record_id(tenant: str, parts: Sequence[_Part]) -> str:
    """A name that says in which slots the record is."""
    tags = [part.tag for part in parts]
    head = "t" if tenant in tags else "g"
    return head + secrets.token_urlsafe(12) + "".join(tag for tag in tags if tag != tenant)


def _tags(tenant: str, record_id: str) -> list[str]:
    """The tags in a record's name."""
    head, *others = record_id.split("~")
    own = [tenant] if head.startswith("t") or not others else []
    return [*own, *(f"~{limit_id[:128]}" for limit_id in others[:16])]
