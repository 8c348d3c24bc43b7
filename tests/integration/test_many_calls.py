"""Many calls at once: each result once, with its index, whatever becomes of its neighbours."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.polling import eventually
from support.servers import running

from agent360.client import CheckRequest, Entry, Lookup, Mesh, MeshError
from agent360.client.session import Bounds
from agent360.mesh import embedded_sync
from agent360.mesh.runtime.policies.shedding import SheddingPolicy
from agent360.mesh.runtime.server import Server

SMALL = Bounds(message_items=10, coalesced_items=5, in_flight=50)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running("cache") as server:
        yield server


@pytest.fixture
async def mesh(server: Server) -> AsyncIterator[Mesh]:
    async with Mesh.connect(cache=server.address, tenant="acme", api_key="", bounds=SMALL) as mesh:
        yield mesh


def in_progress(server: Server) -> int:
    policies = server._handlers._policies._policies
    (shedding,) = (each for each in policies if isinstance(each, SheddingPolicy))
    return shedding.in_flight


def in_flight(mesh: Mesh) -> int:
    return mesh._coalescers[0]._in_flight


async def test_nothing_asked_is_nothing_answered(mesh: Mesh) -> None:
    assert await mesh.cache.get_many([]) == []
    assert [each async for each in mesh.cache.get_many(iter(()))] == []


@pytest.mark.parametrize("count", [1, 9, 10, 11, 20, 21, 333])
async def test_awaited_and_iterated_results_agree(mesh: Mesh, count: int) -> None:
    await mesh.cache.set_many(Entry(f"k{n}", str(n).encode()) for n in range(0, count, 2))
    keys = [f"k{n}" for n in range(count)]
    awaited = await mesh.cache.get_many(keys)
    iterated = dict([each async for each in mesh.cache.get_many(keys)])
    assert len(awaited) == len(iterated) == count
    for index, lookup in enumerate(awaited):
        assert isinstance(lookup, Lookup)
        assert lookup.hit is (index % 2 == 0)
        assert lookup.value == (str(index).encode() if lookup.hit else b"")
        assert iterated[index].value == lookup.value


async def test_errors_stand_where_their_results_would(mesh: Mesh) -> None:
    keys = ["" if n % 7 == 3 else f"k{n}" for n in range(100)]
    found = await mesh.cache.get_many(keys)
    failed = {index for index, each in enumerate(found) if isinstance(each, MeshError)}
    assert failed == set(range(3, 100, 7))
    assert all(isinstance(found[index], MeshError) for index in failed)
    by_index = dict([each async for each in mesh.cache.get_many(keys)])
    assert {index for index, each in by_index.items() if isinstance(each, MeshError)} == failed


async def test_requests_are_taken_as_results_are_consumed(mesh: Mesh) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        for taken in itertools.count(1):
            yield f"k{taken}"

    seen = set()
    async with aclosing(aiter(mesh.cache.get_many(endless()))) as results:
        async for index, _ in results:
            assert taken <= len(seen) + 1 + 4 * SMALL.message_items
            seen.add(index)
            if len(seen) == 500:
                break
    assert len(seen) == 500
    assert in_flight(mesh) == 0


async def test_leaving_early_withdraws_what_is_under_way(server: Server, mesh: Mesh) -> None:
    await mesh.cache.claim("taken", fill_timeout=60)
    waiting = [asyncio.create_task(mesh.cache.claim("taken", timeout=30)) for _ in range(8)]
    await eventually(lambda: in_progress(server) == 8)
    many = asyncio.create_task(read_all(mesh.cache.get_many(f"k{n}" for n in range(10_000_000))))
    await mesh.cache.get("other")
    many.cancel()
    await asyncio.wait((many,))
    await eventually(lambda: in_progress(server) == 8)
    assert in_flight(mesh) == 8
    for each in waiting:
        each.cancel()
    await asyncio.wait(waiting)
    await eventually(lambda: in_progress(server) == 0)


async def read_all(results: Any) -> int:
    return len(await results)


async def test_one_deadline_ends_what_is_late_and_keeps_what_came(server: Server) -> None:
    async with Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh:
        asked = asyncio.create_task(slowly(mesh))
        found = await asked
        assert [isinstance(each, MeshError) for each in found] == [False, True]


async def slowly(mesh: Mesh) -> list[Any]:
    """A claim that is answered and one that nobody fills, each an item of its own."""
    first = await mesh.cache.claim("k", fill_timeout=60)
    late = asyncio.create_task(mesh.cache.claim("k", timeout=0.3))
    outcomes = await asyncio.gather(late, return_exceptions=True)
    return [first, *outcomes]


async def test_large_values_are_split_over_messages_by_their_bytes(server: Server) -> None:
    bounds = Bounds(message_bytes=100_000)
    async with Mesh.connect(cache=server.address, tenant="acme", api_key="", bounds=bounds) as mesh:
        entries = [Entry(f"k{n}", bytes([n % 256]) * 30_000) for n in range(60)]
        assert all(each.stored for each in await mesh.cache.set_many(entries))
        found = await mesh.cache.get_many([entry.key for entry in entries])
        assert [each.value for each in found] == [entry.value for entry in entries]


async def test_several_at_once_share_the_bound_and_none_starves(mesh: Mesh) -> None:
    async def run(number: int) -> list[int]:
        keys = [f"{number}-{n}" for n in range(200)]
        return [index async for index, _ in mesh.cache.get_many(keys)]

    runs = await asyncio.gather(*(run(number) for number in range(10)))
    assert all(sorted(indexes) == list(range(200)) for indexes in runs)
    assert in_flight(mesh) == 0


async def test_decisions_of_many_checks_never_exceed_the_limit(tmp_path: Any) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text(
        '[[limits]]\nid = "s"\nname = "search"\namount = 70\nperiod = "10h"\n'
        'algorithm = "fixed_window"\n'
    )
    async with (
        running("ratelimit", limits=limits) as server,
        Mesh.connect(ratelimit=server.address, tenant="acme", api_key="", bounds=SMALL) as mesh,
    ):
        found = await mesh.ratelimit.check_many(CheckRequest("search") for _ in range(200))
        assert sum(each.allowed for each in found) == 70


@given(
    sizes=st.lists(st.integers(0, 300), max_size=60),
    message_items=st.integers(1, 20),
    message_bytes=st.integers(100, 2_000),
)
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_the_bounds_every_index_is_answered_once(
    sizes: list[int], message_items: int, message_bytes: int
) -> None:
    bounds = Bounds(message_items=message_items, message_bytes=message_bytes, in_flight=64)

    async def main(address: str) -> None:
        async with Mesh.connect(cache=address, tenant="acme", api_key="", bounds=bounds) as mesh:
            entries = [Entry(f"k{n}", bytes(size)) for n, size in enumerate(sizes)]
            indexes = [index async for index, _ in mesh.cache.set_many(entries)]
            assert sorted(indexes) == list(range(len(sizes)))
            found = await mesh.cache.get_many([entry.key for entry in entries])
            assert [len(each.value) for each in found] == sizes

    asyncio.run(main(shared_address()))


_shared: list[Any] = []


def shared_address() -> str:
    """A cache service that all examples share."""
    if not _shared:
        services = embedded_sync(tenant="acme")
        mesh = services.__enter__()
        _shared.extend((services, mesh._mesh._coalescers[0]._addresses[0]))
    return str(_shared[1])


def teardown_module() -> None:
    if _shared:
        _shared[0].__exit__(None, None, None)


async def test_a_value_that_cannot_be_written_fails_its_own_call_alone(mesh: Mesh) -> None:
    wrong: Any = "text instead of bytes"
    refused, *stored = await asyncio.gather(
        mesh.cache.set("wrong", wrong),
        *(mesh.cache.set(f"k{number}", b"v") for number in range(20)),
        return_exceptions=True,
    )
    assert isinstance(refused, MeshError)
    assert refused.reason == "INVALID_REQUEST"
    assert not any(isinstance(each, BaseException) for each in stored)
    assert (await mesh.cache.get("k19")).value == b"v"


async def test_an_entry_that_cannot_be_written_fails_alone_among_many(mesh: Mesh) -> None:
    wrong: Any = "text instead of bytes"
    entries = [Entry(f"k{n}", wrong if n % 7 == 3 else b"v") for n in range(50)]
    results = await mesh.cache.set_many(entries)
    for number, result in enumerate(results):
        failed = isinstance(result, MeshError)
        assert failed is (number % 7 == 3), (number, result)
    assert (await mesh.cache.get("k49")).value == b"v"
