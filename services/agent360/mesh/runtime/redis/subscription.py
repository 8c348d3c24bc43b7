"""Channels listened to on connections of their own, and the certainty that these are alive."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from hiredis import ProtocolError
from redis.exceptions import RedisError

from agent360.mesh.runtime.redis.client import Redis
from agent360.mesh.runtime.redis.commands import pack_command
from agent360.mesh.runtime.redis.connection import UNFINISHED, Wire
from agent360.mesh.runtime.redis.failures import UnwillingError
from agent360.mesh.runtime.redis.server import Server
from agent360.mesh.runtime.redis.tasks import Tasks

_PING: Final = b"*1\r\n$4\r\nPING\r\n"
_RETRY_S: Final = 0.1
_MIN_PAUSE_S: Final = 0.01


class Subscription:
    """Hears what is published on some channels, and says when it may have missed something.

    Between ``on_up`` and ``on_down`` nothing that reached the servers is missed; whoever keeps what
    messages are about distrusts it from ``on_down`` until the next ``on_up``.

    In a cluster it listens to every primary that is there. What is published on one is heard from
    it at once and from each of the others once more, after it has crossed the cluster's bus (which
    may take 40 ms, and loses messages when a link of it breaks): messages of one server come in
    their order, and again later. Who listens tells the copies by what is in them.

    Example:
        >>> subscription = Subscription(
        ...     redis, [b"removals"], on_message=remove, on_up=trust, on_down=distrust
        ... )
        >>> await subscription.start()
        >>> await subscription.close()
    """

    def __init__(
        self,
        redis: Redis,
        channels: Sequence[bytes],
        *,
        on_message: Callable[[bytes, bytes], None],
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
    ) -> None:
        """Prepares a subscription.

        Args:
            redis: a client that was started.
            channels: to listen to, at least one.
            on_message: told the channel and what was published.
            on_up: called when it listens, before any message.
            on_down: told once of each loss, with the reason.
        """
        self._redis = redis
        self._channels = tuple(channels)
        self._on_message = on_message
        self._on_up = on_up
        self._on_down = on_down
        self._log = redis.log
        self._tasks = Tasks(redis.log)
        self._attended: set[Server] = set()
        self._listened_to: set[Server] = set()
        self._look = asyncio.Event()
        self._listening = asyncio.Event()
        self.up = False
        """Whether it listens to every server that is there."""

    async def start(self) -> None:
        """Subscribes; returns when it listens, keeps trying until then."""
        self._tasks.spawn(self._keep_listening())
        await self._listening.wait()

    async def close(self) -> None:
        """Ends it; that is not a loss."""
        self.up = False
        await self._tasks.close()

    async def _keep_listening(self) -> None:
        """Attends to each server that is there, also to those that come later."""
        while True:
            for server in self._there():
                if server not in self._attended:
                    self._attended.add(server)
                    self._tasks.spawn(self._attend(server))
            self._judge("a server is back")
            self._look.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_S):
                    await self._look.wait()

    async def _attend(self, server: Server) -> None:
        try:
            await self._listen(server)
            await asyncio.sleep(_RETRY_S * random.uniform(0.8, 1.2))
        finally:
            self._attended.discard(server)
            self._look.set()

    def _there(self) -> list[Server]:
        return [server for server in self._redis.topology.servers if not server.away]

    async def _listen(self, server: Server) -> None:
        """Listens to a server until it is lost."""
        ear = _Ear(server.address, self._hears, lambda: self._listens(server))
        try:
            await self._redis.dialer.dial(server.endpoint, ear)
        except (OSError, UnwillingError) as error:
            self._log.debug("not subscribed", server=server.address, reason=str(error))
            return
        reason = "closed"
        try:
            ear.subscribe(self._channels)
            reason = await self._until_lost(server, ear)
        finally:
            ear.close()
            self._listened_to.discard(server)
            self._judge(f"{server.address}: {reason}")
            await asyncio.wait((ear.closed,), timeout=_RETRY_S)

    async def _until_lost(self, server: Server, ear: _Ear) -> str:
        settings = self._redis.settings
        while True:
            left_s = settings.subscription_timeout_s - ear.silent_s
            pause_s = min(settings.subscription_ping_s, max(left_s, _MIN_PAUSE_S))
            done, _ = await asyncio.wait((ear.closed,), timeout=pause_s)
            if done:
                return ear.reason
            if ear.silent_s >= settings.subscription_timeout_s:
                return f"nothing heard for {settings.subscription_timeout_s} s"
            if server not in self._redis.topology.servers:
                return "the server left the cluster"
            ear.ping()

    def _listens(self, server: Server) -> None:
        self._listened_to.add(server)
        self._judge("")

    def _judge(self, reason: str) -> None:
        """Compares who is listened to with who is there, and tells of a change."""
        there = self._there()
        whole = bool(there) and self._listened_to.issuperset(there)
        if whole and not self.up:
            self.up = True
            self._log.info("subscribed", channels=len(self._channels), servers=len(there))
            self._call("up", self._on_up)
            self._listening.set()
        elif self.up and not whole:
            self.up = False
            self._log.warning("subscription lost", reason=reason)
            self._call("down", lambda: self._on_down(reason))

    def _hears(self, channel: bytes, message: bytes) -> None:
        if self.up:
            self._call("message", lambda: self._on_message(channel, message))

    def _call(self, what: str, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:  # noqa: BLE001 - it is logged; the other messages must be heard
            self._log.exception("a listener to a subscription failed", callback=what)


class _Ear(Wire):
    """A connection in the state of a subscriber (RESP2)."""

    def __init__(
        self,
        address: str,
        on_message: Callable[[bytes, bytes], None],
        on_subscribed: Callable[[], None],
    ) -> None:
        super().__init__(address, asyncio.get_running_loop())
        self._on_message = on_message
        self._on_subscribed = on_subscribed
        self._missing = 0
        self.reason = "closed by the server"
        """Why the connection is closed."""

    @property
    def silent_s(self) -> float:
        """How long ago something was last received, in seconds."""
        return self.loop.time() - self.heard_at

    def subscribe(self, channels: Sequence[bytes]) -> None:
        """Subscribes; the confirmations of one SUBSCRIBE come before any message."""
        self.heard_at = self.loop.time()
        self._missing = len(channels)
        self._send(pack_command(("SUBSCRIBE", *channels)))

    def ping(self) -> None:
        """Asks for a sign of life."""
        self._send(_PING)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self.heard_at = self.loop.time()
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not UNFINISHED:
                if not self.usable:
                    return
                self._take(reply)
        except (ProtocolError, RedisError) as error:
            self._refuse(f"it does not speak RESP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        if error is not None:
            self.reason = str(error)
        super().connection_lost(error)

    def _take(self, reply: object) -> None:
        match reply:
            case [b"message", bytes(channel), bytes(message)]:
                self._on_message(channel, message)
            case [b"subscribe", *_]:
                self._missing -= 1
                if self._missing == 0:
                    self._on_subscribed()
            case Exception():
                self._refuse(str(reply))
            case _:
                pass  # the answer to a ping

    def _refuse(self, reason: str) -> None:
        self.reason = reason
        self.close()

    def _send(self, data: bytes) -> None:
        if self._transport is not None and self.usable:
            self._transport.write(data)
