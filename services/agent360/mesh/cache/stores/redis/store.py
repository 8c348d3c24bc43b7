"""The port ``SharedStore`` on Redis: one round trip for each server, whatever is asked at once."""

from __future__ import annotations

import asyncio
import math
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, Final

import msgspec
import structlog

from agent360.mesh.cache.changes import Condition
from agent360.mesh.cache.entry import Payload, Space
from agent360.mesh.cache.ports import Clock
from agent360.mesh.cache.sharing import (
    AWAY,
    UNSURE,
    Away,
    Listener,
    SharedAsk,
    SharedClaim,
    SharedEntry,
    SharedRemoved,
    SharedWrite,
    SharedWritten,
)
from agent360.mesh.cache.stores.redis.backplane import Backplane
from agent360.mesh.cache.stores.redis.codec import Codec
from agent360.mesh.cache.stores.redis.scripts import Scripts
from agent360.mesh.cache.stores.redis.shards import Shard, Shards
from agent360.mesh.runtime.redis import Command, Redis, RedisAwayError

_WRITES_AT_ONCE: Final = 128
_KEYS_AT_ONCE: Final = 1_000
_ROUNDS: Final = 4
_HOT_FOR_MS: Final = 7 * 86_400_000

_CONDITIONS: Final = {Condition.ALWAYS: 0, Condition.IF_ABSENT: 1, Condition.IF_VERSION: 2}


class RedisStore:
    """See ``SharedStore``.

    Reads are plain MGETs whose first key is the version of the namespace: a replica that has not
    heard of a new version learns of it with the answer and asks again. Everything else is a script,
    so that it is decided, done and published in one step of the server.
    """

    def __init__(
        self,
        redis: Redis,
        clock: Clock,
        codec: Codec,
        log: structlog.stdlib.BoundLogger,
        *,
        prefix: str,
        database: int,
        shards: int,
        max_claim_s: float,
    ) -> None:
        """Makes a store; ``start`` connects it.

        Args:
            redis: the servers.
            clock: of this replica.
            codec: makes bytes of entries.
            log: of the service.
            prefix: of all keys, and of the channel.
            database: the number of the servers' database; channels are the same for all of them.
            shards: how many parts a namespace is divided into.
            max_claim_s: how long a claim may last at most.
        """
        self._redis = redis
        self._clock = clock
        self._codec = codec
        self._log = log
        self._shards = Shards(prefix, shards)
        self._scripts = Scripts(redis)
        self._channel = f"{prefix}:changes:{database}".encode()
        self._max_claim_ms = math.ceil(max_claim_s * 1e3)
        patience_s = redis.settings.timeout_s + redis.settings.wait_timeout_s
        self._window_us = math.ceil(patience_s * 1e6)
        self._backplane: Backplane | None = None
        self._reclaiming: set[asyncio.Task[None]] = set()
        self._complained: set[str] = set()

    async def start(self, listener: Listener) -> None:
        """Connects; returns when the servers answer and changes are heard."""
        self._redis.on_change(lambda available: self._reaches(listener, available))
        await self._redis.start()
        self._backplane = Backplane(self._redis, self._channel, self._shards, listener)
        await self._backplane.start()

    def _reaches(self, listener: Listener, available: bool) -> None:
        if available and self._backplane is not None:
            self._backplane.forget()
        listener.reaches(available)

    async def close(self) -> None:
        """Disconnects."""
        for task in self._reclaiming:
            task.cancel()
        await asyncio.gather(*self._reclaiming, return_exceptions=True)
        if self._backplane is not None:
            await self._backplane.close()
        await self._redis.close()

    @property
    def available(self) -> bool:
        """See ``SharedStore.available``."""
        return self._redis.available

    @property
    def listening(self) -> bool:
        """See ``SharedStore.listening``."""
        return self._backplane is not None and self._backplane.up

    @property
    def newest_version(self) -> int:
        """See ``SharedStore.newest_version``."""
        heard = 0 if self._backplane is None else self._backplane.newest
        return max(self._redis.now_us(), heard)

    def version_after(self, answer: Away) -> int:
        """See ``SharedStore.version_after``."""
        return self.newest_version + (self._window_us if answer is UNSURE else 0)

    def version_of(self, space: Space) -> int:
        """See ``SharedStore.version_of``."""
        shard = self._shards.of(space.tenant, space.name)[0]
        return int(shard.version or 0)

    # ---------------------------------------------------------------- reading

    async def read(
        self, wanted: Sequence[tuple[Space, str]]
    ) -> Sequence[SharedEntry | Away | None]:
        """See ``SharedStore.read``."""
        found: list[SharedEntry | Away | None] = [AWAY] * len(wanted)
        left = self._by_shard(wanted)
        for _ in range(_ROUNDS):
            await self._learn_versions(left)
            left = await self._read(wanted, left, found)
            if not left:
                break
        return found

    async def _read(
        self,
        wanted: Sequence[tuple[Space, str]],
        by_shard: Mapping[Shard, Sequence[int]],
        found: list[SharedEntry | Away | None],
    ) -> dict[Shard, list[int]]:
        """Reads keys by their places; returns those of namespaces that have moved meanwhile."""
        commands, parts = [], []
        for shard, places in by_shard.items():
            version = shard.version
            if version is None:
                for place in places:
                    found[place] = None if shard.asked else AWAY
                continue
            for part in _parts(places, _KEYS_AT_ONCE):
                keys = [shard.entry_key(wanted[place][1], version) for place in part]
                commands.append(Command(shard.meta, ("MGET", shard.meta, *keys)))
                parts.append((shard, version, part))
        again: dict[Shard, list[int]] = {}
        replies = await self._run(commands, repeatable=True)
        for (shard, version, part), reply in zip(parts, replies, strict=True):
            if isinstance(reply, Away):
                continue
            self._saw_version(shard, reply[0])
            if shard.version is not None and shard.version != version:
                again.setdefault(shard, []).extend(part)
                continue
            behind_s = self._behind_s()
            for place, data in zip(part, reply[1:], strict=True):
                if data is None or shard.version is None:
                    found[place] = None
                elif self._codec.is_heavy(data):
                    found[place] = await asyncio.to_thread(self._decoded, data, behind_s)
                else:
                    found[place] = self._decoded(data, behind_s)
        return again

    async def keys(self, space: Space) -> AsyncIterator[Sequence[str]]:
        """See ``SharedStore.keys``."""
        for shard in self._shards.of(space.tenant, space.name):
            await self._learn_versions([shard])
            index = f"{shard.base}:i:v{shard.version}"
            after = "-"
            while True:
                arguments = ("ZRANGEBYLEX", index, after, "+", "LIMIT", 0, _KEYS_AT_ONCE)
                (reply,) = await self._run([Command(shard.meta, arguments)], repeatable=True)
                if isinstance(reply, Away) or not reply:
                    break
                yield [key.decode() for key in reply]
                after = b"(" + reply[-1]

    # ---------------------------------------------------------------- writing

    async def write(self, writes: Sequence[SharedWrite]) -> Sequence[SharedWritten | Away]:
        """See ``SharedStore.write``."""
        results: list[SharedWritten | Away] = [AWAY] * len(writes)
        by_shard = self._by_shard((each.space, each.key) for each in writes)
        commands, parts = [], []
        for shard, indexes in by_shard.items():
            for part in _parts(indexes, _WRITES_AT_ONCE):
                arguments: list[Any] = [*self._head(), 0, len(part)]
                for index in part:
                    each = writes[index]
                    arguments += await self._written(
                        each.space, each.key, each.payload, each.condition, each.if_version
                    )
                commands.append(self._scripts.write.command([shard.meta], arguments))
                parts.append((shard, part))
        replies = await self._run(commands)
        for (shard, part), reply in zip(parts, replies, strict=True):
            if isinstance(reply, Away):
                _fill_in(results, part, reply)
                continue
            self._saw_version(shard, reply[0])
            for index, (stored, version) in zip(part, reply[3:], strict=True):
                payload = writes[index].payload
                results[index] = self._written_at(stored, version, reply[2], payload)
        return results

    async def delete(
        self, wanted: Sequence[tuple[Space, str]], upto: Collection[int] = ()
    ) -> Sequence[SharedRemoved | Away]:
        """See ``SharedStore.delete``."""
        bounds: Sequence[int | str] = list(upto) or [""] * len(wanted)
        results: list[SharedRemoved | Away] = [AWAY] * len(wanted)
        by_shard = self._by_shard(wanted)
        commands, parts = [], []
        for shard, indexes in by_shard.items():
            for part in _parts(indexes, _KEYS_AT_ONCE):
                arguments: list[Any] = self._head()
                for index in part:
                    arguments += [wanted[index][1], bounds[index]]
                commands.append(self._scripts.delete.command([shard.meta], arguments))
                parts.append((shard, part))
        replies = await self._run(commands)
        for (shard, part), reply in zip(parts, replies, strict=True):
            if isinstance(reply, Away):
                _fill_in(results, part, reply)
                continue
            self._saw_version(shard, reply[0])
            for index, removed in zip(part, reply[2:], strict=True):
                results[index] = SharedRemoved(removed, int(reply[1]))
        return results

    async def move(
        self, space: Space, warm: Sequence[tuple[str, Payload]]
    ) -> Sequence[SharedWritten] | Away:
        """See ``SharedStore.move``."""
        shards = self._shards.of(space.tenant, space.name)
        by_shard: dict[Shard, list[int]] = {shard: [] for shard in shards}
        by_shard.update(self._by_shard((space, key) for key, _ in warm))
        await self._learn_versions(shards)
        left = [(shard, shard.version) for shard in shards]
        commands = []
        for shard, indexes in by_shard.items():
            arguments: list[Any] = [*self._head(), 1, len(indexes)]
            for index in indexes:
                key, payload = warm[index]
                arguments += await self._written(space, key, payload, Condition.ALWAYS, 0)
            commands.append(self._scripts.write.command([shard.meta], arguments))
        replies = await self._run(commands)
        failed = [reply for reply in replies if isinstance(reply, Away)]
        if failed:
            return _worst(failed)
        results: list[Any] = [None] * len(warm)
        for (shard, indexes), reply in zip(by_shard.items(), replies, strict=True):
            self._saw_version(shard, reply[0])
            for index, (stored, version) in zip(indexes, reply[3:], strict=True):
                results[index] = self._written_at(stored, version, reply[2], warm[index][1])
        for shard, version in left:
            if version is not None:
                self._reclaim(shard, version)
        return results

    async def remove_prefix(self, space: Space, prefix: str, upto: int = 0) -> SharedRemoved | Away:
        """See ``SharedStore.remove_prefix``."""
        return await self._remove_everywhere(space, self._remove_prefix, prefix, upto)

    async def remove_tags(
        self, space: Space, tags: Sequence[str], upto: int = 0
    ) -> SharedRemoved | Away:
        """See ``SharedStore.remove_tags``."""
        total, newest = 0, 0
        for tag in dict.fromkeys(tags):
            removed = await self._remove_everywhere(space, self._remove_tag, tag, upto)
            if isinstance(removed, Away):
                return removed
            total, newest = total + removed.entries, max(newest, removed.version)
        return SharedRemoved(total, newest)

    # ---------------------------------------------------------------- claims

    async def claim(self, asks: Sequence[SharedAsk]) -> Sequence[SharedClaim | Away]:
        """See ``SharedStore.claim``."""
        results: list[SharedClaim | Away] = [AWAY] * len(asks)
        by_shard = self._by_shard((ask.space, ask.key) for ask in asks)
        commands = []
        for shard, indexes in by_shard.items():
            arguments: list[Any] = self._head()
            for index in indexes:
                ask = asks[index]
                arguments += [ask.key, ask.nonce, math.ceil(ask.timeout_s * 1e3)]
                arguments.append(ask.refreshed_version or "")
            commands.append(self._scripts.claim.command([shard.meta], arguments))
        replies = await self._run(commands)
        for (shard, indexes), reply in zip(by_shard.items(), replies, strict=True):
            if isinstance(reply, Away):
                continue
            self._saw_version(shard, reply[0])
            for index, row in zip(indexes, reply[2:], strict=True):
                entry = await self._entry(row[-1]) if row[-1] else None
                remaining_s = int(row[1]) / 1e6 if row[0] == 2 else 0.0
                failed = row[0] == 2 and bool(row[2])
                results[index] = SharedClaim(row[0] == 3, entry, int(reply[1]), remaining_s, failed)
        return results

    async def fill(
        self, space: Space, key: str, nonce: str, payload: Payload, *, keep: bool
    ) -> SharedWritten | Away:
        """See ``SharedStore.fill``."""
        shard = self._shards.of_key(space.tenant, space.name, key)
        encoded = await self._codec.encode(payload, space.policy.fail_safe_s)
        arguments: list[Any] = [*self._head(), key, nonce, 0 if keep else 1, *encoded]
        reply = await self._run_one(self._scripts.fill.command([shard.meta], arguments))
        if isinstance(reply, Away):
            return reply
        self._saw_version(shard, reply[0])
        return self._written_at(reply[2], reply[3], reply[1], payload)

    async def release(
        self, space: Space, key: str, nonce: str, pause_s: float
    ) -> SharedEntry | Away | None:
        """See ``SharedStore.release``."""
        shard = self._shards.of_key(space.tenant, space.name, key)
        fail_safe_us = round(space.policy.fail_safe_s * 1e6)
        pause_ms = math.ceil(pause_s * 1e3)
        arguments: list[Any] = [*self._head(), key, nonce, pause_ms, fail_safe_us]
        reply = await self._run_one(self._scripts.release.command([shard.meta], arguments))
        if isinstance(reply, Away):
            return reply
        self._saw_version(shard, reply[0])
        return await self._entry(reply[3]) if reply[3] else None

    # ---------------------------------------------------------------- the hottest keys

    async def remember_hottest(self, space: Space, keys: Sequence[str]) -> None:
        """See ``SharedStore.remember_hottest``."""
        shard = self._shards.of(space.tenant, space.name)[0]
        packed = msgspec.msgpack.encode(list(keys))
        arguments = ("SET", shard.hot_key, packed, "PX", _HOT_FOR_MS)
        await self._run([Command(shard.meta, arguments)])

    async def hottest(self, space: Space) -> Sequence[str]:
        """See ``SharedStore.hottest``."""
        shard = self._shards.of(space.tenant, space.name)[0]
        (reply,) = await self._run([Command(shard.meta, ("GET", shard.hot_key))], repeatable=True)
        if isinstance(reply, Away) or reply is None:
            return ()
        return msgspec.msgpack.decode(reply, type=list[str])

    # ---------------------------------------------------------------- within

    def _head(self) -> list[Any]:
        """The first arguments of every script: the channel, and when it is too late to begin."""
        return [self._channel, self._redis.now_us() + self._window_us]

    def _by_shard(self, wanted: Iterable[tuple[Space, str]]) -> dict[Shard, list[int]]:
        """The places of keys in a list, by the shards of the keys."""
        found: dict[Shard, list[int]] = {}
        for place, (space, key) in enumerate(wanted):
            shard = self._shards.of_key(space.tenant, space.name, key)
            found.setdefault(shard, []).append(place)
        return found

    async def _run(self, commands: Sequence[Command], *, repeatable: bool = False) -> list[Any]:
        """The replies; ``Away`` in the place of those that cannot be had."""
        if not commands:
            return []
        replies: list[Any] = await self._redis.run(commands, repeatable=repeatable)
        return [self._away(reply) if isinstance(reply, Exception) else reply for reply in replies]

    async def _run_one(self, command: Command) -> Any:
        (reply,) = await self._run([command])
        return reply

    def _away(self, error: Exception) -> Away:
        """A server that is loading, full or read-only is as good as away; each is said once."""
        text = f"{type(error).__name__}: {error}"
        kind = text[:60]
        if kind not in self._complained and len(self._complained) < 100:
            self._complained.add(kind)
            self._log.warning("the shared store does not serve", error=text)
        return UNSURE if isinstance(error, RedisAwayError) and error.sent else AWAY

    async def _learn_versions(self, shards: Any) -> None:
        """Asks for the versions of namespaces that are not known here."""
        unknown = [shard for shard in shards if shard.version is None]
        if not unknown:
            return
        commands = [Command(shard.meta, ("MGET", shard.meta, shard.seq)) for shard in unknown]
        replies = await self._run(commands, repeatable=True)
        for shard, reply in zip(unknown, replies, strict=True):
            shard.asked = not isinstance(reply, Away)
            if isinstance(reply, Away):
                continue
            version, newest = reply
            if version is not None and int(newest or 0) < shard.newest:
                version = await self._leave(shard)
            self._saw_version(shard, version)

    async def _leave(self, shard: Shard) -> bytes | None:
        """Moves a shard to its next version: the store has lost changes that were made to it.

        It was restarted from an older copy, or a copy took its place: what was invalidated since
        may be there again.
        """
        self._log.warning("the shared store has lost changes", namespace=shard.namespace)
        command = self._scripts.write.command([shard.meta], [*self._head(), 1, 0])
        reply = await self._run_one(command)
        if isinstance(reply, Away):
            return None
        shard.newest = 0
        version: bytes = reply[0]
        return version

    def _saw_version(self, shard: Shard, version: bytes | None) -> None:
        if self._backplane is not None:
            self._backplane.saw_version(shard, None if version is None else version.decode())

    async def _entry(self, data: bytes) -> SharedEntry | None:
        if self._codec.is_heavy(data):
            return await asyncio.to_thread(self._decoded, data, self._behind_s())
        return self._decoded(data, self._behind_s())

    def _decoded(self, data: bytes, behind_s: float) -> SharedEntry | None:
        try:
            payload, version, ends_us = self._codec.decode(data)
        except ValueError as error:
            self._log.error("an entry of the shared store cannot be read", error=str(error))
            return None
        return SharedEntry(payload, version, ends_us / 1e6 - behind_s)

    def _behind_s(self) -> float:
        """How far this replica's clock is behind the servers'; never less than it is."""
        return self._redis.now_us() / 1e6 - self._clock.now()

    async def _written(
        self, space: Space, key: str, payload: Payload, condition: Condition, if_version: int
    ) -> list[Any]:
        encoded = await self._codec.encode(payload, space.policy.fail_safe_s)
        return [key, _CONDITIONS[condition], if_version, *encoded]

    def _written_at(
        self, stored: int, version: bytes, now: bytes, payload: Payload
    ) -> SharedWritten:
        ends_us = int(now) + round(payload.ttl_s * 1e6)
        return SharedWritten(bool(stored), int(version), ends_us / 1e6 - self._behind_s())

    async def _remove_everywhere(
        self,
        space: Space,
        remove: Callable[[Shard, str, int], Awaitable[SharedRemoved | Away]],
        name: str,
        upto: int,
    ) -> SharedRemoved | Away:
        shards = self._shards.of(space.tenant, space.name)
        results = await asyncio.gather(*(remove(shard, name, upto) for shard in shards))
        removed = [result for result in results if not isinstance(result, Away)]
        if len(removed) < len(results):
            return _worst([result for result in results if isinstance(result, Away)])
        return SharedRemoved(
            sum(each.entries for each in removed), max(each.version for each in removed)
        )

    async def _remove_prefix(self, shard: Shard, prefix: str, upto: int) -> SharedRemoved | Away:
        version, after, removed = str(upto or "").encode(), b"", 0
        while True:
            arguments: list[Any] = [*self._head(), prefix, version, after, _KEYS_AT_ONCE]
            reply = await self._run_one(self._scripts.prefix.command([shard.meta], arguments))
            if isinstance(reply, Away):
                return reply
            space_version, version, count, after = reply
            self._saw_version(shard, space_version)
            removed += count
            if not after:
                return SharedRemoved(removed, int(version))

    async def _remove_tag(self, shard: Shard, tag: str, upto: int) -> SharedRemoved | Away:
        version, cursor, removed = str(upto or "").encode(), b"0", 0
        while True:
            arguments: list[Any] = [
                *self._head(),
                tag,
                version,
                cursor,
                _KEYS_AT_ONCE,
                self._max_claim_ms,
            ]
            reply = await self._run_one(self._scripts.tags.command([shard.meta], arguments))
            if isinstance(reply, Away):
                return reply
            space_version, version, count, cursor = reply
            self._saw_version(shard, space_version)
            removed += count
            if cursor == b"0":
                return SharedRemoved(removed, int(version))

    def _reclaim(self, shard: Shard, version: str) -> None:
        """Removes, in the background, what a namespace has left; it would expire by itself."""
        task = asyncio.create_task(self._reclaim_all(shard, version))
        self._reclaiming.add(task)
        task.add_done_callback(self._reclaiming.discard)

    async def _reclaim_all(self, shard: Shard, version: str) -> None:
        arguments: list[Any] = [*self._head(), version, _KEYS_AT_ONCE]
        while True:
            reply = await self._run_one(self._scripts.reclaim.command([shard.meta], arguments))
            if isinstance(reply, Away) or not reply:
                return


def _parts(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """A list in parts of at most a size."""
    for first in range(0, len(places), size):
        yield places[first : first + size]


def _fill_in(results: list[Any], places: Sequence[int], value: Away) -> None:
    for place in places:
        results[place] = value


def _worst(answers: Sequence[Away]) -> Away:
    return UNSURE if UNSURE in answers else AWAY
