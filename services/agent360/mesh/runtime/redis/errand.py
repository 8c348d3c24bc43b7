"""Carrying out commands that go to several servers, or need more than one round trip."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)

from agent360.mesh.runtime.redis.commands import Command, pack
from agent360.mesh.runtime.redis.connection import Exchange
from agent360.mesh.runtime.redis.counts import Counts
from agent360.mesh.runtime.redis.failures import RedisAwayError
from agent360.mesh.runtime.redis.script import Script
from agent360.mesh.runtime.redis.server import Server
from agent360.mesh.runtime.redis.topology import Cluster, Topology

_MAX_ROUNDS: Final = 16
_PROMPT_ROUNDS: Final = 3
_PAUSE_S: Final = 0.005
_MAX_PAUSE_S: Final = 0.04
_REDIRECTIONS: Final = (AskError, ClusterDownError, TryAgainError)
_ASKING: Final = Command(b"", ("ASKING",))


@dataclass(slots=True)
class _Lot:
    """Commands for one server that go out as one, after preliminaries whose replies are dropped."""

    server: Server
    indexes: list[int] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Where among the replies those of ``indexes`` are."""

    def add(self, index: int, command: Command, before: Command | None = None) -> None:
        """Adds a command."""
        if before is not None:
            self.commands.append(before)
        self.places.append(len(self.commands))
        self.indexes.append(index)
        self.commands.append(command)


class Errand:
    """A list of commands on its way to its replies."""

    def __init__(
        self,
        commands: Sequence[Command],
        topology: Topology,
        scripts: Mapping[str, Script],
        counts: Counts,
        *,
        repeatable: bool,
        timeout_s: float,
    ) -> None:
        """Takes commands.

        Args:
            commands: in the order in which their replies are wanted.
            topology: says where they go.
            scripts: the known ones by hash.
            counts: where error replies are counted.
            repeatable: whether they may be sent again when a connection was lost.
            timeout_s: how long redirections are followed.
        """
        self.replies: list[Any] = [None] * len(commands)
        """The replies, in the order of the commands."""
        self._commands = commands
        self._topology = topology
        self._scripts = scripts
        self._counts = counts
        self._repeats = 1 if repeatable else 0
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._next: dict[tuple[Server, bool], _Lot] = {}
        self._loaded: set[tuple[Server, str]] = set()
        self._pause_s = 0.0
        self._round = 0
        self._was_down = False

    async def run(self) -> list[Any]:
        """Carries the commands out from the beginning."""
        for index in range(len(self._commands)):
            self._route(index)
        return await self._rounds()

    async def go_on(self, server: Server, exchange: Exchange) -> list[Any]:
        """Goes on after a first round trip with all commands to one server."""
        lot = _Lot(server)
        for index, command in enumerate(self._commands):
            lot.add(index, command)
        self._sort(lot, exchange.answer.result())
        self._repeats = 0
        return await self._rounds()

    async def _rounds(self) -> list[Any]:
        while self._next and self._round < _MAX_ROUNDS:
            self._round += 1
            if self._pause_s:
                await asyncio.sleep(self._pause_s)
                self._pause_s = 0.0
            lots, self._next = list(self._next.values()), {}
            self._loaded.clear()
            exchanges = [lot.server.submit(pack(lot.commands), len(lot.commands)) for lot in lots]
            try:
                outcomes = [await exchange.answer for exchange in exchanges]
            except asyncio.CancelledError:
                for exchange in exchanges:
                    exchange.answer.cancel()  # what still waits for a connection is not sent
                raise
            for lot, outcome in zip(lots, outcomes, strict=True):
                self._sort(lot, outcome)
            self._repeats = 0
        for lot in self._next.values():
            for index in lot.indexes:
                self._fail(index, "it was redirected, or its script forgotten, too often")
        if self._next and self._was_down and isinstance(self._topology, Cluster):
            self._topology.is_down = True
        self._count_errors()
        return self.replies

    # ---------------------------------------------------------------- sorting replies

    def _sort(self, lot: _Lot, outcome: list[Any] | RedisAwayError) -> None:
        if isinstance(outcome, RedisAwayError):
            for index in lot.indexes:
                self.replies[index] = outcome
                if outcome.lost and self._repeats:
                    self._route(index)
            if isinstance(self._topology, Cluster) and outcome.sent:
                self._topology.refresh_soon()
            return
        for index, place in zip(lot.indexes, lot.places, strict=True):
            reply = self.replies[index] = outcome[place]
            if isinstance(reply, Exception):
                self._mend(lot.server, index, reply)

    def _mend(self, server: Server, index: int, error: Exception) -> None:
        """Sees to a command that was not carried out."""
        if isinstance(error, NoScriptError):
            self._load_script(server, index)
        elif not isinstance(error, ResponseError):
            server.unwilling(str(error))
            self._fail(index, f"{server.address}: {error}")
        elif isinstance(error, ReadOnlyError):
            server.demoted()
        elif isinstance(self._topology, Cluster) and isinstance(error, _REDIRECTIONS):
            self._follow(self._topology, server, index, error)

    def _follow(self, cluster: Cluster, server: Server, index: int, error: Exception) -> None:
        """Follows a redirection, or waits a little where there is nowhere to go yet."""
        in_time = asyncio.get_running_loop().time() + _MAX_PAUSE_S < self._deadline
        if isinstance(error, ClusterDownError):
            cluster.refresh_soon()
            self._was_down = True
            if cluster.is_down or not in_time:
                cluster.is_down = True
                self._fail(index, f"the cluster is down: {error}")
            else:
                self._later(index)
        elif not in_time:
            self._fail(index, "the cluster redirected it for too long")
        elif isinstance(error, MovedError):
            self._again(cluster.moved(error, server), index)
            self._hold_back(_PROMPT_ROUNDS)
        elif isinstance(error, AskError):
            self._again(cluster.named(error, server), index, _ASKING)
            self._hold_back(_PROMPT_ROUNDS)
        else:
            self._later(index)

    def _load_script(self, server: Server, index: int) -> None:
        arguments = self._commands[index].arguments
        script = self._scripts.get(str(arguments[1])) if arguments[0] == "EVALSHA" else None
        if script is None:
            return
        load = None
        if (server, script.sha) not in self._loaded:
            self._loaded.add((server, script.sha))
            load = Command(b"", ("SCRIPT", "LOAD", script.source))
        self._again(server, index, load)

    # ---------------------------------------------------------------- what to do next

    def _route(self, index: int) -> None:
        command = self._commands[index]
        server = self._topology.route(command.key)
        if server is None:
            self._fail(index, "no server of the cluster has its slot")
        else:
            self._again(server, index)

    def _later(self, index: int) -> None:
        self._route(index)
        self._hold_back(0)

    def _hold_back(self, rounds: int) -> None:
        """Has the next round wait if there were some already: the servers do not agree yet."""
        if self._round >= rounds:
            self._pause_s = min(_PAUSE_S * 2**self._round, _MAX_PAUSE_S)

    def _again(self, server: Server, index: int, before: Command | None = None) -> None:
        asking = before is _ASKING
        lot = self._next.get((server, asking))
        if lot is None:
            lot = self._next[server, asking] = _Lot(server)
        lot.add(index, self._commands[index], before)

    def _fail(self, index: int, reason: str) -> None:
        self.replies[index] = RedisAwayError(reason, sent=False)

    def _count_errors(self) -> None:
        errors = sum(isinstance(reply, ResponseError) for reply in self.replies)
        if errors:
            self._counts.errors["reply"] += errors
