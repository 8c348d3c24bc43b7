"""What a replica did while the shared store was away, and owes to the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from agent360.mesh.cache.changes import Scope
from agent360.mesh.cache.entry import Space

_MAX_NAMES: Final = 10_000


class Debt(NamedTuple):
    """Entries of a namespace that must go from the shared store."""

    space: Space
    scope: Scope
    names: dict[str, int]
    """Keys, prefixes or tags; of each, up to which version entries must go. ``""`` for all."""


class _Owed:
    """The debts of one namespace: names by scope, with the version up to which entries must go."""

    __slots__ = ("all", "keys", "prefixes", "tags")

    def __init__(self) -> None:
        self.keys: dict[str, int] = {}
        self.prefixes: dict[str, int] = {}
        self.tags: dict[str, int] = {}
        self.all: dict[str, int] = {}

    def names(self, scope: Scope) -> dict[str, int]:
        """The names of a scope."""
        by_scope = {"keys": self.keys, "prefix": self.prefixes, "tags": self.tags, "all": self.all}
        return by_scope[scope]

    def __len__(self) -> int:
        return len(self.keys) + len(self.prefixes) + len(self.tags) + len(self.all)


class OwedChanges:
    """Writes and removals that only this replica has carried out.

    Until they are made up for, what the shared store has of them, up to the version at which they
    were made, must not be served. Writes are made up for by removal; what others wrote later than
    that stays. Too many of one namespace become a debt of all of it.
    """

    def __init__(self) -> None:
        self._by_space: dict[Space, _Owed] = {}

    def __bool__(self) -> bool:
        """Whether anything is owed."""
        return bool(self._by_space)

    def add(self, space: Space, scope: Scope, names: Sequence[str], version: int) -> None:
        """Notes a change.

        Args:
            space: where.
            scope: what ``names`` are.
            names: keys, prefixes or tags; none for all.
            version: above that of any entry that the store had then.
        """
        owed = self._by_space.setdefault(space, _Owed())
        if scope == "all" or len(owed) + len(names) > _MAX_NAMES:
            owed.all[""] = version
            for each in (owed.keys, owed.prefixes, owed.tags):
                each.clear()
        else:
            owed.names(scope).update(dict.fromkeys(names, version))

    def owes(self, space: Space, key: str) -> bool:
        """Whether a key was changed here alone."""
        return self.covers(space, key, 1)

    def covers(self, space: Space, key: str, version: int) -> bool:
        """Whether an entry of the shared store may be older than what was done here."""
        owed = self._by_space.get(space)
        if owed is None:
            return False
        bounds = [owed.keys.get(key, 0), *owed.tags.values(), *owed.all.values()]
        bounds += [bound for prefix, bound in owed.prefixes.items() if key.startswith(prefix)]
        return version <= max(bounds)

    def debts(self) -> Iterator[Debt]:
        """Everything owed, in parts that can be settled one by one."""
        scopes: tuple[Scope, ...] = ("all", "prefix", "tags", "keys")
        for space, owed in list(self._by_space.items()):
            for scope in scopes:
                if names := owed.names(scope):
                    yield Debt(space, scope, dict(names))

    def paid(self, debt: Debt) -> None:
        """A debt was made up for; what was noted again meanwhile stays."""
        owed = self._by_space.get(debt.space)
        if owed is None:
            return
        names = owed.names(debt.scope)
        for name, version in debt.names.items():
            if names.get(name) == version:
                del names[name]
        if not len(owed):
            del self._by_space[debt.space]
