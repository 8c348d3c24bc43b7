"""Connections cut under calls: what is safe is sent again, what is not fails, nothing hangs."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.cutting_proxy import CuttingProxy
from support.polling import eventually
from support.servers import running

from agent360.client import (
    CheckRequest,
    DeadlineExceededError,
    Lookup,
    Mesh,
    MeshError,
    UnavailableError,
)
from agent360.client.session import Bounds
from agent360.mesh.runtime.server import Server

PROMPTLY_S = 2.0
LIMITS = """
[[limits]]
id = "searches"
name = "search"
algorithm = "fixed_window"
amount = 100000
period = "10h"
"""


@asynccontextmanager
async def cuttable(name: str, **settings: Any) -> AsyncIterator[tuple[Server, CuttingProxy, Mesh]]:
    """A service, a proxy before it, and a client that has spoken to it through the proxy."""
    async with (
        running(name, **settings) as server,
        CuttingProxy(server.address) as proxy,
        Mesh.connect(**{name: proxy.address}, tenant="acme", api_key="") as mesh,
    ):
        if name == "cache":
            await mesh.cache.get("warm")
        else:
            await mesh.ratelimit.check("warm")
        yield server, proxy, mesh


@pytest.fixture
def limits(tmp_path: Path) -> Path:
    file = tmp_path / "limits.toml"
    file.write_text(LIMITS)
    return file


def handled(server: Server, service: str, method: str, code: str = "OK") -> int:
    """How many stream items of a method the service has answered."""
    labels = {
        "grpc_type": "pipeline_item",
        "grpc_service": service,
        "grpc_method": method,
        "grpc_code": code,
    }
    return int(server.registry.get_sample_value("grpc_server_handled_total", labels) or 0)


def gets(server: Server) -> int:
    return handled(server, "agent360.cache.v1.CacheService", "Get")


def checks(server: Server) -> int:
    return handled(server, "agent360.ratelimit.v1.RateLimitService", "Check")


async def charged(mesh: Mesh) -> int:
    """How much of the limit is used up."""
    looked = await mesh.ratelimit.check("search", hits=0)
    return looked.limit - looked.remaining


@asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[Mesh]:
    """A client that goes past the proxy."""
    async with Mesh.connect(
        cache=server.address, ratelimit=server.address, tenant="acme", api_key=""
    ) as mesh:
        yield mesh


async def fill_cache(server: Server, count: int) -> None:
    async with client_of(server) as mesh:
        await asyncio.gather(*(mesh.cache.set(f"k{n}", f"v{n}".encode()) for n in range(count)))


async def answered_by(mesh: Mesh, *servers: Server) -> None:
    """Calls until every replica has answered."""
    async with asyncio.timeout(5):
        while not all(gets(server) for server in servers):
            await asyncio.gather(*(mesh.cache.get("warm") for _ in range(8)))


async def indexes_of_many(mesh: Mesh, count: int) -> list[int]:
    keys = [f"m{n}" for n in range(count)]
    return [index async for index, _ in mesh.cache.get_many(keys)]


# ---------------------------------------------------------------- what is safe to repeat


async def test_gets_in_flight_when_the_connection_is_cut_are_sent_again_and_answered() -> None:
    async with cuttable("cache") as (server, proxy, mesh):
        await fill_cache(server, 300)
        before = gets(server)
        proxy.hold_answers()
        waiting = [asyncio.create_task(mesh.cache.get(f"k{n}")) for n in range(300)]
        await eventually(lambda: gets(server) == before + 300)
        proxy.cut()
        proxy.release()
        found = await asyncio.gather(*waiting)
        assert [each.value for each in found] == [f"v{n}".encode() for n in range(300)]
        assert gets(server) == before + 600
        assert proxy.connections == 2


async def test_gets_that_never_reached_the_service_are_sent_again_and_answered() -> None:
    async with cuttable("cache") as (server, proxy, mesh), client_of(server) as other:
        await fill_cache(server, 300)
        before = gets(server)
        proxy.hold_requests()
        sent = proxy.bytes_to_server
        waiting = [asyncio.create_task(mesh.cache.get(f"k{n}")) for n in range(300)]
        await asyncio.sleep(0)
        await other.cache.get("other")
        assert proxy.bytes_to_server == sent
        proxy.cut()
        proxy.release()
        found = await asyncio.gather(*waiting)
        assert [each.value for each in found] == [f"v{n}".encode() for n in range(300)]
        assert gets(server) == before + 301


async def test_an_unconditional_write_is_sent_again_and_stored() -> None:
    async with cuttable("cache") as (server, proxy, mesh), client_of(server) as other:
        proxy.hold_answers()
        writing = asyncio.create_task(mesh.cache.set("k", b"v"))
        async with asyncio.timeout(5):
            while not (await other.cache.get("k")).hit:
                pass
        proxy.cut()
        proxy.release()
        assert (await writing).stored
        assert (await mesh.cache.get("k")).value == b"v"


async def test_many_gets_across_repeated_cuts_yield_each_index_once_and_right() -> None:
    async with cuttable("cache") as (server, proxy, mesh):
        await fill_cache(server, 1_000)
        seen: dict[int, Lookup | MeshError] = {}
        cuts = 0
        keys = (f"k{n % 1_000}" for n in range(12_000))
        async for index, lookup in mesh.cache.get_many(keys, timeout=30):
            assert index not in seen
            seen[index] = lookup
            if len(seen) // 1_500 > cuts:
                cuts += 1
                proxy.cut()
        assert cuts == 8
        assert proxy.connections > 4
        assert sorted(seen) == list(range(12_000))
        for index, lookup in seen.items():
            assert isinstance(lookup, Lookup)
            assert lookup.value == f"v{index % 1_000}".encode()


async def test_single_calls_across_repeated_cuts_are_each_answered_right() -> None:
    async with cuttable("cache") as (server, proxy, mesh):
        await fill_cache(server, 64)

        async def caller(number: int) -> int:
            for _ in range(50):
                lookup = await mesh.cache.get(f"k{number}", timeout=20)
                assert lookup.value == f"v{number}".encode()
            return 50

        callers = [asyncio.create_task(caller(number)) for number in range(64)]
        for step in range(1, 6):
            target = gets(server) + 300
            await eventually(
                lambda target=target: gets(server) >= target or all(each.done() for each in callers)
            )
            proxy.cut()
            assert proxy.connections <= step + 1
        assert sum(await asyncio.gather(*callers)) == 64 * 50


# ---------------------------------------------------------------- what is not


async def test_checks_whose_answers_are_lost_fail_promptly_and_are_charged_once(
    limits: Path,
) -> None:
    async with cuttable("ratelimit", limits=limits) as (server, proxy, mesh):
        before = checks(server)
        proxy.hold_answers()
        waiting = [asyncio.create_task(mesh.ratelimit.check("search")) for _ in range(50)]
        await eventually(lambda: checks(server) == before + 50)
        started = time.monotonic()
        proxy.cut()
        proxy.release()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert time.monotonic() - started < PROMPTLY_S
        for outcome in outcomes:
            assert isinstance(outcome, UnavailableError)
            assert (outcome.code, outcome.reason) == (grpc.StatusCode.UNAVAILABLE, "ANSWER_LOST")
            assert outcome.metadata["address"] == proxy.address
        assert await charged(mesh) == 50


async def test_checks_that_never_arrived_fail_as_lost_and_charge_nothing(limits: Path) -> None:
    async with cuttable("ratelimit", limits=limits) as (server, proxy, mesh):
        proxy.hold_requests()
        waiting = [asyncio.create_task(mesh.ratelimit.check("search")) for _ in range(50)]
        await asyncio.sleep(0)
        async with client_of(server) as other:
            await other.ratelimit.check("warm")
        proxy.cut()
        proxy.release()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        lost = [each for each in outcomes if isinstance(each, MeshError)]
        assert {each.reason for each in lost} <= {"ANSWER_LOST"}
        assert await charged(mesh) == 50 - len(lost)


async def test_a_lost_reservation_fails_and_is_charged_at_most_once(limits: Path) -> None:
    async with cuttable("ratelimit", limits=limits) as (server, proxy, mesh):
        proxy.hold_answers()
        waiting = asyncio.create_task(mesh.ratelimit.reserve("search", 70))
        service = "agent360.ratelimit.v1.RateLimitService"
        await eventually(lambda: handled(server, service, "Reserve") == 1)
        proxy.cut()
        proxy.release()
        with pytest.raises(UnavailableError) as caught:
            await asyncio.wait_for(waiting, PROMPTLY_S)
        assert caught.value.reason == "ANSWER_LOST"
        assert await charged(mesh) == 70


async def test_a_settlement_is_sent_again_and_counts_once(limits: Path) -> None:
    async with cuttable("ratelimit", limits=limits) as (server, proxy, mesh):
        reserved = await mesh.ratelimit.reserve("search", 100)
        proxy.hold_answers()
        settling = asyncio.create_task(mesh.ratelimit.settle(reserved.reservation_id, 40))
        service = "agent360.ratelimit.v1.RateLimitService"
        await eventually(lambda: handled(server, service, "Settle") == 1)
        proxy.cut()
        proxy.release()
        assert (await settling).repeated
        assert await charged(mesh) == 40


Write = Callable[[Mesh, str, int], Awaitable[object]]
CONDITIONAL_WRITES: dict[str, Write] = {
    "if absent": lambda mesh, _, __: mesh.cache.set("new", b"v", if_absent=True),
    "if version": lambda mesh, _, version: mesh.cache.set("old", b"v", if_version=version),
    "fill": lambda mesh, token, _: mesh.cache.fill(token, "claimed", b"v"),
}


@pytest.mark.parametrize("kind", CONDITIONAL_WRITES)
async def test_a_conditional_write_whose_answer_is_lost_fails_and_was_done_once(kind: str) -> None:
    async with cuttable("cache") as (server, proxy, mesh):
        token = (await mesh.cache.claim("claimed")).fill_token
        version = (await mesh.cache.set("old", b"first")).version
        service = "agent360.cache.v1.CacheService"
        method = "Fill" if kind == "fill" else "Set"
        before = handled(server, service, method)
        proxy.hold_answers()
        writing = asyncio.ensure_future(CONDITIONAL_WRITES[kind](mesh, token, version))
        await eventually(lambda: handled(server, service, method) == before + 1)
        proxy.cut()
        proxy.release()
        with pytest.raises(UnavailableError) as caught:
            await asyncio.wait_for(writing, PROMPTLY_S)
        assert caught.value.reason == "ANSWER_LOST"
        key = {"if absent": "new", "if version": "old", "fill": "claimed"}[kind]
        assert (await mesh.cache.get(key)).value == b"v"
        assert handled(server, service, method) == before + 1


async def test_many_checks_across_repeated_cuts_yield_each_index_once_and_charge_each_once(
    limits: Path,
) -> None:
    async with cuttable("ratelimit", limits=limits) as (_, proxy, mesh):
        seen: dict[int, object] = {}
        cuts = 0
        asked = (CheckRequest("search") for _ in range(12_000))
        async for index, decision in mesh.ratelimit.check_many(asked, timeout=30):
            assert index not in seen
            seen[index] = decision
            if len(seen) // 1_500 > cuts:
                cuts += 1
                proxy.cut()
        assert proxy.connections > 2
        assert sorted(seen) == list(range(12_000))
        lost = [each for each in seen.values() if isinstance(each, MeshError)]
        assert {each.reason for each in lost} <= {"ANSWER_LOST"}
        assert 12_000 - len(lost) <= await charged(mesh) <= 12_000


# ---------------------------------------------------------------- a service that is away


async def test_gets_made_while_the_service_is_away_for_a_moment_wait_and_succeed() -> None:
    async with cuttable("cache") as (server, proxy, mesh):
        await fill_cache(server, 50)
        await proxy.go_away()
        waiting = [asyncio.create_task(mesh.cache.get(f"k{n}", timeout=20)) for n in range(50)]
        lane = next(iter(mesh._coalescers[0]._lanes.values()))
        await eventually(lambda: lane.down_since is not None)
        assert not any(each.done() for each in waiting)
        await proxy.come_back()
        found = await asyncio.gather(*waiting)
        assert [each.value for each in found] == [f"v{n}".encode() for n in range(50)]
        await mesh.cache.get("k0")
        assert (lane.failures, lane.down_since) == (0, None)


async def test_a_check_made_while_the_service_is_known_to_be_away_waits_and_is_charged_once(
    limits: Path,
) -> None:
    async with cuttable("ratelimit", limits=limits) as (_, proxy, mesh):
        await proxy.go_away()
        lane = next(iter(mesh._coalescers[1]._lanes.values()))
        looking = asyncio.create_task(mesh.ratelimit.settle("none", 1, timeout=20))
        await eventually(lambda: lane.down_since is not None)
        waiting = [
            asyncio.create_task(mesh.ratelimit.check("search", timeout=20)) for _ in range(50)
        ]
        await asyncio.sleep(0)
        await proxy.come_back()
        decisions = await asyncio.gather(*waiting)
        assert all(each.allowed for each in decisions)
        assert await charged(mesh) == 50
        with pytest.raises(MeshError, match="RESERVATION_UNKNOWN"):
            await looking


async def test_a_check_that_finds_the_service_just_gone_waits_for_it_like_a_get(
    limits: Path,
) -> None:
    """It was never sent: no connection was there to send it on."""
    async with cuttable("ratelimit", limits=limits) as (_, proxy, mesh):
        lane = next(iter(mesh._coalescers[1]._lanes.values()))
        await proxy.go_away()
        await eventually(lambda: lane._session is None)
        waiting = asyncio.create_task(mesh.ratelimit.check("search", timeout=20))
        await eventually(lambda: lane.down_since is not None or waiting.done())
        await proxy.come_back()
        assert (await waiting).allowed
        assert await charged(mesh) == 1


async def test_calls_to_a_service_that_stays_away_fail_by_their_deadlines() -> None:
    async with cuttable("cache") as (_, proxy, mesh):
        await proxy.go_away()
        started = time.monotonic()
        waiting = [
            asyncio.create_task(mesh.cache.get(f"k{n}", timeout=0.3 + 0.01 * n)) for n in range(30)
        ]
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert time.monotonic() - started < 0.6 + PROMPTLY_S
        assert all(isinstance(each, UnavailableError) for each in outcomes)
        assert {each.reason for each in outcomes if isinstance(each, MeshError)} == {"UNREACHABLE"}


async def test_calls_on_a_connection_that_has_gone_silent_fail_by_their_deadlines() -> None:
    async with cuttable("cache") as (_, proxy, mesh):
        proxy.hold_answers()
        started = time.monotonic()
        waiting = [asyncio.create_task(mesh.cache.get(f"k{n}", timeout=0.3)) for n in range(30)]
        late = await asyncio.gather(*waiting, return_exceptions=True)
        many = await mesh.cache.get_many([f"k{n}" for n in range(100)], timeout=0.3)
        assert time.monotonic() - started < 0.6 + PROMPTLY_S
        assert all(isinstance(each, DeadlineExceededError) for each in [*late, *many])
        proxy.release()
        assert not (await mesh.cache.get("k0")).hit


async def test_more_calls_than_may_be_in_flight_across_a_cut_are_all_answered() -> None:
    async with running("cache") as server, CuttingProxy(server.address) as proxy:
        bounds = Bounds(message_items=50, coalesced_items=10, in_flight=100)
        async with Mesh.connect(
            cache=proxy.address, tenant="acme", api_key="", bounds=bounds
        ) as mesh:
            await mesh.cache.get("warm")
            before = gets(server)
            proxy.hold_answers()
            single = [asyncio.create_task(mesh.cache.get(f"s{n}")) for n in range(300)]
            await eventually(lambda: gets(server) == before + 100)
            many = asyncio.ensure_future(indexes_of_many(mesh, 300))
            proxy.cut()
            proxy.release()
            assert len(await asyncio.gather(*single)) == 300
            assert sorted(await many) == list(range(300))
            assert mesh._coalescers[0]._in_flight == 0


# ---------------------------------------------------------------- several addresses


async def test_when_one_of_two_replicas_dies_calls_go_on_through_the_other() -> None:
    async with (
        running("cache") as staying,
        running("cache") as dying,
        CuttingProxy(dying.address) as proxy,
    ):
        await fill_cache(staying, 32)
        await fill_cache(dying, 32)
        addresses = [staying.address, proxy.address]
        async with Mesh.connect(cache=addresses, tenant="acme", api_key="") as mesh:
            answered = 0
            enough = asyncio.Event()

            async def caller(number: int) -> None:
                nonlocal answered
                while not enough.is_set():
                    lookup = await mesh.cache.get(f"k{number}", timeout=5)
                    assert lookup.value == f"v{number}".encode()
                    answered += 1

            callers = [asyncio.create_task(caller(number)) for number in range(32)]
            await eventually(lambda: gets(dying) > 200 and gets(staying) > 200, 20)
            await proxy.go_away()
            at_cut, by_dying = answered, gets(dying)
            await eventually(lambda: answered > at_cut + 1_000, 20)
            assert gets(dying) <= by_dying + 32
            await proxy.come_back()
            await eventually(lambda: gets(dying) > by_dying + 200, 20)
            enough.set()
            await asyncio.gather(*callers)


async def test_gets_held_up_by_a_dying_replica_are_answered_by_the_other() -> None:
    async with (
        running("cache") as staying,
        running("cache") as dying,
        CuttingProxy(dying.address) as proxy,
    ):
        addresses = [staying.address, proxy.address]
        async with Mesh.connect(cache=addresses, tenant="acme", api_key="") as mesh:
            await answered_by(mesh, staying, dying)
            proxy.hold_answers()
            before = gets(dying)
            waiting = [asyncio.create_task(mesh.cache.get(f"k{n}")) for n in range(200)]
            await eventually(lambda: gets(dying) > before)
            await eventually(lambda: any(each.done() for each in waiting))
            assert not all(each.done() for each in waiting)
            await proxy.go_away()
            started = time.monotonic()
            assert len(await asyncio.gather(*waiting)) == 200
            assert time.monotonic() - started < PROMPTLY_S


async def test_cancelling_a_call_to_one_replica_leaves_those_to_the_other_alone() -> None:
    async with (
        running("cache") as one,
        running("cache") as two,
        CuttingProxy(one.address) as first,
        CuttingProxy(two.address) as second,
    ):
        addresses = [first.address, second.address]
        async with Mesh.connect(cache=addresses, tenant="acme", api_key="") as mesh:
            await answered_by(mesh, one, two)
            for proxy in (first, second):
                proxy.hold_answers()
            before = gets(one) + gets(two)
            waiting = [
                asyncio.create_task(mesh.cache.get(f"k{n}", timeout=PROMPTLY_S)) for n in range(100)
            ]
            await eventually(lambda: gets(one) + gets(two) == before + 100)
            for cancelled in waiting[::2]:
                cancelled.cancel()
            await asyncio.wait(waiting[::2])
            for proxy in (first, second):
                proxy.release()
            async with asyncio.timeout(2 * PROMPTLY_S):
                found = await asyncio.gather(*waiting[1::2])
            assert len(found) == 50


async def test_a_call_that_expires_on_a_silent_replica_leaves_those_to_the_other_alone() -> None:
    async with (
        running("cache") as one,
        running("cache") as two,
        CuttingProxy(one.address) as first,
        CuttingProxy(two.address) as second,
    ):
        addresses = [first.address, second.address]
        async with Mesh.connect(cache=addresses, tenant="acme", api_key="") as mesh:
            await answered_by(mesh, one, two)
            for proxy in (first, second):
                proxy.hold_answers()
            short = [
                asyncio.create_task(mesh.cache.get(f"s{n}", timeout=0.2 + n % 2))
                for n in range(100)
            ]
            await asyncio.wait(short[::2])
            for proxy in (first, second):
                proxy.release()
            async with asyncio.timeout(2 * PROMPTLY_S):
                outcomes = await asyncio.gather(*short, return_exceptions=True)
            assert all(isinstance(each, DeadlineExceededError) for each in outcomes[::2])
            assert all(isinstance(each, Lookup) for each in outcomes[1::2])


async def test_closing_a_client_of_two_replicas_fails_all_that_still_waits() -> None:
    async with running("cache") as one, running("cache") as two, client_of(one) as other:
        addresses = [one.address, two.address]
        mesh = Mesh.connect(cache=addresses, tenant="acme", api_key="")
        keys = [f"k{n}" for n in range(32)]
        for key in keys:
            await other.cache.claim(key, fill_timeout=60)
        await answered_by(mesh, one, two)
        claims = [asyncio.create_task(mesh.cache.claim(key, timeout=30)) for key in keys]
        await mesh.cache.get_many(keys)
        await mesh.close(grace=0.1)
        _, hanging = await asyncio.wait(claims, timeout=PROMPTLY_S)
        for each in hanging:
            each.cancel()
        assert not hanging
        outcomes = await asyncio.gather(*claims, return_exceptions=True)
        failed = [each for each in outcomes if isinstance(each, MeshError)]
        assert failed
        assert {each.reason for each in failed} == {"CLIENT_CLOSED"}


async def test_a_call_made_after_the_client_was_closed_fails_promptly() -> None:
    async with running("cache") as server:
        mesh = Mesh.connect(cache=server.address, tenant="acme", api_key="")
        await mesh.cache.get("k")
        await mesh.close()
        with pytest.raises(UnavailableError) as caught:
            await asyncio.wait_for(mesh.cache.get("k", timeout=30), PROMPTLY_S)
        assert caught.value.reason == "CLIENT_CLOSED"
