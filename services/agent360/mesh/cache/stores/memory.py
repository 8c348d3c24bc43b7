"""Entries in this process's memory, each tenant's within its share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

import grpc

from agent360.client.errors import MeshError
from agent360.mesh.cache.admission import Bounds, Outcome
from agent360.mesh.cache.entry import OVERHEAD_BYTES, Counts, Entry, Payload, Space, size_of
from agent360.mesh.cache.expiry import ExpiryWheel
from agent360.mesh.cache.policy import DEFAULT_POLICY, Admission, PolicyOf
from agent360.mesh.cache.shares import Shares, Tenancy

_READS_AT_ONCE: Final = 64
_RECLAIMED_WITH_A_WRITE: Final = 16
_NO_SPACES: Final[Mapping[str, Space]] = MappingProxyType({})


class MemoryStore:
    """The port ``Store``.

    Values are found in one dictionary for each namespace of each tenant, by their full keys: no
    key can be taken for another, whatever their hashes are. The policy sees the same entries and
    says which go.

    Invariant: an entry is in its tenant's policy, in the wheel and (if of its space's generation)
    in its space's tables, or in none of them. Entries of dropped generations wait in ``_dropped``.
    """

    def __init__(
        self,
        bounds: Bounds,
        *,
        max_namespaces: int,
        now: float,
        hash_key: Callable[[str], int] = hash,
        quota_of: Callable[[str], Bounds] | None = None,
        policy_of: PolicyOf = lambda _, __: DEFAULT_POLICY,
    ) -> None:
        """Makes an empty store.

        Args:
            bounds: what entries may take in all.
            max_namespaces: of one tenant.
            now: monotonic time in seconds.
            hash_key: what the policy tells keys apart by; it never decides what is found.
            quota_of: what the entries of a tenant may take; None: as much as all.
            policy_of: the policy of a namespace.
        """
        self._shares = Shares(bounds, quota_of or (lambda _: bounds))
        self._wheel = ExpiryWheel(now)
        self._max_namespaces = max_namespaces
        self._hash_key = hash_key
        self._policy_of = policy_of
        self._reads: list[Entry] = []
        self._dropped: deque[Iterator[Entry]] = deque()
        self._due: Iterator[Entry] = iter(())

    # ---------------------------------------------------------------- namespaces

    def space(self, tenant: str, name: str) -> Space:
        """See ``Store.space``."""
        spaces = self._shares.of(tenant).spaces
        space = spaces.get(name)
        if space is None:
            if len(spaces) >= self._max_namespaces:
                raise MeshError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "NAMESPACES_EXHAUSTED",
                    f"the tenant has {len(spaces):,} namespaces, which is the most there may be",
                    metadata={"max_namespaces": str(self._max_namespaces)},
                )
            space = spaces[name] = Space(tenant, name, self._policy_of(tenant, name))
        return space

    def space_to_read(self, tenant: str, name: str) -> Space:
        """See ``Store.space_to_read``."""
        spaces = self.spaces(tenant)
        if name not in spaces and len(spaces) >= self._max_namespaces:
            return Space(tenant, name, self._policy_of(tenant, name))
        return self.space(tenant, name)

    def spaces(self, tenant: str) -> Mapping[str, Space]:
        """See ``Store.spaces``."""
        tenancy = self._shares.get(tenant)
        return _NO_SPACES if tenancy is None else tenancy.spaces

    def all_spaces(self) -> Iterator[Space]:
        """See ``Store.all_spaces``."""
        for tenancy in self._shares.all():
            yield from list(tenancy.spaces.values())

    def drop_generation(self, space: Space) -> int:
        """See ``Store.drop_generation``."""
        dropped = len(space.entries)
        self._dropped.append(iter(space.entries.values()))
        space.generation += 1
        space.entries = {}
        space.tags = {}
        space.size_bytes = 0
        return dropped

    # ---------------------------------------------------------------- reading

    def find(self, space: Space, key: str, now: float, allow_stale: bool) -> Entry | None:
        """See ``Store.find``."""
        entry = space.entries.get(key)
        if entry is not None:
            if now < entry.fresh_until:
                space.counts.hits += 1
                self._reads.append(entry)
                return entry
            if now >= entry.gone_at:
                self._expire(entry)
            elif allow_stale and now < entry.stale_until:
                space.counts.stale_hits += 1
                self._reads.append(entry)
                return entry
        return None

    def note_reads(self) -> None:
        """See ``Store.note_reads``."""
        if len(self._reads) >= _READS_AT_ONCE:
            self._flush_reads()

    def by_use(self, space: Space) -> list[Entry]:
        """See ``Store.by_use``."""
        self._flush_reads()
        frequency = self._shares.of(space.tenant).policy.frequency
        return sorted(space.entries.values(), key=frequency, reverse=True)

    def peek(self, space: Space, key: str, now: float) -> Entry | None:
        """See ``Store.peek``."""
        entry = space.entries.get(key)
        if entry is not None and now >= entry.gone_at:
            self._expire(entry)
            return None
        return entry

    def tagged(self, space: Space, tags: Iterable[str]) -> list[Entry]:
        """See ``Store.tagged``."""
        found: dict[Entry, None] = {}
        for tag in tags:
            found.update(space.tags.get(tag, {}))
        return list(found)

    # ---------------------------------------------------------------- writing

    def write(
        self,
        space: Space,
        key: str,
        payload: Payload,
        now: float,
        version: int,
        fresh_until: float | None = None,
    ) -> Entry:
        """See ``Store.write``."""
        if fresh_until is None:
            fresh_until = now + payload.ttl_s
        if self._reads:
            self._flush_reads()
        size_bytes = size_of(key, payload)
        if self._dropped:
            self._make_way(size_bytes)
        entry = self.peek(space, key, now)
        tenancy = self._shares.of(space.tenant)
        if entry is None:
            entry = Entry(space, key, self._hash_key(key) ^ space.salt)
            entry.write(payload, fresh_until, version, size_bytes)
            space.entries[key] = entry
            space.size_bytes += entry.size_bytes
            self._file(entry)
            always = space.policy.admission is Admission.ALWAYS
            self._settle(self._shares.add(tenancy, entry, always=always))
        else:
            old_size_bytes = entry.size_bytes
            self._unfile(entry)
            entry.write(payload, fresh_until, version, size_bytes)
            space.size_bytes += entry.size_bytes - old_size_bytes
            self._file(entry)
            self._settle(self._shares.resized(tenancy, entry, old_size_bytes))
        return entry

    def wants_copy(self, space: Space, key: str, payload: Payload) -> bool:
        """See ``Store.wants_copy``."""
        if self._dropped:
            return True
        key_hash = self._hash_key(key) ^ space.salt
        policy = self._shares.of(space.tenant).policy
        return policy.wants_copy(key_hash, len(payload.value) + OVERHEAD_BYTES)

    def remove(self, entry: Entry) -> None:
        """See ``Store.remove``."""
        if entry.segment is not None:
            self._let_go(entry)

    def sweep(self, now: float, limit: int) -> bool:
        """See ``Store.sweep``."""
        limit = self._reclaim(limit)
        while limit > 0:
            entry = next(self._due, None)
            if entry is None:
                self._due = self._wheel.due(now)
                entry = next(self._due, None)
                if entry is None:
                    return bool(self._dropped)
            limit -= 1
            self._expire(entry)
        return True

    # ---------------------------------------------------------------- counting

    @property
    def size_bytes(self) -> int:
        """Bytes of all entries, those of dropped generations included."""
        return self._shares.size_bytes

    def __len__(self) -> int:
        """How many entries there are, those of dropped generations included."""
        return self._shares.entries

    def shed_memory(self, size_bytes: int) -> int:
        """See ``Store.shed_memory``."""
        self._flush_reads()
        before = self._shares.size_bytes
        self._settle(self._shares.shed_memory(size_bytes))
        return before - self._shares.size_bytes

    def totals(self) -> Counts:
        """The counts of all namespaces together."""
        totals = Counts()
        for space in self.all_spaces():
            totals.add(space.counts)
        return totals

    # ---------------------------------------------------------------- bookkeeping

    def _flush_reads(self) -> None:
        """Tells the policies what was read, tenant by tenant."""
        if not self._reads:
            return
        reads, self._reads = self._reads, []
        by_tenant: dict[str, list[Entry]] = {}
        for entry in reads:
            by_tenant.setdefault(entry.space.tenant, []).append(entry)
        for tenant, entries in by_tenant.items():
            self._shares.of(tenant).policy.used(entries)

    def _make_way(self, size_bytes: int) -> None:
        """Reclaims as many unreachable entries as it takes before others are pushed out."""
        self._reclaim(_RECLAIMED_WITH_A_WRITE)
        while self._dropped and self._shares.would_exceed(size_bytes):
            self._reclaim(_RECLAIMED_WITH_A_WRITE)

    def _reclaim(self, limit: int) -> int:
        """Lets go of entries of dropped generations; returns what is left of the limit."""
        while limit > 0 and self._dropped:
            entry = next(self._dropped[0], None)
            if entry is None:
                self._dropped.popleft()
            else:
                limit -= 1
                self._let_go(entry)
        return limit

    def _settle(self, outcome: Outcome) -> None:
        for entry in outcome.evicted:
            if entry.reachable:
                entry.space.counts.evictions += 1
            self._forget(entry)
        for entry in outcome.rejected:
            if entry.reachable:
                entry.space.counts.rejections += 1
            self._forget(entry)
        for entry in outcome.admitted:
            entry.space.counts.admissions += 1

    def _expire(self, entry: Entry) -> None:
        if entry.segment is not None:
            if entry.reachable:
                entry.space.counts.expirations += 1
            self._let_go(entry)

    def _let_go(self, entry: Entry) -> None:
        self._shares.remove(self._tenancy(entry), entry)
        self._forget(entry)

    def _tenancy(self, entry: Entry) -> Tenancy:
        return self._shares.of(entry.space.tenant)

    def _forget(self, entry: Entry) -> None:
        """Takes an entry that the policy let go of out of all tables."""
        self._unfile(entry)
        space = entry.space
        if entry.reachable:
            del space.entries[entry.key]
            space.size_bytes -= entry.size_bytes

    def _file(self, entry: Entry) -> None:
        self._wheel.add(entry)
        index = entry.space.tags
        for tag in entry.tags:
            index.setdefault(tag, {})[entry] = None

    def _unfile(self, entry: Entry) -> None:
        self._wheel.discard(entry)
        if entry.tags and entry.reachable:
            index = entry.space.tags
            for tag in entry.tags:
                del index[tag][entry]
                if not index[tag]:
                    del index[tag]
