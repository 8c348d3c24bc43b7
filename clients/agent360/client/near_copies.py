"""Copies of entries in this process, within bounds: SIEVE decides which goes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from agent360.client.entries import Lookup

OVERHEAD_BYTES: Final = 500
"""What a copy takes beside its texts and its value: objects and tables, as measured."""
ANY_VERSION: Final = 2**64
"""Above every version."""

_LARGEST_PART: Final = 8


class Copy:
    """A copy of an entry. Copies are compared by identity."""

    __slots__ = (
        "content_type", "expires", "fresh_until", "key", "newer", "older", "size_bytes", "space",
        "tags", "value", "version", "visited",
    )  # fmt: skip

    def __init__(self) -> None:
        self.space: _Space
        self.key = ""
        self.value = b""
        self.content_type = ""
        self.version = 0
        self.tags: tuple[str, ...] | None = ()
        """None: not known."""
        self.fresh_until = 0.0
        """When the entry's TTL ends."""
        self.expires = 0.0
        """When the copy may no longer be used; not after ``fresh_until``."""
        self.size_bytes = 0
        self.visited = False
        """Whether it was used since the hand last passed."""
        self.newer: Copy = self
        self.older: Copy = self


class _Space:
    """The copies of one namespace of a tenant.

    Invariant: ``tagged`` holds each copy under each of its tags, under None if they are not known.
    """

    __slots__ = ("copies", "name", "tagged", "tenant")

    def __init__(self, tenant: str, name: str) -> None:
        self.tenant = tenant
        self.name = name
        self.copies: dict[str, Copy] = {}
        self.tagged: dict[str | None, dict[Copy, None]] = {}


class Copies:
    """Copies of many tenants' entries, told apart by tenant, namespace and key.

    SIEVE (Zhang et al., NSDI 2024): copies stand in the order in which they came; a hit only marks
    its copy; a hand that goes from old to new takes marks away and evicts the first copy without.

    Invariants: ``entries`` and ``size_bytes`` are those of the copies held, within the bounds;
    stored = entries + evictions + expired + invalidated.

    Example:
        >>> copies = Copies(max_entries=10_000, max_bytes=2**26)
        >>> copies.put("acme", "plans", "plan:42", lookup, (), fresh_until, expires, now)
        >>> copies.find("acme", "plans", "plan:42", now).value
        b'...'
    """

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._tenants: dict[str, dict[str, _Space]] = {}
        # The ring's fixed point: its ``older`` is the newest copy and its ``newer`` the oldest.
        self._root = self._hand = Copy()
        self.entries = 0
        self.size_bytes = 0
        self.stored = 0
        """Copies taken in."""
        self.evictions = 0
        """Copies pushed out for want of room."""
        self.expired = 0
        """Copies whose time was over when they were met."""
        self.invalidated = 0
        """Copies dropped because they were, or might have been, outdated."""

    def find(self, tenant: str, namespace: str, key: str, now: float) -> Copy | None:
        """The copy of an entry that may still be used."""
        spaces = self._tenants.get(tenant)
        if spaces is None:
            return None
        space = spaces.get(namespace)
        if space is None:
            return None
        copy = space.copies.get(key)
        if copy is None:
            return None
        if now >= copy.expires:
            self._remove(copy)
            self.expired += 1
            return None
        copy.visited = True
        return copy

    def put(
        self,
        tenant: str,
        namespace: str,
        key: str,
        lookup: Lookup,
        tags: tuple[str, ...] | None,
        fresh_until: float,
        expires: float,
        now: float,
    ) -> None:
        """Takes a copy in, unless there is one of a later version or it is far too large."""
        size = _size_of(key, lookup, tags)
        if size > self._max_bytes // _LARGEST_PART:
            return
        there = self._there(tenant, namespace, key)
        if there is not None:
            if now < there.expires and there.version >= lookup.version:
                if there.version == lookup.version and there.tags == tags:
                    there.fresh_until = max(there.fresh_until, fresh_until)
                    there.expires = max(there.expires, expires)
                    return
                if there.version > lookup.version or tags is None:
                    return
            self._remove(there)
            self._count_removed(there, now)
        while self.entries >= self._max_entries or self.size_bytes + size > self._max_bytes:
            self._evict(now)
        copy = Copy()
        copy.space = self._space(tenant, namespace)
        copy.key = key
        copy.value = lookup.value
        copy.content_type = lookup.content_type
        copy.version = lookup.version
        copy.tags = tags
        copy.fresh_until = fresh_until
        copy.expires = expires
        copy.size_bytes = size
        self._insert(copy)
        self.stored += 1

    def drop_key(self, tenant: str, namespace: str, key: str, version: int) -> None:
        """Drops the copy of a key if it is not newer than ``version``."""
        there = self._there(tenant, namespace, key)
        if there is not None:
            self._drop((there,), version)

    def drop_prefix(self, tenant: str, namespace: str, prefix: str, version: int) -> None:
        """Drops the copies whose keys begin with a prefix."""
        copies = self._copies(tenant, namespace)
        self._drop([copy for copy in copies if copy.key.startswith(prefix)], version)

    def drop_tags(self, tenant: str, namespace: str, tags: Iterable[str], version: int) -> None:
        """Drops the copies that have one of the tags, or may have one."""
        space = self._tenants.get(tenant, {}).get(namespace)
        if space is not None:
            tagged = space.tagged
            found = {copy: None for tag in (*tags, None) for copy in tagged.get(tag, ())}
            self._drop(found, version)

    def drop_namespace(self, tenant: str, namespace: str, version: int) -> None:
        """Drops the copies of a namespace."""
        self._drop(list(self._copies(tenant, namespace)), version)

    def drop_tenant(self, tenant: str) -> None:
        """Drops all copies of a tenant."""
        for space in list(self._tenants.get(tenant, {}).values()):
            self._drop(list(space.copies.values()), ANY_VERSION)

    # ---------------------------------------------------------------- within

    def _there(self, tenant: str, namespace: str, key: str) -> Copy | None:
        space = self._tenants.get(tenant, {}).get(namespace)
        return None if space is None else space.copies.get(key)

    def _copies(self, tenant: str, namespace: str) -> Iterable[Copy]:
        space = self._tenants.get(tenant, {}).get(namespace)
        return () if space is None else space.copies.values()

    def _space(self, tenant: str, namespace: str) -> _Space:
        spaces = self._tenants.setdefault(tenant, {})
        space = spaces.get(namespace)
        if space is None:
            space = spaces[namespace] = _Space(tenant, namespace)
        return space

    def _drop(self, copies: Iterable[Copy], version: int) -> None:
        for copy in copies:
            if copy.version <= version:
                self._remove(copy)
                self.invalidated += 1

    def _evict(self, now: float) -> None:
        """Makes the hand go on until one copy is out."""
        root, copy = self._root, self._hand
        while True:
            if copy is root:
                copy = root.newer
            if not copy.visited or now >= copy.expires:
                break
            copy.visited = False
            copy = copy.newer
        self._hand = copy
        self._remove(copy)
        if now >= copy.expires:
            self.expired += 1
        else:
            self.evictions += 1

    def _count_removed(self, copy: Copy, now: float) -> None:
        if now >= copy.expires:
            self.expired += 1
        else:
            self.invalidated += 1

    def _insert(self, copy: Copy) -> None:
        space = copy.space
        space.copies[copy.key] = copy
        for tag in (None,) if copy.tags is None else copy.tags:
            space.tagged.setdefault(tag, {})[copy] = None
        root = self._root
        copy.older, copy.newer = root.older, root
        root.older.newer = copy
        root.older = copy
        self.entries += 1
        self.size_bytes += copy.size_bytes

    def _remove(self, copy: Copy) -> None:
        space = copy.space
        del space.copies[copy.key]
        for tag in (None,) if copy.tags is None else dict.fromkeys(copy.tags):
            tagged = space.tagged[tag]
            del tagged[copy]
            if not tagged:
                del space.tagged[tag]
        if not space.copies:
            spaces = self._tenants[space.tenant]
            del spaces[space.name]
            if not spaces:
                del self._tenants[space.tenant]
        if self._hand is copy:
            self._hand = copy.newer
        copy.older.newer = copy.newer
        copy.newer.older = copy.older
        copy.older = copy.newer = copy
        self.entries -= 1
        self.size_bytes -= copy.size_bytes


def _size_of(key: str, lookup: Lookup, tags: tuple[str, ...] | None) -> int:
    size = len(lookup.value) + len(key) + len(lookup.content_type) + OVERHEAD_BYTES
    for tag in tags or ():
        size += len(tag) + OVERHEAD_BYTES // 2
    return size
