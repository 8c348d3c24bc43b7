"""Loading, cached functions, warming and watching, against a real service."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel
from support.polling import eventually
from support.servers import NOBODY, connected, running

from agent360.client import (
    TEXT,
    DeadlineExceededError,
    Entry,
    Invalidation,
    InvalidRequestError,
    Mesh,
    MeshError,
    NearCache,
    UnavailableError,
    cached,
    call_scope,
    json_of,
)
from agent360.client.context import current_scope
from agent360.client.entries import Warmed
from agent360.mesh import embedded_sync
from agent360.mesh.runtime.server import Server


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running("cache") as server:
        yield server


@pytest.fixture(params=[None, NearCache(replica_lag=0.0)], ids=["far", "near"])
async def mesh(server: Server, request: pytest.FixtureRequest) -> AsyncIterator[Mesh]:
    async with Mesh.connect(
        cache=server.address, tenant="acme", api_key="", near_cache=request.param
    ) as mesh:
        yield mesh


@pytest.fixture
async def other(server: Server) -> AsyncIterator[Mesh]:
    """A client as in another process."""
    async with Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh:
        yield mesh


class Loader:
    """Loads when it is let, and counts."""

    def __init__(self, value: Any = b"loaded", *, held: bool = False) -> None:
        self.value = value
        self.calls = 0
        self.gate = asyncio.Event()
        if not held:
            self.gate.set()

    async def __call__(self, *_: object) -> Any:
        self.calls += 1
        await self.gate.wait()
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(5):
        while not await condition():  # noqa: ASYNC110 - every look is a call of its own
            await asyncio.sleep(0.005)


async def stale(mesh: Mesh, key: str, value: bytes) -> None:
    """Puts an entry in place that is stale."""
    await mesh.cache.set(key, value, ttl=0.01, stale_ttl=60)

    async def is_stale() -> bool:
        return not (await mesh.cache.get(key)).hit

    await until(is_stale)


# ---------------------------------------------------------------- get_or_load


async def test_what_is_missing_is_loaded_once_and_then_there_for_all(
    mesh: Mesh, other: Mesh
) -> None:
    load = Loader()
    for client in (mesh, mesh, other):
        assert await client.cache.get_or_load("k", load, ttl=60, tags=["x"]) == b"loaded"
    assert load.calls == 1
    found = await other.cache.get("k", include_tags=True)
    assert (found.value, found.tags) == (b"loaded", ("x",))
    assert 50 < found.ttl_s < 70


async def test_callers_of_all_processes_share_one_load(mesh: Mesh, other: Mesh) -> None:
    load = Loader(held=True)
    callers = [
        asyncio.create_task(client.cache.get_or_load("k", load))
        for client in (mesh, other)
        for _ in range(50)
    ]
    await eventually(lambda: load.calls)
    await mesh.cache.get("elsewhere")
    load.gate.set()
    assert set(await asyncio.gather(*callers)) == {b"loaded"}
    assert load.calls == 1


async def test_cancelling_callers_the_first_included_fails_nobody_else(mesh: Mesh) -> None:
    load = Loader(held=True)
    callers = [asyncio.create_task(mesh.cache.get_or_load("k", load)) for _ in range(5)]
    await eventually(lambda: load.calls)
    callers[0].cancel()
    callers[3].cancel()
    await asyncio.sleep(0)
    load.gate.set()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert [each for each in results if each == b"loaded"] == [b"loaded"] * 3
    assert load.calls == 1


async def test_a_load_that_all_callers_left_is_finished_and_stored(mesh: Mesh) -> None:
    load = Loader(held=True)
    caller = asyncio.create_task(mesh.cache.get_or_load("k", load))
    await eventually(lambda: load.calls)
    caller.cancel()
    await asyncio.wait((caller,))
    load.gate.set()

    async def is_there() -> bool:
        return (await mesh.cache.get("k")).value == b"loaded"

    await until(is_there)


async def test_each_caller_keeps_its_own_deadline(mesh: Mesh) -> None:
    load = Loader(held=True)
    with call_scope(timeout=0.2):
        first = asyncio.create_task(mesh.cache.get_or_load("k", load))
        await eventually(lambda: load.calls)
    patient = asyncio.create_task(mesh.cache.get_or_load("k", load, timeout=10))
    hasty = asyncio.create_task(mesh.cache.get_or_load("k", load, timeout=0.05))
    for caller in (first, hasty):
        with pytest.raises(DeadlineExceededError):
            await caller
    load.gate.set()
    assert await patient == b"loaded"
    assert load.calls == 1


async def test_the_loader_has_the_scope_of_the_first_caller_without_its_deadline(
    mesh: Mesh,
) -> None:
    seen = []

    async def load() -> bytes:
        seen.append(current_scope())
        return b"v"

    with call_scope(tenant="globex", timeout=5, request_id="r-1"):
        await mesh.cache.get_or_load("k", load)
    (scope,) = seen
    assert (scope.tenant, scope.request_id, scope.deadline) == ("globex", "r-1", None)
    assert (await mesh.cache.get("k", tenant="globex")).hit
    assert not (await mesh.cache.get("k")).hit


async def test_an_error_reaches_those_who_waited_and_the_next_caller_loads_again(
    mesh: Mesh,
) -> None:
    load = Loader(LookupError("no plan"), held=True)
    callers = [asyncio.create_task(mesh.cache.get_or_load("k", load)) for _ in range(3)]
    await eventually(lambda: load.calls)
    load.gate.set()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(each) for each in results] == [LookupError] * 3
    load.value = b"v"
    assert await mesh.cache.get_or_load("k", load, timeout=2) == b"v"
    assert load.calls == 2


async def test_after_an_error_another_process_that_waits_may_load(mesh: Mesh, other: Mesh) -> None:
    failing, working = Loader(LookupError("no plan"), held=True), Loader(b"v")
    first = asyncio.create_task(mesh.cache.get_or_load("k", failing))
    await eventually(lambda: failing.calls)
    second = asyncio.create_task(other.cache.get_or_load("k", working))
    await other.cache.get("elsewhere")
    failing.gate.set()
    with pytest.raises(LookupError):
        await first
    assert await second == b"v"


async def test_a_loader_that_is_cancelled_fails_like_any_other(mesh: Mesh) -> None:
    with pytest.raises(MeshError, match="LOAD_CANCELLED"):
        await mesh.cache.get_or_load("k", Loader(asyncio.CancelledError()))
    assert await mesh.cache.get_or_load("k", Loader(b"v"), timeout=2) == b"v"


async def test_a_stale_value_is_returned_at_once_and_loaded_anew_in_the_background(
    mesh: Mesh,
) -> None:
    await stale(mesh, "k", b"old")
    load = Loader(b"new", held=True)
    for _ in range(3):
        assert await mesh.cache.get_or_load("k", load, timeout=2) == b"old"
    await eventually(lambda: load.calls)
    load.gate.set()

    async def is_new() -> bool:
        return await mesh.cache.get_or_load("k", load) == b"new"

    await until(is_new)
    assert load.calls == 1


async def test_a_caller_that_wants_no_stale_value_waits_for_the_new_one(mesh: Mesh) -> None:
    await stale(mesh, "k", b"old")
    assert await mesh.cache.get_or_load("k", Loader(b"new"), allow_stale=False) == b"new"


async def test_a_refresh_that_fails_is_logged_and_fails_nobody(
    mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    await stale(mesh, "k", b"old")
    with caplog.at_level(logging.ERROR, "agent360.client.cache"):
        load = Loader(LookupError("no plan"))
        assert await mesh.cache.get_or_load("k", load) == b"old"
        await eventually(lambda: caplog.records)
    assert "'k' could not be loaded anew" in caplog.text


async def test_where_the_policy_is_fail_safe_an_old_value_stands_in_for_one_that_fails() -> None:
    async with (
        running("cache", default_policy={"fail_safe_s": 60.0}) as server,
        Mesh.connect(
            cache=server.address, tenant="acme", api_key="", near_cache=NearCache(replica_lag=0.0)
        ) as mesh,
    ):
        await mesh.cache.set("k", b"old", ttl=0.01)

        async def is_over() -> bool:
            return not (await mesh.cache.get("k")).hit

        await until(is_over)
        for _ in range(3):
            load = Loader(LookupError("no plan"))
            assert await mesh.cache.get_or_load("k", load, allow_stale=False) == b"old"
        assert mesh.cache.near_stats.entries == 0
        with pytest.raises(LookupError):
            await mesh.cache.get_or_load("other", Loader(LookupError("no plan")))


async def test_a_fresh_value_is_loaded_anew_before_it_ends_if_that_is_asked_for(
    mesh: Mesh,
) -> None:
    await mesh.cache.set("k", b"old", ttl=60)
    load = Loader(b"new")

    async def is_new() -> bool:
        found = await mesh.cache.get_or_load("k", load, ttl=60, eager_refresh=0.000_01)
        assert found in {b"old", b"new"}
        return found == b"new"

    await until(is_new)


async def test_an_empty_value_and_none_are_values(mesh: Mesh) -> None:
    load = Loader(b"")
    for _ in range(2):
        assert await mesh.cache.get_or_load("empty", load) == b""
    assert load.calls == 1
    load = Loader(None)
    for _ in range(2):
        found = await mesh.cache.get_or_load("none", load, serializer=json_of(Any))
        assert found is None
    assert load.calls == 1


async def test_what_can_no_longer_be_decoded_is_loaded_anew_and_replaced(mesh: Mesh) -> None:
    await mesh.cache.set("k", b'{"of": "an older form"}', ttl=60)
    load = Loader([1, 2])
    for _ in range(3):
        found = await mesh.cache.get_or_load("k", load, serializer=json_of(list[int]))
        assert found == [1, 2]
    assert load.calls == 1
    await stale(mesh, "s", b"neither is this")
    assert await mesh.cache.get_or_load("s", load, serializer=json_of(list[int])) == [1, 2]
    assert (await mesh.cache.get("s")).value == b"[1,2]"


async def test_a_value_too_large_for_a_shared_stream_is_stored(mesh: Mesh) -> None:
    value = bytes(3 * 2**20)
    load = Loader(value)
    assert await mesh.cache.get_or_load("k", load) == value
    assert await mesh.cache.get_or_load("k", load) == value
    assert load.calls == 1


async def test_a_value_that_the_service_refuses_is_returned_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        running("cache", max_value_bytes=1_000) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        load = Loader(bytes(1_001))
        with caplog.at_level(logging.WARNING, "agent360.client.cache"):
            assert len(await mesh.cache.get_or_load("k", load, timeout=2)) == 1_001
            assert len(await mesh.cache.get_or_load("k", load, timeout=2)) == 1_001
        assert "'k' was loaded and could not be stored" in caplog.text


async def test_a_request_that_is_not_valid_is_an_error(mesh: Mesh) -> None:
    with pytest.raises(InvalidRequestError, match="key"):
        await mesh.cache.get_or_load("", Loader())
    with pytest.raises(TypeError, match="serializer"):
        await mesh.cache.get_or_load("k", Loader({"a": 1}))
    with pytest.raises(DeadlineExceededError):
        await mesh.cache.get_or_load("k", Loader(), timeout=0.0)


async def test_where_the_cache_is_away_each_flight_loads_once_and_stores_nothing() -> None:
    async with Mesh.connect(cache=NOBODY, tenant="acme", api_key="", patience=0.1) as mesh:
        load = Loader(held=True)
        callers = [asyncio.create_task(mesh.cache.get_or_load("k", load)) for _ in range(20)]
        await eventually(lambda: load.calls)
        load.gate.set()
        assert set(await asyncio.gather(*callers)) == {b"loaded"}
        assert load.calls == 1
        assert await mesh.cache.get_or_load("k", load) == b"loaded"
        assert load.calls == 2


async def test_a_caller_whose_time_is_half_over_waits_for_no_other_process(
    mesh: Mesh, other: Mesh
) -> None:
    await other.cache.claim("k", fill_timeout=60)
    assert await mesh.cache.get_or_load("k", Loader(b"own"), timeout=0.6) == b"own"


async def test_a_mesh_that_closes_waits_for_flights_and_then_ends_them(server: Server) -> None:
    mesh = Mesh.connect(cache=server.address, tenant="acme", api_key="")
    quick, stuck = Loader(held=True), Loader(held=True)
    callers = [
        asyncio.create_task(mesh.cache.get_or_load("quick", quick)),
        asyncio.create_task(mesh.cache.get_or_load("stuck", stuck)),
    ]
    await eventually(lambda: quick.calls and stuck.calls)
    closing = asyncio.create_task(mesh.close(grace=0.3))
    await asyncio.sleep(0)
    quick.gate.set()
    assert await callers[0] == b"loaded"
    await closing
    with pytest.raises(UnavailableError, match="CLIENT_CLOSED"):
        await callers[1]
    with pytest.raises(UnavailableError, match="CLIENT_CLOSED"):
        await mesh.cache.get_or_load("k", quick)
    async with Mesh.connect(cache=server.address, tenant="acme", api_key="") as other:
        assert (await other.cache.get("quick")).hit


def test_without_a_loop_the_loader_is_a_plain_function_on_another_thread() -> None:
    with embedded_sync(tenant="acme") as mesh:
        calls = []

        def load() -> str:
            calls.append(1)
            mesh.cache.set("seen", b"by the loader")
            return "loaded"

        for _ in range(2):
            assert mesh.cache.get_or_load("k", load, serializer=TEXT) == "loaded"
        assert len(calls) == 1
        assert mesh.cache.get("seen").hit
        *_, last = mesh.cache.warm(["a", "b", "k"], lambda key: key.encode())
        assert (last.warmed, last.skipped, last.failed) == (2, 1, 0)


# ---------------------------------------------------------------- cached


class Plan(BaseModel):
    """What planners make."""

    name: str


class Filter(msgspec.Struct):
    """A structured argument."""

    kind: str
    limit: int = 10


async def test_a_cached_function_is_called_once_for_equal_arguments(mesh: Mesh) -> None:
    calls = []

    @mesh.cache.cached(ttl=60)
    async def plan(number: int, *, name: str = "p") -> Plan | None:
        """Makes a plan."""
        calls.append((number, name))
        return Plan(name=f"{name}{number}") if number else None

    assert [await plan(1), await plan(number=1, name="p")] == [Plan(name="p1")] * 2
    assert [await plan(0), await plan(0)] == [None, None]
    assert await plan(1, name="q") == Plan(name="q1")
    assert calls == [(1, "p"), (0, "p"), (1, "q")]
    assert (plan.__name__, plan.__doc__) == ("plan", "Makes a plan.")


async def test_a_cached_result_is_invalidated_and_refreshed(mesh: Mesh, other: Mesh) -> None:
    load = Loader(1)

    @mesh.cache.cached(key="n:{number}", namespace="numbers", tags=("all", "number:{number}"))
    async def find(number: int) -> int:
        found: int = await load()
        return found

    assert find.key(7) == find.key(number=7) == "n:7"
    assert await find(7) == 1
    entry = await other.cache.get("n:7", namespace="numbers", include_tags=True)
    assert (entry.value, entry.tags) == (b"1", ("all", "number:7"))
    load.value = 2
    assert await find.refresh(7) == 2
    assert await find(7) == 2
    load.value = 3
    assert await find.invalidate(7)
    assert not await find.invalidate(7)
    assert await find(7) == 3


async def test_a_cached_method_leaves_self_out_only_if_told(mesh: Mesh) -> None:
    class Planner:
        def __init__(self, name: str) -> None:
            self.name = name

        @mesh.cache.cached(key=lambda self, number: f"{self.name}:{number}")
        async def plan(self, number: int) -> str:
            return f"{self.name} {number}"

        @mesh.cache.cached(ignore=("self",))
        async def shared(self, number: int) -> str:
            return f"{self.name} {number}"

        @mesh.cache.cached()
        async def whole(self, number: int) -> str:
            return f"{self.name} {number}"

    ana, ben = Planner("ana"), Planner("ben")
    assert [await ana.plan(1), await ben.plan(1)] == ["ana 1", "ben 1"]
    assert ana.plan.key(2) == Planner.plan.key(ana, 2) == "ana:2"
    assert await ana.plan.invalidate(1)
    assert [await ana.shared(1), await ben.shared(1)] == ["ana 1", "ana 1"]
    with pytest.raises(TypeError, match=r"argument 'self' of .*whole .*ignore=\('self',\)"):
        await ana.whole(1)


async def test_automatic_keys_tell_arguments_apart_and_are_the_same_in_all_processes(
    mesh: Mesh,
) -> None:
    @mesh.cache.cached()
    async def find(what: Any, *more: Any, **named: Any) -> str:
        return ""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((1,), {}), (("1",), {}), ((1.0,), {}), ((True,), {}), ((None,), {}), ((b"YWJj",), {}),
        (("WVdKag==",), {}), (([1, 2],), {}), ((1, 2), {}), ((1,), {"a": 2}), (({"a": 1},), {}),
        ((float("nan"),), {}), (("x" * 5_000,), {}), (("x" * 5_001,), {}),
        ((Filter("a"),), {}), ((Plan(name="p"),), {}),
    ]  # fmt: skip
    keys = [find.key(*args, **kwargs) for args, kwargs in calls]
    assert len(set(keys)) == len(keys)
    assert all(len(key) < 500 for key in keys)
    name = f"{__name__}.{find.__qualname__}"
    assert keys[0] == name + ':{"more":[],"named":{},"what":1}'
    assert find.key({"b": 1, "a": 2}) == name + ':{"more":[],"named":{},"what":{"a":2,"b":1}}'
    assert find.key({"b", "a"}) == find.key({"a", "b"})
    assert find.key(Filter("a")) == find.key(Filter("a", 10))
    with pytest.raises(TypeError, match=r"argument 'what' of .*find cannot be part of a key"):
        find.key(object())


async def test_what_cannot_be_cached_is_refused_where_it_is_written(mesh: Mesh) -> None:
    with pytest.raises(TypeError, match="plain is not an asynchronous function"):

        @mesh.cache.cached()  # type: ignore[arg-type]
        def plain() -> str:
            return ""

    with pytest.raises(TypeError, match="no argument 'plan_id'"):

        @mesh.cache.cached(key="plan:{plan_id}")
        async def other(plan: int) -> str:
            return ""

    with pytest.raises(TypeError, match="return annotation"):

        @mesh.cache.cached()
        async def untold(plan: int):  # type: ignore[no-untyped-def]
            return ""

    with pytest.raises(TypeError, match="no argument 'self'"):

        @mesh.cache.cached(ignore=("self",))
        async def function(plan: int) -> str:
            return ""


_meshes: list[Mesh] = []


@cached(lambda: _meshes[0].cache, key="later:{name}", ttl=60)
async def cached_at_import(name: str) -> "Later":
    """Returns what is defined below."""
    return Later(name)


class Later(msgspec.Struct):
    """Is not there yet when the function is decorated."""

    name: str


async def test_a_function_may_be_decorated_before_a_cache_is_connected(mesh: Mesh) -> None:
    _meshes[:] = [mesh]
    assert await cached_at_import("a") == Later("a")
    assert (await mesh.cache.get("later:a")).value == b'{"name":"a"}'
    assert await cached_at_import("a") == Later("a")


# ---------------------------------------------------------------- watching


async def test_a_watch_tells_what_is_written_and_invalidated(mesh: Mesh, other: Mesh) -> None:
    async with mesh.cache.watch(namespaces=["n"]) as events:
        stored = await other.cache.set("k", b"v", namespace="n")
        assert await anext(events) == Invalidation("n", stored.version - 1, keys=("k",))
        await other.cache.set("k", b"v", namespace="elsewhere")
        await other.cache.invalidate(namespace="n", prefix="a")
        await other.cache.invalidate(namespace="n", tags=["x", "y"])
        await other.cache.invalidate(namespace="n")
        seen = [await anext(events) for _ in range(3)]
    assert [type(each) for each in seen] == [Invalidation] * 3
    told = [(each.prefix, each.tags, each.all) for each in seen if isinstance(each, Invalidation)]
    assert told == [("a", (), False), ("", ("x", "y"), False), ("", (), True)]
    with pytest.raises(StopAsyncIteration):
        await anext(events)


async def test_waiting_for_an_event_in_vain_loses_none(mesh: Mesh, other: Mesh) -> None:
    async with mesh.cache.watch() as events:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await anext(events)
        await other.cache.set("k", b"v")
        async with asyncio.timeout(5):
            event = await anext(events)
    assert isinstance(event, Invalidation)
    assert event.keys == ("k",)


async def test_a_watch_that_cannot_be_opened_says_so() -> None:
    async with Mesh.connect(cache=NOBODY, tenant="acme", api_key="", patience=0.1) as mesh:
        with pytest.raises(UnavailableError):
            async with mesh.cache.watch():
                pass


# ---------------------------------------------------------------- warming


async def test_warming_loads_what_is_missing_and_keeps_the_errors(mesh: Mesh) -> None:
    await mesh.cache.set("k1", b"there")
    running_now = most = 0

    async def load(key: str) -> str:
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        await asyncio.sleep(0)
        running_now -= 1
        if key == "k2":
            raise LookupError(key)
        return key

    keys = [f"k{n}" for n in range(20)]
    seen = [
        each async for each in mesh.cache.warm(keys, load, ttl=60, serializer=TEXT, concurrency=4)
    ]
    last = seen[-1]
    assert (last.warmed, last.skipped, last.failed, last.total) == (18, 1, 1, 20)
    ((key, error),) = last.errors
    assert key == "k2"
    assert isinstance(error, LookupError)
    assert 1 < most <= 4
    assert len(seen) == 20
    assert (await mesh.cache.get("k3")).value == b"k3"
    assert (await mesh.cache.get("k1")).value == b"there"
    assert (await mesh.cache.claim("k2", timeout=2)).fill_token


async def test_warming_takes_endless_keys_at_its_pace_and_can_be_left(mesh: Mesh) -> None:
    def keys() -> Any:
        n = 0
        while True:
            n += 1
            yield f"k{n}"

    loop = asyncio.get_running_loop()
    began = loop.time()
    progress = mesh.cache.warm(keys(), Loader(), per_second=100.0)
    async for each in progress:
        assert isinstance(each, Warmed)
        if each.warmed == 11:
            break
    assert loop.time() - began >= 0.1
    await progress.aclose()  # type: ignore[attr-defined]


async def test_a_namespace_is_warmed_from_another(mesh: Mesh) -> None:
    await mesh.cache.set_many((Entry(f"k{n}", b"v") for n in range(250)), namespace="old")
    progress = mesh.cache.warm_from(namespace="new", from_namespace="old")
    seen = [(each.warmed, each.failed, each.total) async for each in progress]
    assert seen[-1] == (250, 0, 250)
    assert len(seen) > 1
    assert (await mesh.cache.get("k249", namespace="new")).value == b"v"


async def test_an_invalidation_puts_entries_in_place_of_what_goes(mesh: Mesh) -> None:
    await mesh.cache.set("a", b"old", namespace="n")
    await mesh.cache.set("b", b"old", namespace="n")
    done = await mesh.cache.invalidate(namespace="n", warm=[Entry("a", b"new", ttl=60)])
    assert done.warmed == 1
    assert (await mesh.cache.get("a", namespace="n")).value == b"new"
    assert not (await mesh.cache.get("b", namespace="n")).hit


async def test_a_namespace_moves_on_with_its_entries_in_place(mesh: Mesh) -> None:
    await mesh.cache.set("gone", b"old", namespace="n")
    keys = [f"k{n}" for n in range(1_500)]

    async def load(key: str) -> bytes:
        return key.encode()

    done = await mesh.cache.invalidate_and_warm(keys, load, namespace="n", ttl=60)
    assert done.warmed == 1_500
    found = await mesh.cache.get_many(keys, namespace="n")
    assert [each.value for each in found if not isinstance(each, MeshError)] == [
        key.encode() for key in keys
    ]
    assert not (await mesh.cache.get("gone", namespace="n")).hit


async def test_nothing_is_removed_if_its_successors_cannot_be_loaded(mesh: Mesh) -> None:
    await mesh.cache.set("k", b"old", namespace="n")
    with pytest.raises(LookupError):
        await mesh.cache.invalidate_and_warm(["k"], Loader(LookupError("k")), namespace="n")
    assert (await mesh.cache.get("k", namespace="n")).value == b"old"


async def test_warming_that_is_left_early_frees_the_keys_it_was_loading() -> None:
    async with connected("cache") as mesh:
        loading = asyncio.Event()

        async def load(key: str) -> bytes:
            loading.set()
            await asyncio.sleep(60)
            return b"never"

        async def warm() -> None:
            async for _ in mesh.cache.warm(["k"], load):
                pass

        task = asyncio.create_task(warm())
        await loading.wait()
        task.cancel()
        await asyncio.wait((task,))
        claim = await mesh.cache.claim("k", timeout=5.0)
        assert claim.fill_token, "and not after the fill timeout of 10 s"
