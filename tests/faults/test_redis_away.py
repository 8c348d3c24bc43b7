"""Redis killed, restarted, paused, cut off and silent: calls fail fast and all comes back."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import pytest
import structlog
from redis.crc import key_slot
from support.cutting_proxy import CuttingProxy
from support.polling import eventually
from support.redis_servers import RedisClusterServers, RedisServer

from agent360.mesh.runtime.redis import (
    Command,
    Redis,
    RedisAwayError,
    RedisSettings,
    Subscription,
)

FAST_S = 0.05
BACK_S = 1.0
FOLLOWED_S = 0.5
"""Redirections are followed for timeout_s; the last exchange may take as long."""


@asynccontextmanager
async def client(url: str, **settings: Any) -> AsyncIterator[Redis]:
    redis = Redis(url, RedisSettings(**settings), structlog.get_logger())
    try:
        async with asyncio.timeout(10):
            await redis.start()
        yield redis
    finally:
        await redis.close()


@dataclass
class Ear:
    """What a subscription tells."""

    redis: Redis
    told: list[str] = field(default_factory=list)
    messages: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.subscription = Subscription(
            self.redis,
            [b"c"],
            on_message=lambda _, message: self.messages.append(message),
            on_up=lambda: self.told.append("up"),
            on_down=lambda _: self.told.append("down"),
        )

    async def __aenter__(self) -> Self:
        async with asyncio.timeout(10):
            await self.subscription.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.subscription.close()


def get(key: bytes = b"k") -> Command:
    return Command(key, ("GET", key))


def put(key: bytes = b"k", value: bytes = b"v") -> Command:
    return Command(key, ("SET", key, value))


def is_away(reply: Any) -> bool:
    return isinstance(reply, RedisAwayError)


async def timed(redis: Redis, *commands: Command) -> tuple[list[Any], float]:
    """The replies and how long they took."""
    started = time.monotonic()
    replies = await redis.run(commands or [get()])
    return replies, time.monotonic() - started


# ---------------------------------------------------------------- killed and restarted


async def test_while_a_killed_server_is_away_calls_fail_fast_and_a_restarted_one_is_found() -> None:
    async with RedisServer(persistent=True) as server, client(server.url) as redis:
        changes: list[bool] = []
        redis.on_change(changes.append)
        await redis.run([put()])
        await server.kill()
        for _ in range(20):
            (reply,), took_s = await timed(redis)
            assert is_away(reply)
            assert took_s < FAST_S
        await eventually(lambda: not redis.available)
        round_trips = redis.counts.round_trips
        for _ in range(20):
            (reply,), took_s = await timed(redis, put())
            assert is_away(reply)
            assert not reply.sent
            assert took_s < FAST_S
        assert redis.counts.round_trips == round_trips, "the breaker touches no network"
        await server.start()
        started = time.monotonic()
        await eventually(lambda: redis.available)
        assert await redis.run([get()]) == [b"v"]
        assert time.monotonic() - started < BACK_S
        assert changes == [False, True]
        assert redis.counts.errors["away"] >= 20


async def test_a_restart_between_two_calls_is_not_noticed_by_repeatable_ones() -> None:
    async with RedisServer(persistent=True) as server, client(server.url, probe_s=0.02) as redis:
        await redis.run([put()])
        for _ in range(3):
            await server.kill()
            await server.start()
            await eventually(lambda: redis.available)
            assert await redis.run([get()], repeatable=True) == [b"v"]


async def test_repeatable_calls_survive_connections_that_are_cut_and_others_say_so() -> None:
    async with RedisServer() as server, CuttingProxy(server.address) as proxy:
        settings = {"wait_timeout_s": 2.0, "timeout_s": 2.0, "min_connections": 4}
        async with client(f"redis://{proxy.address}", **settings) as redis:
            (backend,) = redis.topology.servers
            for repeatable in (True, False):
                await eventually(lambda: backend.pool.idle == 4)
                proxy.hold_answers()
                calls = [
                    asyncio.create_task(redis.run([put()], repeatable=repeatable)) for _ in range(4)
                ]
                await eventually(lambda: backend.pool.in_use == 4)
                proxy.cut()
                proxy.release()
                replies = [reply for replies in await asyncio.gather(*calls) for reply in replies]
                if repeatable:
                    assert replies == [b"OK"] * 4
                else:
                    assert all(is_away(reply) and reply.sent for reply in replies)
            assert redis.available
            assert await redis.run([put()]) == [b"OK"]


async def test_a_server_that_loads_its_data_counts_as_away_until_it_has() -> None:
    async with (
        RedisServer("--enable-debug-command", "local", persistent=True) as server,
        client(server.url) as redis,
    ):
        await redis.run([put(b"k%d" % n, b"v" * 1_000) for n in range(200)])
        await server.command("CONFIG", "SET", "key-load-delay", "10000")
        await server.command("CONFIG", "SET", "loading-process-events-interval-bytes", "1024")
        reloading = asyncio.create_task(server.command("DEBUG", "RELOAD"))
        saw_away = False
        while not reloading.done():
            (reply,), took_s = await timed(redis, get(b"k1"))
            assert is_away(reply) or reply == b"v" * 1_000
            assert took_s < 1.0
            saw_away = saw_away or is_away(reply)
            await asyncio.sleep(0.01)
        await reloading
        assert saw_away
        await eventually(lambda: redis.available)
        assert await redis.run([get(b"k1")]) == [b"v" * 1_000]


async def test_a_client_that_starts_before_its_server_waits_for_it() -> None:
    async with RedisServer() as server:
        await server.kill()
        redis = Redis(server.url, RedisSettings(), structlog.get_logger())
        changes: list[bool] = []
        redis.on_change(changes.append)
        starting = asyncio.create_task(redis.start())
        await eventually(lambda: redis.topology.servers[0].away)
        assert not starting.done()
        await server.start()
        async with asyncio.timeout(BACK_S):
            await starting
        assert redis.available
        assert changes == []
        await redis.close()


# ---------------------------------------------------------------- silent


async def test_a_black_hole_costs_a_few_timeouts_then_nothing() -> None:
    async with (
        RedisServer() as server,
        CuttingProxy(server.address) as proxy,
        client(f"redis://{proxy.address}", timeout_s=0.1) as redis,
    ):
        proxy.hold_answers()
        for _ in range(3):
            (reply,), took_s = await timed(redis)
            assert is_away(reply)
            assert took_s < 0.1 + 0.25 + FAST_S
        await eventually(lambda: not redis.available)
        for _ in range(20):
            (reply,), took_s = await timed(redis)
            assert is_away(reply)
            assert not reply.sent
            assert took_s < FAST_S
        proxy.release()
        started = time.monotonic()
        await eventually(lambda: redis.available)
        assert time.monotonic() - started < BACK_S
        assert await redis.run([put(), get()]) == [b"OK", b"v"]


async def test_answers_that_come_after_the_timeout_are_nobodys() -> None:
    async with RedisServer() as server, CuttingProxy(server.address) as proxy:
        settings = {"timeout_s": 0.05, "failures": 1_000, "wait_timeout_s": 2.0}
        async with client(f"redis://{proxy.address}", **settings) as redis:
            for number in range(8):
                proxy.hold_answers()
                text = str(number)
                late = asyncio.create_task(redis.run([Command(b"", ("ECHO", f"late {text}"))]))
                (reply,) = await late
                assert is_away(reply)
                proxy.release()
                (own,) = await redis.run([Command(b"", ("ECHO", text))])
                assert own == text.encode()


async def test_a_paused_server_is_away_and_back_when_it_goes_on() -> None:
    async with RedisServer() as server, client(server.url, timeout_s=0.1) as redis:
        server.pause()
        replies = await asyncio.gather(*(redis.run([get()]) for _ in range(10)))
        assert all(is_away(reply) for (reply,) in replies)
        assert not redis.available
        server.resume()
        started = time.monotonic()
        await eventually(lambda: redis.available)
        assert time.monotonic() - started < BACK_S


async def test_a_server_whose_network_flaps_answers_each_caller_its_own_or_says_away() -> None:
    async with (
        RedisServer() as server,
        CuttingProxy(server.address) as proxy,
        client(f"redis://{proxy.address}", wait_timeout_s=1.0) as redis,
    ):
        stop = asyncio.Event()
        answered = 0

        async def ask(caller: int) -> None:
            nonlocal answered
            number = 0
            while not stop.is_set():
                number += 1
                sent = [f"{caller}:{number}:{part}" for part in range(3)]
                replies = await redis.run(
                    [Command(b"", ("ECHO", text)) for text in sent], repeatable=True
                )
                if all(is_away(reply) for reply in replies):
                    await asyncio.sleep(0.005)
                    continue
                assert replies == [text.encode() for text in sent]
                answered += 1

        asking = [asyncio.create_task(ask(caller)) for caller in range(16)]
        for round_number in range(10):
            await asyncio.sleep(0.02)
            proxy.cut()
            if round_number % 3 == 0:
                await proxy.go_away()
                await asyncio.sleep(0.02)
                await proxy.come_back()
        await eventually(lambda: redis.available)
        seen = answered
        await eventually(lambda: answered > seen)
        stop.set()
        await asyncio.gather(*asking)


async def test_what_does_not_speak_redis_is_given_up() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 3)
        await reader.read()
        writer.close()

    listener = await asyncio.start_server(babble, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    redis = Redis(f"redis://127.0.0.1:{port}", RedisSettings(), structlog.get_logger())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await redis.start()
    assert not redis.available
    await redis.close()
    listener.close()


# ---------------------------------------------------------------- clusters


async def test_a_killed_server_of_a_cluster_takes_only_its_own_keys_away() -> None:
    options = ("--cluster-require-full-coverage", "no")
    async with RedisClusterServers(*options) as cluster, client(cluster.url) as redis:
        changes: list[bool] = []
        redis.on_change(changes.append)
        keys = [b"key:%d" % n for n in range(30)]
        await redis.run([put(key, key) for key in keys])
        await cluster.servers[1].kill()
        lost = {key for key in keys if key_slot(key) * 3 // 16_384 == 1}
        assert lost
        for _ in range(10):
            replies, took_s = await timed(redis, *(get(key) for key in keys))
            assert took_s < 0.25 + FAST_S
            for key, reply in zip(keys, replies, strict=True):
                assert is_away(reply) if key in lost else reply == key
        assert changes == [False]
        await cluster.servers[1].start()
        await eventually(lambda: redis.available)
        await cluster.until("ok")
        again = await redis.run([put(key, key) for key in keys])
        assert again == [b"OK"] * 30
        assert changes == [False, True]


async def test_a_cluster_that_says_it_is_down_is_away_and_comes_back() -> None:
    async with RedisClusterServers() as cluster, client(cluster.url) as redis:
        await cluster.servers[0].kill()
        await cluster.until("fail", cluster.servers[1])
        key = next(b"k%d" % n for n in range(100) if key_slot(b"k%d" % n) * 3 // 16_384 == 1)
        for _ in range(5):
            (reply,), took_s = await timed(redis, get(key))
            assert is_away(reply)
            assert not reply.sent
            assert took_s < FOLLOWED_S + FAST_S
        await cluster.servers[0].start()
        await cluster.until("ok")
        assert await redis.run([put(key)]) == [b"OK"]


# ---------------------------------------------------------------- subscriptions


async def test_a_subscription_tells_its_loss_once_and_returns_with_the_server() -> None:
    async with RedisServer() as server, client(server.url) as redis, Ear(redis) as ear:
        await server.kill()
        await eventually(lambda: ear.told == ["up", "down"])
        assert not ear.subscription.up
        await eventually(lambda: not redis.available)
        await server.start()
        started = time.monotonic()
        await eventually(lambda: ear.subscription.up)
        assert time.monotonic() - started < BACK_S
        await redis.run([Command(b"", ("PUBLISH", b"c", b"again"))])
        await eventually(lambda: ear.messages == [b"again"])
        assert ear.told == ["up", "down", "up"]


async def test_a_subscription_that_hears_nothing_is_down_in_time() -> None:
    async with RedisServer() as server, CuttingProxy(server.address) as proxy:
        settings = {"subscription_ping_s": 0.1, "subscription_timeout_s": 0.3}
        async with client(f"redis://{proxy.address}", **settings) as redis, Ear(redis) as ear:
            proxy.hold_answers()
            started = time.monotonic()
            await eventually(lambda: ear.told == ["up", "down"])
            assert 0.1 < time.monotonic() - started < 0.3 + 0.15
            proxy.release()
            started = time.monotonic()
            await eventually(lambda: ear.subscription.up)
            assert time.monotonic() - started < BACK_S
            await redis.run([Command(b"", ("PUBLISH", b"c", b"again"))], repeatable=True)
            await eventually(lambda: ear.messages == [b"again"])
            assert ear.told == ["up", "down", "up"]


async def test_a_subscription_in_a_cluster_goes_on_without_a_server_that_is_away() -> None:
    options = ("--cluster-require-full-coverage", "no")
    async with (
        RedisClusterServers(*options) as cluster,
        client(cluster.url) as redis,
        Ear(redis) as ear,
    ):
        await cluster.servers[0].kill()
        started = time.monotonic()
        await eventually(lambda: ear.told == ["up", "down", "up"])
        assert time.monotonic() - started < BACK_S
        replies = await redis.each_server("PUBLISH", b"c", b"hello")
        assert sum(not is_away(reply) for reply in replies) == 2
        await eventually(lambda: ear.messages == [b"hello"] * 4)
