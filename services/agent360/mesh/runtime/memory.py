"""Memory of a service's process: how it is collected, and what happens when it runs short."""

from __future__ import annotations

import asyncio
import ctypes
import ctypes.util
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import grpc
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from agent360.client.errors import MeshError
from agent360.mesh.runtime.batch import Group
from agent360.mesh.runtime.resources import resident_bytes
from agent360.mesh.runtime.settings import MemorySettings

_YOUNG_OBJECTS: Final = 50_000
_YOUNG_COLLECTIONS: Final = 20
_MIDDLE_COLLECTIONS: Final = 50

_LOOK_EVERY_S: Final = 0.25
_COLLECT_EVERY_S: Final = 5.0
_RETRY_AFTER_S: Final = 1.0
_SOFT_SHARE: Final = 0.8
_HARD_SHARE: Final = 0.92
_SPARE_SHARE: Final = 0.02
_CGROUP_LIMITS: Final = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_UNLIMITED: Final = 2**60


def tune_garbage_collection() -> None:
    """Collects less often, and never again what the process holds from its start.

    A message of 1,000 items allocates enough small objects for a collection; with the default
    thresholds these took a quarter of the time of a stream. Called once, when a service is up.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, _YOUNG_COLLECTIONS, _MIDDLE_COLLECTIONS)


@runtime_checkable
class ShedsMemory(Protocol):
    """A servicer that holds what it can do without: caches."""

    def shed_memory(self, size_bytes: int) -> int:
        """Lets go of so many bytes of it, or of all, the least useful first.

        Returns:
            About how many bytes were let go.
        """


class MemoryGuard:
    """A policy that keeps the process from being killed for want of memory.

    Above the soft limit caches shrink, a collection runs, and what is free is given back to the
    system. Above the hard limit new work is refused until the process is below it again; what is
    under way goes on. Where no limits are set, they are 80% and 92% of the container's; without a
    container's limit, none.

    Example:
        >>> guard = MemoryGuard(MemorySettings(soft_bytes=2**30), log, registry)
        >>> guard.caches.append(servicer)
        >>> task = asyncio.create_task(guard.run())
    """

    def __init__(
        self,
        settings: MemorySettings,
        log: structlog.stdlib.BoundLogger,
        registry: CollectorRegistry,
        *,
        resident: Callable[[], int] = resident_bytes,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        container = container_limit_bytes()
        self._soft = settings.soft_bytes or int(container * _SOFT_SHARE)
        self._hard = settings.hard_bytes or int(container * _HARD_SHARE)
        self._log = log
        self._resident = resident
        self._now = now
        self._collected_at = float("-inf")
        self._refused = Counter(
            "mesh_memory_refused", "Calls refused above the hard limit.", registry=registry
        )
        self._shrunk = Counter(
            "mesh_memory_shrunk_bytes",
            "Bytes that caches let go above the soft limit.",
            registry=registry,
        )
        limits = Gauge(
            "mesh_memory_limit_bytes",
            "Limits of the process's memory; 0: none.",
            ["kind"],
            registry=registry,
        )
        limits.labels("soft").set(self._soft)
        limits.labels("hard").set(self._hard)
        self.caches: list[ShedsMemory] = []
        """What gives up memory above the soft limit."""
        self.short = False
        """Whether the process is above the hard limit, and refuses new work."""

    async def run(self) -> None:
        """Looks four times a second until cancelled; returns at once if there are no limits."""
        while self._soft or self._hard:
            await asyncio.sleep(_LOOK_EVERY_S)
            self.look()

    def look(self) -> None:
        """Looks at the memory, and does something about it."""
        used = self._resident()
        if self._soft and used > self._soft:
            self._make_room(used)
            used = self._resident()
        short = bool(self._hard) and used > self._hard
        if short is not self.short:
            self.short = short
            if short:
                self._log.error(
                    "out of memory: refusing new calls", used_bytes=used, hard_bytes=self._hard
                )
            else:
                self._log.info("enough memory again: serving", used_bytes=used)

    def _make_room(self, used: int) -> None:
        wanted = used - self._soft + int(self._soft * _SPARE_SHARE)
        freed = sum(cache.shed_memory(wanted) for cache in self.caches)
        self._shrunk.inc(freed)
        collects = self._now() - self._collected_at >= _COLLECT_EVERY_S
        if collects:
            gc.collect()
        if collects or freed:
            _give_back()
        if collects:
            self._collected_at = self._now()
            self._log.warning(
                "short of memory: caches shrink",
                used_bytes=used,
                soft_bytes=self._soft,
                freed_bytes=freed,
            )

    # ---------------------------------------------------------------- policy

    def before(self, group: Group) -> None:
        """Refuses new work above the hard limit.

        Raises:
            MeshError: RESOURCE_EXHAUSTED OUT_OF_MEMORY; the call may be repeated later.
        """
        if self.short:
            self._refused.inc(len(group.items))
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "OUT_OF_MEMORY",
                "the service is short of memory and takes no new calls until it has room",
                retry_after_s=_RETRY_AFTER_S,
            )

    def after(self, group: Group, code: grpc.StatusCode, count: int, duration_s: float) -> None:
        """Nothing is counted."""


def container_limit_bytes() -> int:
    """How much memory the container may use; 0: there is no limit."""
    for path in _CGROUP_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < _UNLIMITED:
            return int(text)
    return 0


def _give_back() -> None:
    """Has the C library return free memory to the system, where it can."""
    if _TRIM is not None:
        _TRIM(0)


def _trim() -> Any:
    try:
        return ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim
    except (OSError, AttributeError):
        return None


_TRIM: Final = _trim()
