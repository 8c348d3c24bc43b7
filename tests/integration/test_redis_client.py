"""The Redis client against real servers: pipelines, the pool, scripts, clusters, subscriptions."""

import asyncio
import contextvars
import gc
import random
import ssl
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import trustme
from prometheus_client import CollectorRegistry, generate_latest
from redis.crc import key_slot
from redis.exceptions import ResponseError
from support.cutting_proxy import CuttingProxy
from support.polling import eventually
from support.redis_servers import RedisClusterServers, RedisServer, free_port

from agent360.mesh.runtime.redis import (
    Command,
    Redis,
    RedisAwayError,
    RedisCollector,
    RedisSettings,
    Subscription,
)

GET_AND_SET = (
    "local old = redis.call('GET', KEYS[1]) redis.call('SET', KEYS[1], ARGV[1]) return old"
)


@asynccontextmanager
async def client(url: str, **settings: Any) -> AsyncIterator[Redis]:
    redis = Redis(url, RedisSettings(**settings), structlog.get_logger())
    try:
        async with asyncio.timeout(10):
            await redis.start()
        yield redis
    finally:
        await redis.close()


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    async with RedisServer() as started:
        yield started


def put(key: bytes, value: bytes | int) -> Command:
    return Command(key, ("SET", key, value))


def get(key: bytes) -> Command:
    return Command(key, ("GET", key))


def echo(value: str) -> Command:
    return Command(b"", ("ECHO", value))


def in_use(redis: Redis) -> int:
    return sum(server.pool.in_use for server in redis.topology.servers)


def idle(redis: Redis) -> int:
    return sum(server.pool.idle for server in redis.topology.servers)


async def connected_clients(server: RedisServer) -> int:
    """Connections to a server but for the one that asks."""
    return int((await server.info("clients"))["connected_clients"]) - 1


# ---------------------------------------------------------------- pipelines


async def test_replies_come_in_the_order_of_the_commands_in_one_round_trip(
    server: RedisServer,
) -> None:
    async with client(server.url) as redis:
        before = redis.counts.round_trips
        replies = await redis.run(
            [
                put(b"k", b"v"),
                get(b"k"),
                Command(b"n", ("INCRBY", b"n", 5)),
                Command(b"f", ("INCRBYFLOAT", "f", 1.5)),
                get(b"missing"),
                Command(b"k", ("MGET", b"k", b"missing")),
                get(b"n"),
            ]
        )
        assert replies == [b"OK", b"v", 5, b"1.5", None, [b"v", None], b"5"]
        assert redis.counts.round_trips == before + 1
        assert await redis.run([]) == []


async def test_an_error_reply_stands_in_its_place_among_the_others(server: RedisServer) -> None:
    async with client(server.url) as redis:
        stored, error, value = await redis.run(
            [put(b"k", b"v"), Command(b"k", ("LPUSH", b"k", b"x")), get(b"k")]
        )
        assert (stored, value) == (b"OK", b"v")
        assert isinstance(error, ResponseError)
        assert "WRONGTYPE" in str(error)
        assert redis.counts.errors["reply"] == 1


async def test_after_a_server_has_become_a_replica_it_is_connected_to_anew(
    server: RedisServer,
) -> None:
    async with client(server.url) as redis:
        await server.command("REPLICAOF", "127.0.0.1", "1")
        (error,) = await redis.run([put(b"k", b"v")])
        assert isinstance(error, ResponseError)
        await server.command("REPLICAOF", "NO", "ONE")
        assert await redis.run([put(b"k", b"v")]) == [b"OK"]
        assert redis.counts.opened > 1
        assert redis.available


async def test_after_close_calls_fail_at_once(server: RedisServer) -> None:
    async with client(server.url) as redis:
        pass
    started = time.monotonic()
    (reply,) = await redis.run([put(b"k", b"v")])
    assert time.monotonic() - started < 0.05
    assert isinstance(reply, RedisAwayError)
    assert "closed" in str(reply)


async def test_large_values_and_many_commands_arrive_whole(server: RedisServer) -> None:
    async with client(server.url, timeout_s=5.0) as redis:
        values = [bytes([n % 256]) * n * 50 for n in range(1_000)]
        keys = [b"k%d" % n for n in range(1_000)]
        await redis.run([put(key, value) for key, value in zip(keys, values, strict=True)])
        assert await redis.run([get(key) for key in keys]) == values
        assert await redis.run([Command(keys[0], ("MGET", *keys))]) == [values]


async def test_the_login_and_the_database_of_the_url_are_used() -> None:
    async with RedisServer(
        "--user", "mesh", "on", ">sesame", "~*", "+@all", "--requirepass", "x"
    ) as server:
        url = f"redis://mesh:sesame@{server.address}/3"
        async with client(url) as redis:
            await redis.run([put(b"k", b"v")])
            (clients,) = await redis.run([Command(b"", ("CLIENT", "INFO"))])
            assert b" db=3 " in clients
            assert b" user=mesh " in clients


async def test_start_waits_with_a_wrong_password_and_never_shows_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with RedisServer("--user", "mesh", "on", ">sesame", "~*", "+@all") as server:
        url = f"redis://mesh:swordfish@{server.address}"
        redis = Redis(url, RedisSettings(probe_s=0.01), structlog.get_logger())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await redis.start()
        assert not redis.available
        await redis.close()
        printed = "".join(capsys.readouterr())
        assert "invalid username-password pair" in printed
        assert "swordfish" not in printed


async def test_connections_are_encrypted_and_the_server_is_verified(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    stranger.cert_pem.write_to_path(tmp_path / "stranger.pem")
    async with RedisServer() as plain:
        tls_port = free_port()
        for name, value in (
            ("tls-cert-file", tmp_path / "cert.pem"),
            ("tls-key-file", tmp_path / "key.pem"),
            ("tls-ca-cert-file", tmp_path / "ca.pem"),
            ("tls-auth-clients", "no"),
            ("tls-port", tls_port),
        ):
            await plain.command("CONFIG", "SET", name, str(value))
        url = f"rediss://127.0.0.1:{tls_port}"
        async with client(url, ca=tmp_path / "ca.pem", connect_timeout_s=2.0) as redis:
            values = [put(b"k", b"v" * 100_000), get(b"k")]
            assert await redis.run(values) == [b"OK", b"v" * 100_000]
        settings = RedisSettings(ca=tmp_path / "stranger.pem", connect_timeout_s=2.0)
        redis = Redis(url, settings, structlog.get_logger())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await redis.start()
        assert "certificate verify failed" in redis.topology.servers[0].away
        await redis.close()
    with pytest.raises((OSError, ssl.SSLError)):
        Redis(url, RedisSettings(ca=tmp_path / "absent.pem"), structlog.get_logger())


# ---------------------------------------------------------------- callers that leave


async def test_a_cancelled_caller_never_shifts_the_replies_of_others(server: RedisServer) -> None:
    """500 callers ask through a slow link and leave at every possible moment."""
    async with (
        CuttingProxy(server.address) as proxy,
        client(f"redis://{proxy.address}", max_connections=4, wait_timeout_s=20.0) as redis,
    ):
        wrong: list[Any] = []

        async def ask(number: int) -> None:
            sent = [f"{number}:{part}" for part in range(1 + number % 4)]
            replies = await redis.run([echo(text) for text in sent])
            if replies != [text.encode() for text in sent]:
                wrong.append((sent, replies))

        async def stutter() -> None:
            while True:
                proxy.hold_answers()
                await asyncio.sleep(0.008)
                proxy.release()
                await asyncio.sleep(0.002)

        stuttering = asyncio.create_task(stutter())
        tasks = [asyncio.create_task(ask(number)) for number in range(500)]
        cancelled = 0
        for task in random.Random(7).sample(tasks, 350):
            await asyncio.sleep(0.001)
            cancelled += task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        stuttering.cancel()
        proxy.release()
        assert cancelled > 50
        assert wrong == []
        assert await redis.run([echo("after")]) == [b"after"]
        await eventually(lambda: in_use(redis) == 0)
        assert redis.counts.opened <= 4, "no connection was given up because a caller left"


async def test_what_a_cancelled_caller_had_sent_is_carried_out(server: RedisServer) -> None:
    async with (
        CuttingProxy(server.address) as proxy,
        client(f"redis://{proxy.address}", timeout_s=5.0) as redis,
    ):
        proxy.hold_answers()
        caller = asyncio.create_task(redis.run([put(b"k", b"v")]))
        await eventually(lambda: in_use(redis) == 1)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        proxy.release()
        await eventually(lambda: in_use(redis) == 0)
        assert await redis.run([get(b"k")]) == [b"v"]
        assert redis.counts.opened == 1


async def test_what_a_cancelled_caller_had_not_sent_yet_is_never_sent(server: RedisServer) -> None:
    settings = {"max_connections": 1, "timeout_s": 5.0, "wait_timeout_s": 5.0}
    async with (
        CuttingProxy(server.address) as proxy,
        client(f"redis://{proxy.address}", **settings) as redis,
    ):
        proxy.hold_answers()
        first = asyncio.create_task(redis.run([get(b"k")]))
        await eventually(lambda: in_use(redis) == 1)
        waits = redis.counts.waits
        second = asyncio.create_task(redis.run([put(b"k", b"v")]))
        await eventually(lambda: redis.counts.waits == waits + 1)
        second.cancel()
        await asyncio.wait((second,))
        proxy.release()
        assert await first == [None]
        assert await redis.run([get(b"k")]) == [None]


async def test_background_tasks_know_nothing_of_the_caller(server: RedisServer) -> None:
    tenant = contextvars.ContextVar("tenant", default="nobody")
    async with client(server.url, max_connections=4) as redis:
        dial, seen = redis.dialer.dial, []

        async def spying_dial(*arguments: Any) -> None:
            seen.append(tenant.get())
            await dial(*arguments)

        redis.dialer.dial = spying_dial  # type: ignore[method-assign]
        tenant.set("acme")
        await asyncio.gather(*(redis.run([echo("x")]) for _ in range(4)))
        assert seen
        assert set(seen) == {"nobody"}


# ---------------------------------------------------------------- the pool


async def test_connections_are_bounded_and_those_who_wait_are_counted(server: RedisServer) -> None:
    async with client(server.url, max_connections=3, wait_timeout_s=10, timeout_s=10) as redis:
        before = redis.counts.waits
        replies = await asyncio.gather(*(redis.run([echo(str(n))]) for n in range(200)))
        assert replies == [[str(n).encode()] for n in range(200)]
        assert idle(redis) == 3
        assert await connected_clients(server) == 3
        assert redis.counts.waits - before >= 197
        assert redis.counts.wait_s > 0


async def test_a_caller_is_told_in_time_when_no_connection_falls_free(server: RedisServer) -> None:
    settings = {"max_connections": 1, "timeout_s": 5.0, "wait_timeout_s": 0.1}
    async with (
        CuttingProxy(server.address) as proxy,
        client(f"redis://{proxy.address}", **settings) as redis,
    ):
        proxy.hold_answers()
        first = asyncio.create_task(redis.run([get(b"k")]))
        await eventually(lambda: in_use(redis) == 1)
        started = time.monotonic()
        (reply,) = await redis.run([put(b"k", b"v")])
        assert 0.1 <= time.monotonic() - started < 0.3
        assert isinstance(reply, RedisAwayError)
        assert not reply.sent
        assert redis.counts.errors["busy"] == 1
        assert redis.available
        proxy.release()
        await first


async def test_more_waiting_than_allowed_fails_at_once(server: RedisServer) -> None:
    settings = {"max_connections": 1, "timeout_s": 5, "wait_timeout_s": 5, "max_waiting": 2}
    async with (
        CuttingProxy(server.address) as proxy,
        client(f"redis://{proxy.address}", **settings) as redis,
    ):
        proxy.hold_answers()
        calls = [asyncio.create_task(redis.run([echo(str(n))])) for n in range(3)]
        await eventually(lambda: in_use(redis) == 1)
        (reply,) = await redis.run([echo("3")])
        assert isinstance(reply, RedisAwayError)
        assert "wait for a connection already" in str(reply)
        proxy.release()
        assert await asyncio.gather(*calls) == [[b"0"], [b"1"], [b"2"]]


async def test_unused_connections_are_closed_down_to_the_least(server: RedisServer) -> None:
    settings = {"min_connections": 2, "max_connections": 6, "max_idle_s": 0.2}
    async with client(server.url, **settings) as redis:
        await asyncio.gather(*(redis.run([echo("x")]) for _ in range(50)))
        assert idle(redis) == 6
        await eventually(lambda: idle(redis) == 2)
        assert redis.counts.closed["idle"] == 4
        assert await connected_clients(server) == 2


async def test_connections_are_replaced_at_their_age_without_a_call_failing(
    server: RedisServer,
) -> None:
    async with client(server.url, min_connections=2, max_lifetime_s=0.1) as redis:
        async with asyncio.timeout(5):
            while redis.counts.closed["lifetime"] < 6:
                assert await redis.run([echo("x")]) == [b"x"]
                await asyncio.sleep(0)
        await eventually(lambda: idle(redis) == 2)
        assert redis.counts.closed.keys() == {"lifetime"}


async def test_the_least_connections_are_opened_and_kept(server: RedisServer) -> None:
    async with client(server.url, min_connections=3, max_idle_s=0.1) as redis:
        await eventually(lambda: idle(redis) == 3)
        await server.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await eventually(lambda: redis.counts.closed["unhealthy"] == 3)
        await eventually(lambda: idle(redis) >= 3)
        assert redis.available
        assert await redis.run([echo("x")]) == [b"x"]


async def test_quiet_connections_are_pinged(server: RedisServer) -> None:
    async with client(server.url, health_check_s=0.1):
        await server.command("CONFIG", "RESETSTAT")
        async with asyncio.timeout(5):
            while "cmdstat_ping" not in await server.info("commandstats"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_a_connection_that_died_unnoticed_is_found_out_before_it_is_used(
    server: RedisServer,
) -> None:
    settings = {"health_check_s": 0.2, "timeout_s": 0.2, "wait_timeout_s": 1.0, "failures": 100}
    async with (
        CuttingProxy(server.address) as proxy,
        client(f"redis://{proxy.address}", **settings) as redis,
    ):
        proxy.hold_answers()
        closed = redis.counts.closed  # by the ping, or by the question for the clock
        await eventually(lambda: closed["unhealthy"] + closed["error"] >= 1)
        proxy.release()
        assert await redis.run([put(b"k", b"v")]) == [b"OK"]


async def test_a_server_that_is_full_is_not_taken_for_away() -> None:
    async with (
        RedisServer("--maxclients", "2") as server,
        client(server.url, max_connections=8, wait_timeout_s=5) as redis,
    ):
        replies = await asyncio.gather(*(redis.run([echo(str(n))]) for n in range(100)))
        assert replies == [[str(n).encode()] for n in range(100)]
        assert redis.available
        assert redis.counts.errors["connect"] > 0


async def test_close_leaves_no_task_no_socket_and_no_warning(server: RedisServer) -> None:
    gc.collect()  # what other tests have left is not this one's
    tasks = asyncio.all_tasks()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with client(server.url, max_connections=5) as redis:
            await asyncio.gather(*(redis.run([echo("x")]) for _ in range(20)))
            subscription = Subscription(
                redis, [b"c"], on_message=print, on_up=lambda: None, on_down=print
            )
            await subscription.start()
            await subscription.close()
            unfinished = asyncio.create_task(redis.run([Command(b"l", ("BLPOP", b"l", 5))]))
            await eventually(lambda: in_use(redis) == 1)
        (reply,) = await unfinished
        assert isinstance(reply, RedisAwayError)
        assert reply.sent
        assert asyncio.all_tasks() == tasks
        assert await connected_clients(server) == 0
        gc.collect()
    assert [str(each.message) for each in caught if each.category is ResourceWarning] == []


async def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    tasks = asyncio.all_tasks()
    for url in ("redis://127.0.0.1:1", "redis+cluster://127.0.0.1:1,127.0.0.1:2"):
        redis = Redis(url, RedisSettings(), structlog.get_logger())
        starting = asyncio.create_task(redis.start())
        await asyncio.sleep(0.05)
        starting.cancel()
        await asyncio.wait((starting,))
        await redis.close()
    assert asyncio.all_tasks() == tasks


# ---------------------------------------------------------------- scripts and the clock


async def test_a_script_is_loaded_where_it_is_not_known_also_within_a_pipeline(
    server: RedisServer,
) -> None:
    async with client(server.url) as redis:
        script = redis.script(GET_AND_SET)
        swap = [script.command([b"k"], [n]) for n in range(3)]
        assert await redis.run([put(b"k", b"first"), *swap, put(b"other", b"v")]) == [
            b"OK",
            b"first",
            b"0",
            b"1",
            b"OK",
        ]
        assert redis.script(GET_AND_SET) is script
        assert await redis.run(swap) == [b"2", b"0", b"1"]


async def test_scripts_flushed_under_load_are_loaded_again(server: RedisServer) -> None:
    async with client(server.url, wait_timeout_s=5.0) as redis:
        script = redis.script("return redis.call('INCR', KEYS[1])")
        stop = asyncio.Event()

        async def count() -> int:
            calls = 0
            while not stop.is_set():
                replies = await redis.run([script.command([b"n"]), script.command([b"n"])])
                assert all(isinstance(reply, int) for reply in replies), replies
                calls += 2
            return calls

        counting = [asyncio.create_task(count()) for _ in range(8)]
        for _ in range(100):
            await server.command("SCRIPT", "FLUSH", "SYNC")
        stop.set()
        calls = sum(await asyncio.gather(*counting))
        assert await redis.run([get(b"n")]) == [str(calls).encode()], "none was counted twice"


async def test_the_servers_clock_is_never_ahead_of_the_estimate(server: RedisServer) -> None:
    async with client(server.url) as redis:
        for _ in range(200):
            before = redis.now_us()
            ((seconds, microseconds),) = await redis.run([Command(b"", ("TIME",))])
            shown = int(seconds) * 1_000_000 + int(microseconds)
            assert shown <= redis.now_us()
            assert before - shown < 1_000_000


async def test_the_clock_is_unknown_until_a_server_has_answered() -> None:
    redis = Redis("redis://127.0.0.1:1", RedisSettings(), structlog.get_logger())
    with pytest.raises(RuntimeError):
        redis.now_us()
    await redis.close()


async def test_what_is_counted_is_shown_to_prometheus(server: RedisServer) -> None:
    async with client(server.url) as redis:
        await redis.run([put(b"k", b"v"), get(b"k")])
        registry = CollectorRegistry()
        registry.register(RedisCollector(redis))
        text = generate_latest(registry).decode()
    for line in (
        'redis_connections{state="idle"} 1.0',
        'redis_connections{state="in_use"} 0.0',
        "redis_connections_opened_total 1.0",
        'redis_connections_closed_total{reason="lifetime"} 0.0',
        "redis_pool_waits_total 0.0",
        "redis_pool_wait_seconds_total 0.0",
        "redis_round_trips_total 1.0",
        "redis_commands_total 2.0",
        'redis_errors_total{kind="timeout"} 0.0',
        f'redis_server_up{{server="{server.address}"}} 1.0',
    ):
        assert line in text.splitlines()


# ---------------------------------------------------------------- clusters


def slot_owner(cluster: RedisClusterServers, key: bytes) -> RedisServer:
    return cluster.servers[min(key_slot(key) * 3 // 16_384, 2)]


async def test_a_clusters_keys_go_to_their_servers_and_keep_their_order() -> None:
    async with RedisClusterServers() as cluster, client(cluster.url) as redis:
        assert [server.address for server in redis.topology.servers] == sorted(
            server.address for server in cluster.servers
        )
        keys = [b"key:%d" % n for n in range(30)]
        before = redis.counts.round_trips
        assert await redis.run([put(key, key) for key in keys]) == [b"OK"] * 30
        assert await redis.run([get(key) for key in keys]) == keys
        assert redis.counts.round_trips == before + 6
        assert sum(await redis.each_server("DBSIZE")) == 30
        sizes = [await server.command("DBSIZE") for server in cluster.servers]
        assert all(sizes)
        tagged = [Command(b"{acme}", ("MSET", b"{acme}:1", b"a", b"{acme}:2", b"b"))]
        assert await redis.run(tagged) == [b"OK"]
        assert await redis.run([echo("x"), get(b"{acme}:2"), echo("y")]) == [b"x", b"b", b"y"]
        script = redis.script(GET_AND_SET)
        swaps = [script.command([key], [b"new"]) for key in keys]
        assert await redis.run(swaps) == keys
        with pytest.raises(ValueError, match="hash tag"):
            script.command([b"key:1", b"key:2"])
        assert redis.now_us() > 0


async def test_a_slot_that_is_moving_or_has_moved_is_followed() -> None:
    async with RedisClusterServers() as cluster, client(cluster.url) as redis:
        key, gone = b"{acme}:stays", b"{acme}:new"
        source = slot_owner(cluster, key)
        target = next(server for server in cluster.servers if server is not source)
        slot = key_slot(key)
        await redis.run([put(key, b"v")])
        await cluster.begin_move(slot, source, target)
        script = redis.script(GET_AND_SET)
        replies = await redis.run(
            [get(key), put(gone, b"asked"), get(gone), script.command([gone], [b"again"])]
        )
        assert replies == [b"v", b"OK", b"asked", b"asked"]
        assert await target.command("DBSIZE") == 1
        await cluster.move_slot(slot, source, target)
        assert await redis.run([get(key), get(gone), get(b"other")]) == [b"v", b"again", None]
        before = redis.counts.round_trips
        assert await redis.run([get(key)]) == [b"v"]
        assert redis.counts.round_trips == before + 1, "the slot's new place was remembered"
        where = redis.topology.route
        await eventually(lambda: getattr(where(key), "address", "") == target.address)


async def test_a_slot_moved_under_load_loses_and_repeats_nothing() -> None:
    async with RedisClusterServers() as cluster, client(cluster.url, wait_timeout_s=5) as redis:
        key = b"{acme}:n"
        source = slot_owner(cluster, key)
        target = next(server for server in cluster.servers if server is not source)
        stop = asyncio.Event()

        async def count() -> int:
            calls = 0
            while not stop.is_set():
                (reply,) = await redis.run([Command(key, ("INCR", key))])
                assert isinstance(reply, int), reply
                calls += 1
            return calls

        counting = [asyncio.create_task(count()) for _ in range(8)]
        for _ in range(2):
            await cluster.move_slot(key_slot(key), source, target)
            await cluster.move_slot(key_slot(key), target, source)
        stop.set()
        calls = sum(await asyncio.gather(*counting))
        assert await redis.run([get(key)]) == [str(calls).encode()]


async def test_a_server_without_clustering_is_not_taken_for_a_cluster(
    server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"redis+cluster://{server.address}"
    redis = Redis(url, RedisSettings(), structlog.get_logger())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await redis.start()
    await redis.close()
    assert "cluster support disabled" in "".join(capsys.readouterr())


# ---------------------------------------------------------------- subscriptions


async def test_a_subscription_hears_what_is_published_and_says_first_that_it_listens(
    server: RedisServer,
) -> None:
    heard: list[Any] = []
    async with client(server.url) as redis:
        subscription = Subscription(
            redis,
            [b"one", b"two"],
            on_message=lambda channel, message: heard.append((channel, message)),
            on_up=lambda: heard.append("up"),
            on_down=heard.append,
        )
        await subscription.start()
        assert subscription.up
        await redis.run([Command(b"", ("PUBLISH", b"one", b"a"))])
        await redis.run([Command(b"", ("PUBLISH", b"two", b""))])
        await redis.run([Command(b"", ("PUBLISH", b"three", b"not for us"))])
        await redis.run([Command(b"", ("PUBLISH", b"one", b"b" * 100_000))])
        await eventually(lambda: len(heard) == 4)
        await subscription.close()
        assert heard == ["up", (b"one", b"a"), (b"two", b""), (b"one", b"b" * 100_000)]
        assert not subscription.up


async def test_a_listener_that_fails_does_not_end_the_subscription(server: RedisServer) -> None:
    heard: list[bytes] = []

    def hear(channel: bytes, message: bytes) -> None:
        heard.append(message)
        raise RuntimeError(message)

    async with client(server.url) as redis:
        subscription = Subscription(
            redis, [b"c"], on_message=hear, on_up=lambda: None, on_down=lambda _: None
        )
        await subscription.start()
        for message in (b"a", b"b"):
            await redis.run([Command(b"", ("PUBLISH", b"c", message))])
        await eventually(lambda: heard == [b"a", b"b"])
        assert subscription.up
        await subscription.close()


async def test_in_a_cluster_a_subscription_hears_each_message_from_every_server() -> None:
    heard: list[bytes] = []
    async with RedisClusterServers() as cluster, client(cluster.url) as redis:
        subscription = Subscription(
            redis,
            [b"c"],
            on_message=lambda _, message: heard.append(message),
            on_up=lambda: None,
            on_down=lambda _: None,
        )
        await subscription.start()
        await redis.each_server("PUBLISH", b"c", b"hello")
        await eventually(lambda: heard == [b"hello"] * 9)
        await subscription.close()
