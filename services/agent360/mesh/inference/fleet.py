"""The backends of a service: which of them there are, which work, and how busy they are."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

import grpc
import structlog

from agent360.client.errors import MeshError, UnavailableError
from agent360.mesh.inference.catalogue import Catalogue
from agent360.mesh.inference.members import Health, Member, ModelLoad
from agent360.mesh.inference.probing import Prober
from agent360.mesh.inference.settings import ModelSettings

_WAITING_TOLD_AFTER_S: Final = 1.0


class Fleet:
    """Starts, watches, counts on and closes backends.

    Example:
        >>> fleet = Fleet(members, catalogue, log, discover=False, probe_interval_s=10)
        >>> await fleet.start()
        >>> member = selector.choose(model, fleet.members(model), ticket)
        >>> with fleet.at_work(member, model.name, ticket.tokens):
        ...     await member.backend.generate(prompt, model.upstream_name, sink, streamed=True)
    """

    def __init__(
        self,
        members: Sequence[Member],
        catalogue: Catalogue,
        log: structlog.stdlib.BoundLogger,
        *,
        discover: bool,
        probe_interval_s: float,
        probe_timeout_s: float = 5.0,
    ) -> None:
        self._members: Mapping[str, Member] = {each.name: each for each in members}
        self._catalogue = catalogue
        self._log = log
        self._prober = Prober(
            catalogue,
            log,
            discover=discover,
            interval_s=probe_interval_s,
            timeout_s=probe_timeout_s,
        )
        self._loads: dict[str, ModelLoad] = {}
        self._watchers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Connects; returns when a backend is ready, or at once if there is none.

        One that is not probed is taken to be ready, once it has run the warm-ups of its models.
        """
        for member in self._members.values():
            await member.backend.start()
        if not self._members:
            return
        ready = asyncio.Event()
        any_probed = any(member.probed for member in self._members.values())
        self._watchers = [
            asyncio.create_task(
                self._prober.watch(member, ready if member.probed or not any_probed else None)
            )
            for member in self._members.values()
        ]
        told = asyncio.get_running_loop().call_later(_WAITING_TOLD_AFTER_S, self._tell_waiting)
        try:
            await ready.wait()
        finally:
            told.cancel()

    async def close(self) -> None:
        """Stops probing and closes connections."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for member in self._members.values():
            await member.backend.close()

    def catalogue_changed(self) -> None:
        """Has the warm-ups of models that are new run."""
        known = {model.name for model in self._catalogue.models}
        for gone in self._loads.keys() - known:
            if not self._loads[gone].running:
                del self._loads[gone]
        for member in self._members.values():
            member.warm &= known
            member.look.set()

    def members(
        self, model: ModelSettings, excluding: Collection[str] = frozenset()
    ) -> list[Member]:
        """The backends of a model, whatever their health, without those that were tried already.

        Raises:
            UnavailableError: none is left.
        """
        found = [each for each in self.known_members(model) if each.name not in excluding]
        if not found:
            raise UnavailableError(f"no backend offers {model.name} now", reason="NO_BACKEND")
        return found

    def known_members(self, model: ModelSettings) -> list[Member]:
        """The backends of a model, in the order of its settings; there may be none."""
        return [self._members[name] for name in model.backends if name in self._members]

    @contextlib.contextmanager
    def at_work(self, member: Member, model: str, tokens: int = 0) -> Iterator[None]:
        """Counts a request of about so many tokens on a backend, and learns from its outcome."""
        load = self._loads.setdefault(model, ModelLoad())
        began = time.monotonic()
        member.running += 1
        member.outstanding_tokens += tokens
        load.running += 1
        try:
            yield
        except MeshError as error:
            if error.code is grpc.StatusCode.UNAVAILABLE:
                unreachable = error.reason == "UPSTREAM_UNREACHABLE"
                member.failed(time.monotonic(), at_work=not unreachable)
            raise
        else:
            now = time.monotonic()
            member.worked(now, now - began)
            load.latencies_s.append(now - began)
        finally:
            member.running -= 1
            member.outstanding_tokens -= tokens
            load.running -= 1

    def load(self, model: str) -> ModelLoad:
        """What a model is doing."""
        return self._loads.get(model) or ModelLoad()

    def health(self, model: ModelSettings) -> Health:
        """Whether a model can be used now."""
        found = {member.health_of(model) for member in self.known_members(model)}
        if not found or found == {Health.UNAVAILABLE}:
            return Health.UNAVAILABLE
        if len(found) == 1:
            return found.pop()
        if found <= {Health.READY, Health.UNKNOWN, Health.WARMING}:
            return Health.READY if Health.READY in found else Health.WARMING
        return Health.DEGRADED

    def _tell_waiting(self) -> None:
        self._log.warning("no backend is ready yet; waiting for one", backends=[*self._members])
