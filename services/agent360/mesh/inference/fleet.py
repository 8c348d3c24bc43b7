"""The backends of a service: which of them work, and how busy they are."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import grpc
import structlog

from agent360.client.errors import MeshError, UnavailableError
from agent360.mesh.inference.catalogue import Catalogue
from agent360.mesh.inference.ports import Backend
from agent360.mesh.inference.settings import ModelSettings

_FAILURES_UNTIL_DOWN: Final = 3
_LATENCIES_KEPT: Final = 128
_FIRST_PROBE_PAUSE_S: Final = 0.1


class Health(Enum):
    """Whether a model or a backend can be used now."""

    UNKNOWN = 0
    READY = 1
    DEGRADED = 2
    UNAVAILABLE = 3


@dataclass(slots=True, eq=False)
class Member:
    """A backend and what is known of it."""

    backend: Backend
    probed: bool
    """Whether it is asked for its models; without that only work tells how it is."""
    failures: int = 0
    """Failures in a row, of probes and of work."""
    heard_of: bool = False
    """Whether it has ever answered or failed."""
    running: int = 0
    """Requests it works on now."""

    @property
    def health(self) -> Health:
        """What its last answers say."""
        if not self.heard_of:
            return Health.UNKNOWN
        if self.failures == 0:
            return Health.READY
        return Health.DEGRADED if self.failures < _FAILURES_UNTIL_DOWN else Health.UNAVAILABLE

    def worked(self) -> None:
        """Notes an answer."""
        self.heard_of, self.failures = True, 0

    def failed(self) -> None:
        """Notes a failure that is the backend's."""
        self.heard_of = True
        self.failures += 1


@dataclass(slots=True)
class ModelLoad:
    """What a model is doing."""

    running: int = 0
    """Requests it works on now."""
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES_KEPT))
    """Times of its recent answers."""

    def latency_p50_s(self) -> float | None:
        """Median of its recent answers; None if there are none."""
        return statistics.median(self.latencies_s) if self.latencies_s else None


class Fleet:
    """Starts, probes, chooses and closes backends.

    Where the settings name no models, what the backends list becomes the catalogue.
    """

    def __init__(
        self,
        members: Sequence[Member],
        catalogue: Catalogue,
        log: structlog.stdlib.BoundLogger,
        *,
        discover: bool,
        probe_interval_s: float,
    ) -> None:
        self._members: Mapping[str, Member] = {each.backend.name: each for each in members}
        self._catalogue = catalogue
        self._log = log
        self._discover = discover
        self._probe_interval_s = probe_interval_s
        self._listed: dict[str, list[str]] = {}
        self._loads: dict[str, ModelLoad] = {}
        self._probing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connects; returns when a backend answered, or at once if none is to be probed."""
        for member in self._members.values():
            await member.backend.start()
        probed = [member for member in self._members.values() if member.probed]
        if not probed:
            return
        pause, told = _FIRST_PROBE_PAUSE_S, False
        while not await self._probe(probed):
            if not told:
                told = True
                self._log.warning(
                    "no backend answers yet; waiting for one", backends=[*self._members]
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, self._probe_interval_s)
        self._probing = asyncio.create_task(self._probe_for_ever(probed))

    async def close(self) -> None:
        """Stops probing and closes connections."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
        for member in self._members.values():
            await member.backend.close()

    def choose(self, model: ModelSettings) -> Member:
        """The backend to ask: of those in the best health, the least busy."""
        members = [self._members[name] for name in model.backends if name in self._members]
        if not members:
            raise UnavailableError(f"no backend offers {model.name} now", reason="NO_BACKEND")
        return min(members, key=lambda each: (each.health.value, each.running))

    @contextlib.contextmanager
    def at_work(self, member: Member, model: str) -> Iterator[None]:
        """Counts a request on a backend, and learns from its outcome."""
        load = self._loads.setdefault(model, ModelLoad())
        began = time.monotonic()
        member.running += 1
        load.running += 1
        try:
            yield
        except MeshError as error:
            if error.code is grpc.StatusCode.UNAVAILABLE:
                member.failed()
            raise
        else:
            member.worked()
            load.latencies_s.append(time.monotonic() - began)
        finally:
            member.running -= 1
            load.running -= 1

    def load(self, model: str) -> ModelLoad:
        """What a model is doing."""
        return self._loads.get(model) or ModelLoad()

    def health(self, model: ModelSettings) -> Health:
        """Whether a model can be used now."""
        found = {self._members[name].health for name in model.backends if name in self._members}
        if not found or found == {Health.UNAVAILABLE}:
            return Health.UNAVAILABLE
        if len(found) == 1:
            return found.pop()
        if found <= {Health.READY, Health.UNKNOWN}:
            return Health.READY
        return Health.DEGRADED

    async def _probe_for_ever(self, members: Sequence[Member]) -> None:
        while True:
            await asyncio.sleep(self._probe_interval_s)
            await self._probe(members)

    async def _probe(self, members: Sequence[Member]) -> bool:
        """Asks backends for their models; whether any answered."""
        answered = await asyncio.gather(*map(self._ask, members))
        if self._discover and any(answered):
            self._catalogue.discovered(self._listed)
        return any(answered)

    async def _ask(self, member: Member) -> bool:
        before = member.health
        try:
            self._listed[member.backend.name] = await member.backend.list_models()
        except MeshError as error:
            member.failed()
            if member.failures == 1:
                self._log.warning(
                    "backend does not answer",
                    backend=member.backend.name,
                    reason=error.reason,
                    error=error.message,
                )
            return False
        member.worked()
        if before is not Health.READY:
            self._log.info(
                "backend answers",
                backend=member.backend.name,
                models=len(self._listed[member.backend.name]),
            )
        return True
