"""Counts in Redis: one round trip to each slot, whatever is asked at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Final, TypeVar

import structlog

from agent360.mesh.ratelimit.counts import counts_of
from agent360.mesh.ratelimit.decisions import Decision
from agent360.mesh.ratelimit.failures import reservation_unknown
from agent360.mesh.ratelimit.limits import Limit, LimitSet
from agent360.mesh.ratelimit.patience import in_slices
from agent360.mesh.ratelimit.record_ids import Kind, require_kind
from agent360.mesh.ratelimit.sharing import AWAY, Away, Decided, OnAdjusted, Run
from agent360.mesh.ratelimit.stores.redis.answers import (
    AllAway,
    decision_of,
    denied_by,
    expanded,
    joined,
    joint_decision,
)
from agent360.mesh.ratelimit.stores.redis.batch import Batches, results_of
from agent360.mesh.ratelimit.stores.redis.keys import Keys, counted_in, spec_of, version_of
from agent360.mesh.ratelimit.stores.redis.places import (
    Counts,
    Part,
    parts_of,
    record_id,
    tags_of,
)
from agent360.mesh.ratelimit.stores.redis.scripts import script_source
from agent360.mesh.ratelimit.stores.redis.timeline import Timeline
from agent360.mesh.runtime.redis import Redis

_SHARED_AT: Final = 3
"""Where a row tells of counts of several tenants, if there are any."""
_STALE: Final = -2
"""In place of a result: the script has to be told of the limits anew."""

T = TypeVar("T")


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
        timeline: Timeline | None = None,
    ) -> None:
        """Prepares a store.

        Args:
            redis: a client, not started.
            log: of the service.
            prefix: of all keys.
            answer_s: how long replies are waited for.
            lease_ttl_s: longest time to live of a lease.
            records_kept_s: how long a reservation can be settled after its time to live.
            timeline: what is known of the time; None: nothing yet.
        """
        self._redis = redis
        self._log = log
        self._keys = Keys(prefix)
        self._script = redis.script(script_source())
        self._answer_s = answer_s
        self._lease_ttl_us = round(lease_ttl_s * 1e6)
        self._records_kept_s = records_kept_s
        self._clustered = redis.topology.clustered
        self._timeline = timeline or Timeline()
        self._limits: LimitSet | None = None
        self._version = 0
        self._complained: set[str] = set()
        self._running: set[asyncio.Task[Any]] = set()
        self.on_adjusted: OnAdjusted = lambda *_: None
        """See ``SharedStore.on_adjusted``."""

    async def start(self) -> None:
        """Returns when the servers answer."""
        await self._redis.start()

    async def close(self) -> None:
        """Closes all connections."""
        await self._redis.close()

    def counts(
        self, limits: LimitSet, tenant: str, name: str, facts: Mapping[str, str], **choice: Any
    ) -> Counts:
        """The counts that a request is charged to."""
        self._notice(limits)
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
        batches = Batches(self._spec)
        asked = [
            [(part, *batches.add_decide(part, *run)) for part in self._parts(run.ask.plan)]
            for run in runs
        ]
        results = await self._run(batches)
        found: list[tuple[Decided, Sequence[str]] | Away] = []
        undo = Batches(self._spec)
        for run, parts in zip(runs, asked, strict=True):
            rows = [(part, results[tag][at]) for part, tag, at in parts]
            if len(rows) == 1:
                part, row = rows[0]
                if row is AWAY:
                    found.append(AWAY)
                elif run.times > 1:
                    found.append(expanded(part, row, run))
                else:
                    found.append(((decision_of(part, row),), denied_by(part, row)))
                continue
            decision = joined(rows, undo.add_give_back)
            if decision is AWAY:
                found.append(AWAY)
                continue
            found.append(((decision,), [each for row in rows for each in denied_by(*row)]))
        if undo:
            await self._run(undo)
        return found

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
        request = (name, request_id) if request_id else None
        reservation_id = record_id(Kind.RESERVATION, tenant, parts, request)
        kept_ms = round((ttl_s + self._records_kept_s) * 1e3)
        batches = Batches(self._spec)
        for part in parts:
            batch = batches.of(part.tag)
            which = batch.places(part.counts)
            record = batch.record(self._keys.record(part.tag, tenant, reservation_id))
            batch.add("v", tokens, which, record, kept_ms, int(bool(request_id)), len(parts))
        results = await self._run(batches)
        rows = [(part, results[part.tag][0]) for part in parts]
        away = any(row is AWAY for _, row in rows)
        if not away and all(row[0] for _, row in rows):
            return joint_decision(rows), reservation_id
        taken = [part.tag for part, row in rows if row is not AWAY and row[0]]
        if taken:
            await self._on_records("x", tenant, taken, reservation_id)
        return AWAY if away else (joint_decision(rows), "")

    async def settle(
        self, limits: LimitSet, tenant: str, reservation_id: str, tokens: int
    ) -> tuple[bool, int, int] | Away:
        """See ``SharedStore.settle``.

        Raises:
            MeshError: NOT_FOUND; there is no such reservation of the tenant. FAILED_PRECONDITION;
                the id is of something else.
        """
        require_kind(reservation_id, Kind.RESERVATION)
        rows = await self._change("s", limits, tenant, reservation_id, tokens)
        if any(row is AWAY for row in rows):
            return AWAY
        if any(row[0] < 0 for row in rows):
            raise reservation_unknown(reservation_id)
        return bool(rows[0][0]), rows[0][1], min(row[2] for row in rows)

    async def _change(
        self, kind: str, limits: LimitSet, tenant: str, record: str, quantity: int
    ) -> list[Any]:
        """Settles or returns; a slot whose limits may have changed is told of them, asked again."""
        self._notice(limits)
        tags = tags_of(tenant, record)
        rows = await self._on_records(kind, tenant, tags, record, quantity)
        for at, (tag, row) in enumerate(zip(tags, rows, strict=True)):
            if isinstance(row, list) and row[0] == _STALE:
                told = self._told(limits, row[1])
                (rows[at],) = await self._on_records(kind, tenant, [tag], record, quantity, told)
        for row in rows:
            if isinstance(row, list) and len(row) > _SHARED_AT:
                for key, at_us in row[_SHARED_AT]:
                    self.on_adjusted(limits, tenant, key, at_us, row[1])
        return rows

    def _told(self, limits: LimitSet, keys: Sequence[str]) -> dict[str, Sequence[Any]]:
        """What the script is told of the counts whose limits still count so, by key."""
        told = {}
        for key in keys:
            counted = counted_in(key)
            limit = limits.find(*counted[:3])
            if limit is not None and limit.kind == counted[3]:
                told[key] = self._spec(limit)
        return told

    # ---------------------------------------------------------------- leases

    async def lease(self, tenant: str, counts: Counts, tokens: int) -> Any:
        """Charges tokens in advance; (decision, id, ttl in us), None where that is not possible."""
        parts = self._parts(counts)
        if len(parts) > 1:
            return None
        (part,) = parts
        lease_id = record_id(Kind.LEASE, tenant, parts)
        batches = Batches(self._spec)
        batch = batches.of(part.tag)
        which = batch.places(part.counts)
        record = batch.record(self._keys.record(part.tag, tenant, lease_id))
        batch.add("l", tokens, which, record, self._lease_ttl_us)
        row = (await self._run(batches))[part.tag][0]
        if row is AWAY:
            return AWAY
        return decision_of(part, row[0]), lease_id if row[0][0] else "", row[1]

    async def return_lease(
        self, limits: LimitSet, tenant: str, lease_id: str, unspent: int
    ) -> int | Away:
        """Gives unspent tokens back, once; returns how many."""
        require_kind(lease_id, Kind.LEASE)
        rows = await self._change("b", limits, tenant, lease_id, unspent)
        return _least([row[0] if isinstance(row, list) else row for row in rows])

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
        slot_id = record_id(Kind.SLOTS, tenant, parts)
        batches = Batches(self._spec)
        for part in parts:
            batch = batches.of(part.tag)
            which = batch.places(part.counts)
            record = batch.record(self._keys.record(part.tag, tenant, slot_id))
            batch.add("a", slots, which, record, round(ttl_s * 1e6), slot_id)
        results = await self._run(batches)
        rows = [(part, results[part.tag][0]) for part in parts]
        away = any(row is AWAY for _, row in rows)
        if not away and all(row[0] for _, row in rows):
            return joint_decision(rows), slot_id
        taken = [part.tag for part, row in rows if row is not AWAY and row[0]]
        if taken:
            await self._on_records("f", tenant, taken, slot_id)
        return AWAY if away else (joint_decision(rows), "")

    async def renew(self, tenant: str, slot_id: str, ttl_s: float | None) -> int | Away:
        """Keeps slots for longer; returns their time to live in us, below 0 if they came back."""
        require_kind(slot_id, Kind.SLOTS)
        ttl_us = -1 if ttl_s is None else round(ttl_s * 1e6)
        tags = tags_of(tenant, slot_id)
        return _least(await self._on_records("n", tenant, tags, slot_id, ttl_us))

    async def release(self, tenant: str, slot_id: str) -> int | Away:
        """Gives slots back; 0 if they had come back."""
        require_kind(slot_id, Kind.SLOTS)
        return _least(await self._on_records("f", tenant, tags_of(tenant, slot_id), slot_id))

    async def _on_records(
        self, kind: str, tenant: str, tags: Sequence[str], record: str, *rest: Any
    ) -> list[Any]:
        batches = Batches(self._spec)
        for tag in tags:
            batch = batches.of(tag)
            batch.add(kind, batch.record(self._keys.record(tag, tenant, record)), *rest)
        results = await self._run(batches)
        return [results[tag][0] for tag in tags]

    # ---------------------------------------------------------------- within

    def _parts(self, counts: Counts) -> list[Part]:
        return parts_of(counts, clustered=self._clustered)

    def _notice(self, limits: LimitSet) -> None:
        if limits is not self._limits:
            self._limits = limits
            self._version = version_of(limits)

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

    async def _run(self, batches: Batches) -> Mapping[str, Sequence[Any]]:
        """The results by tag; AWAY for all operations of a tag whose server is away."""
        tags = list(batches.by_tag)
        commands = [
            batches.by_tag[tag].command(self._script, self._version, self._timeline.now_us())
            for tag in tags
        ]
        replies = await in_slices(self._redis.run(commands), self._answer_s)
        if replies is AWAY:
            self._complain(TimeoutError("no reply in time"))
            return dict.fromkeys(tags, AllAway())
        return dict(zip(tags, map(self._results, replies), strict=True))

    def _results(self, reply: Any) -> Sequence[Any]:
        if isinstance(reply, Exception):
            self._complain(reply)
            return AllAway()
        results, now_us = results_of(reply)
        self._timeline.note(now_us)
        return results

    def _complain(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        kind = text[:60]
        if kind not in self._complained and len(self._complained) < 100:
            self._complained.add(kind)
            self._log.warning("the shared store does not serve", error=text)


def _least(rows: Sequence[int | Away]) -> int | Away:
    found = [row for row in rows if row is not AWAY]
    return min(found) if len(found) == len(rows) else AWAY
