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
    names: tuple[str, ...]
    serial: int
    """Of the last change of the namespace that was noted."""


class _Owed:
    """The debts of one namespace."""

    __slots__ = ("all", "keys", "prefixes", "serial", "tags")

    def __init__(self) -> None:
        self.keys: dict[str, None] = {}
        self.prefixes: dict[str, None] = {}
        self.tags: dict[str, None] = {}
        self.all = False
        self.serial = 0

    def __len__(self) -> int:
        return len(self.keys) + len(self.prefixes) + len(self.tags)


class OwedChanges:
    """Writes and removals that only this replica has carried out.

    Until they are made up for, what the shared store has of them is older than what was written or
    removed here, and must not be served. Writes are made up for by removal: whether another
    replica wrote later is not known. Too many of one namespace become a debt of all of it.
    """

    def __init__(self) -> None:
        self._by_space: dict[Space, _Owed] = {}

    def __bool__(self) -> bool:
        """Whether anything is owed."""
        return bool(self._by_space)

    def add(self, space: Space, scope: Scope, names: Sequence[str]) -> None:
        """Notes a change."""
        owed = self._by_space.setdefault(space, _Owed())
        owed.serial += 1
        if owed.all:
            return
        match scope:
            case "keys":
                owed.keys.update(dict.fromkeys(names))
            case "prefix":
                owed.prefixes.update(dict.fromkeys(names))
            case "tags":
                owed.tags.update(dict.fromkeys(names))
            case "all":
                owed.all = True
        if owed.all or len(owed) > _MAX_NAMES:
            owed.all = True
            owed.keys, owed.prefixes, owed.tags = {}, {}, {}

    def covers(self, space: Space, key: str) -> bool:
        """Whether what the shared store has under a key may be older than what was done here."""
        owed = self._by_space.get(space)
        if owed is None:
            return False
        return (
            owed.all
            or bool(owed.tags)
            or key in owed.keys
            or any(key.startswith(prefix) for prefix in owed.prefixes)
        )

    def written(self, space: Space, key: str) -> None:
        """The shared store has a newer entry under the key: nothing is owed for it."""
        owed = self._by_space.get(space)
        if owed is not None and owed.keys.pop(key, _MISSING) is None:
            self._drop_if_empty(space, owed)

    def debts(self) -> Iterator[Debt]:
        """Everything owed, in parts that can be settled one by one."""
        for space, owed in list(self._by_space.items()):
            if owed.all:
                yield Debt(space, "all", (), owed.serial)
            for prefix in list(owed.prefixes):
                yield Debt(space, "prefix", (prefix,), owed.serial)
            if owed.tags:
                yield Debt(space, "tags", tuple(owed.tags), owed.serial)
            if owed.keys:
                yield Debt(space, "keys", tuple(owed.keys), owed.serial)

    def paid(self, debt: Debt) -> None:
        """A debt was made up for; if more was noted meanwhile, it stays and is paid once more."""
        owed = self._by_space.get(debt.space)
        if owed is None or owed.serial != debt.serial:
            return
        match debt.scope:
            case "keys":
                for key in debt.names:
                    owed.keys.pop(key, None)
            case "prefix":
                owed.prefixes.pop(debt.names[0], None)
            case "tags":
                for tag in debt.names:
                    owed.tags.pop(tag, None)
            case "all":
                owed.all = False
        self._drop_if_empty(debt.space, owed)

    def _drop_if_empty(self, space: Space, owed: _Owed) -> None:
        if not owed.all and not len(owed):
            del self._by_space[space]


_MISSING: Final = object()
