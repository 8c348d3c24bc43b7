"""Each tenant's share of the memory: its own admission policy within its own quota."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from agent360.mesh.cache.admission import Bounds, Outcome, TinyLfu
from agent360.mesh.cache.entry import Entry, Space


class Tenancy:
    """The namespaces of one tenant, and what decides which of its entries are kept."""

    __slots__ = ("policy", "quota", "spaces")

    def __init__(self, quota: Bounds) -> None:
        self.quota = quota
        self.policy = TinyLfu(quota)
        self.spaces: dict[str, Space] = {}


class Shares:
    """Divides the store's bounds among tenants.

    A tenant's entries compete among themselves only. Where there is no room left for all, whoever
    holds more than an equal share makes way for who holds less: no tenant, whatever it writes, can
    push another below an equal share.

    Invariant: between calls ``entries`` and ``size_bytes`` are the sums over all policies, and are
    within the bounds.
    """

    __slots__ = ("_bounds", "_quota_of", "_tenancies", "entries", "size_bytes")

    def __init__(self, bounds: Bounds, quota_of: Callable[[str], Bounds]) -> None:
        self._bounds = bounds
        self._quota_of = quota_of
        self._tenancies: dict[str, Tenancy] = {}
        self.entries = 0
        """How many there are."""
        self.size_bytes = 0
        """Bytes of all of them."""

    def of(self, tenant: str) -> Tenancy:
        """The tenant's share, which is made if there is none."""
        tenancy = self._tenancies.get(tenant)
        if tenancy is None:
            quota, most = self._quota_of(tenant), self._bounds
            quota = Bounds(min(quota.entries, most.entries), min(quota.size_bytes, most.size_bytes))
            tenancy = self._tenancies[tenant] = Tenancy(quota)
        return tenancy

    def get(self, tenant: str) -> Tenancy | None:
        """The tenant's share, if it has one."""
        return self._tenancies.get(tenant)

    def all(self) -> Iterator[Tenancy]:
        """The shares of all tenants."""
        return iter(list(self._tenancies.values()))

    def would_exceed(self, size_bytes: int) -> bool:
        """Whether one more entry of that size would not fit."""
        most = self._bounds
        return self.entries >= most.entries or self.size_bytes + size_bytes > most.size_bytes

    def add(self, tenancy: Tenancy, entry: Entry, *, always: bool) -> Outcome:
        """Takes a new entry; the outcome may concern entries of other tenants."""
        policy = tenancy.policy
        if len(self._tenancies) > 1:
            policy.rebound(self._allowance(tenancy))
        count, size = len(policy), policy.size_bytes
        outcome = policy.add(entry, always=always)
        return self._balanced(policy, count, size, outcome)

    def resized(self, tenancy: Tenancy, entry: Entry, old_size_bytes: int) -> Outcome:
        """Notes that a held entry was rewritten with another size."""
        policy = tenancy.policy
        if len(self._tenancies) > 1:
            policy.rebound(self._allowance(tenancy))
        count, size = len(policy), policy.size_bytes
        outcome = policy.resized(entry, old_size_bytes)
        return self._balanced(policy, count, size, outcome)

    def remove(self, tenancy: Tenancy, entry: Entry) -> None:
        """Lets go of a held entry."""
        if entry.segment is not None:
            self.entries -= 1
            self.size_bytes -= entry.size_bytes
            tenancy.policy.remove(entry)

    def shed_memory(self, size_bytes: int) -> Outcome:
        """Lets go of so many bytes, worth least first, of all tenants in proportion."""
        outcome = Outcome([], [], [])
        part = min(1.0, size_bytes / self.size_bytes) if self.size_bytes else 0.0
        for tenancy in self._tenancies.values():
            policy = tenancy.policy
            count, size = len(policy), policy.size_bytes
            outcome.evicted.extend(policy.shed_memory(math.ceil(size * part)).evicted)
            self.entries += len(policy) - count
            self.size_bytes += policy.size_bytes - size
        return outcome

    def _allowance(self, tenancy: Tenancy) -> Bounds:
        """What a tenant may hold now: what others leave or an equal share, within its quota."""
        most, quota, policy = self._bounds, tenancy.quota, tenancy.policy
        tenants = len(self._tenancies)
        free_entries = most.entries - (self.entries - len(policy))
        free_bytes = most.size_bytes - (self.size_bytes - policy.size_bytes)
        return Bounds(
            max(1, min(quota.entries, max(free_entries, most.entries // tenants))),
            min(quota.size_bytes, max(free_bytes, most.size_bytes // tenants)),
        )

    def _balanced(self, policy: TinyLfu, count: int, size: int, outcome: Outcome) -> Outcome:
        """Brings the sums up to date, and all together back within the bounds."""
        self.entries += len(policy) - count
        self.size_bytes += policy.size_bytes - size
        most = self._bounds
        while self.entries > most.entries or self.size_bytes > most.size_bytes:
            largest = self._largest(by_entries=self.entries > most.entries)
            count, size = len(largest), largest.size_bytes
            largest.rebound(
                Bounds(
                    max(0, count - max(0, self.entries - most.entries)),
                    max(0, size - max(0, self.size_bytes - most.size_bytes)),
                )
            )
            shrunk = largest.shrink()
            outcome.evicted.extend(shrunk.evicted)
            self.entries += len(largest) - count
            self.size_bytes += largest.size_bytes - size
        return outcome

    def _largest(self, *, by_entries: bool) -> TinyLfu:
        """The policy of the tenant that holds most of what has run short."""
        return max(
            (tenancy.policy for tenancy in self._tenancies.values()),
            key=len if by_entries else lambda policy: policy.size_bytes,
        )
