"""Garbage, vanishing callers, servers that go away: nothing hangs and the service stays up."""

import asyncio
import os
import time

import pytest
from support.polling import eventually
from support.servers import running

from agent360.client import Mesh, UnavailableError


async def test_garbage_on_the_port_harms_nobody() -> None:
    async with (
        running("cache") as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        for _ in range(5):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(os.urandom(100_000))
            writer.close()
        assert (await mesh.cache.set("k", b"v")).stored


async def test_a_caller_that_vanishes_leaves_its_claims_neighbours_alone() -> None:
    async with running("cache") as server:
        async with Mesh.connect(cache=server.address, tenant="acme", api_key="") as gone:
            await gone.cache.claim("k", fill_timeout=0.5)
        async with Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh:
            assert (await mesh.cache.claim("k", timeout=5)).fill_token


async def test_a_service_that_is_away_fails_its_calls_in_time_and_is_found_again() -> None:
    async with running("cache") as server:
        port = server.port
        mesh = Mesh.connect(cache=server.address, tenant="acme", api_key="", patience=0.5)
        await mesh.cache.set("k", b"v")
    started = time.monotonic()
    with pytest.raises(UnavailableError):
        await mesh.cache.get("k", timeout=2.0)
    assert time.monotonic() - started < 3
    async with running("cache", port=port):
        async with asyncio.timeout(10):
            while True:
                try:
                    await mesh.cache.set("k", b"v2", timeout=1.0)
                    break
                except UnavailableError:
                    await asyncio.sleep(0.05)
        assert (await mesh.cache.get("k")).value == b"v2"
        await mesh.close()


async def test_a_drained_replica_loses_no_repeatable_call() -> None:
    async with running("cache") as staying, running("cache") as leaving:
        addresses = f"{staying.address},{leaving.address}"
        async with Mesh.connect(cache=addresses, tenant="acme", api_key="") as mesh:
            stop = asyncio.Event()

            async def call() -> int:
                calls = 0
                while not stop.is_set():
                    await mesh.cache.get("k", timeout=5)
                    calls += 1
                return calls

            tasks = [asyncio.create_task(call()) for _ in range(32)]
            await mesh.cache.get("warm")
            await asyncio.sleep(0.3)
            await leaving.stop()
            await asyncio.sleep(0.3)
            stop.set()
            assert sum(await asyncio.gather(*tasks)) > 100


async def test_cancelling_one_call_leaves_its_neighbours_alone() -> None:
    async with (
        running("cache") as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        token = (await mesh.cache.claim("k")).fill_token
        waiting = [asyncio.create_task(mesh.cache.claim("k")) for _ in range(10)]
        await mesh.cache.get("other")
        waiting[3].cancel()
        await mesh.cache.fill(token, "k", b"v")
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(results[3], asyncio.CancelledError)
        values = [each.lookup.value for each in results if not isinstance(each, BaseException)]
        assert values == [b"v"] * 9


async def test_closing_the_client_fails_what_still_waits() -> None:
    async with running("cache") as server:
        mesh = Mesh.connect(cache=server.address, tenant="acme", api_key="")
        await mesh.cache.claim("k")
        waiting = asyncio.create_task(mesh.cache.claim("k", timeout=30))
        await mesh.cache.get("other")
        await mesh.close(grace=0.1)
        with pytest.raises(UnavailableError) as caught:
            await waiting
        assert caught.value.reason == "CLIENT_CLOSED"


async def test_a_last_answer_of_a_drained_stream_does_not_make_calls_wait_for_a_gone_service() -> (
    None
):
    async with (
        running("cache", grace_s=5.0) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="", patience=1.0) as mesh,
    ):
        await mesh.cache.claim("k", fill_timeout=1.0)
        claiming = asyncio.create_task(mesh.cache.claim("k", timeout=20))
        await mesh.cache.get("other")
        stopping = asyncio.create_task(server.stop())
        await eventually(lambda: not server.ready)
        reading = asyncio.create_task(mesh.cache.get("other", timeout=30))
        assert (await claiming).fill_token
        await stopping
        began = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            await reading
        assert time.monotonic() - began < 10.0
    assert caught.value.reason == "UNREACHABLE"
