"""The ratelimit service through the client, over real gRPC."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support.servers import connected, running

from agent360.client import CheckRequest, InvalidRequestError, Mesh, MeshError, call_scope
from agent360.ratelimit.v1 import ratelimit_pb2

LIMITS = """
[[limits]]
id = "searches"
name = "search"
amount = 1000
period = "1h"

[[limits]]
id = "searches"
name = "search"
tenant = "small"
amount = 3
period = "1h"

[[limits]]
id = "tokens"
name = "tokens"
algorithm = "fixed_window"
amount = 1000
period = "10h"
"""


@pytest.fixture
def limits(tmp_path: Path) -> Path:
    file = tmp_path / "limits.toml"
    file.write_text(LIMITS)
    return file


async def test_concurrent_checks_never_slip_past_a_limit(limits: Path) -> None:
    async with connected("ratelimit", limits=limits) as mesh:

        async def client() -> int:
            decisions = [await mesh.ratelimit.check("search") for _ in range(25)]
            return sum(decision.allowed for decision in decisions)

        assert sum(await asyncio.gather(*(client() for _ in range(100)))) == 1_000


async def test_many_checks_are_decided_in_their_order(limits: Path) -> None:
    async with connected("ratelimit", tenant="small", limits=limits) as mesh:
        decisions = await mesh.ratelimit.check_many([CheckRequest("search")] * 5)
        assert [each.allowed for each in decisions] == [True] * 3 + [False] * 2
        assert decisions[-1].limit_id == "searches"
        assert decisions[-1].retry_after_s == pytest.approx(1_200, abs=5)


async def test_reserved_tokens_are_settled_once(limits: Path) -> None:
    async with connected("ratelimit", limits=limits) as mesh:
        reserve = [mesh.ratelimit.reserve("tokens", 100) for _ in range(20)]
        reserved = [each for each in await asyncio.gather(*reserve) if each.decision.allowed]
        assert len(reserved) == 10
        for each in reserved:
            await mesh.ratelimit.settle(each.reservation_id, 40)
        again = await mesh.ratelimit.settle(reserved[0].reservation_id, 40)
        assert (again.repeated, again.remaining) == (True, 600)


async def test_the_id_of_a_trace_makes_no_reservation_free(limits: Path) -> None:
    async with connected("ratelimit", limits=limits) as mesh:
        with call_scope(request_id="constant"):
            made = [await mesh.ratelimit.reserve("tokens", 100) for _ in range(20)]
        assert sum(each.decision.allowed for each in made) == 10


async def test_a_reservation_with_a_request_id_is_made_once(limits: Path) -> None:
    async with connected("ratelimit", limits=limits) as mesh:
        made = [await mesh.ratelimit.reserve("tokens", 100, request_id="r-1") for _ in range(3)]
        assert len({each.reservation_id for each in made}) == 1
        assert (await mesh.ratelimit.check("tokens", hits=0)).remaining == 900


async def test_limits_are_listed_as_the_tenant_has_them(limits: Path) -> None:
    async with connected("ratelimit", tenant="small", limits=limits) as mesh:
        listed = [each async for each in mesh.ratelimit.list_limits(page_size=1)]
        assert [(each.limit_id, each.amount) for each in listed] == [
            ("searches", 3),
            ("tokens", 1_000),
        ]
        masked = [each async for each in mesh.ratelimit.list_limits(fields=["limit_id"])]
        assert [each.amount for each in masked] == [0, 0]
        with pytest.raises(MeshError, match="LIMIT_UNKNOWN"):
            await mesh.ratelimit.get_limit("gone")


async def test_a_malformed_check_is_refused_with_every_fault_named() -> None:
    async with connected("ratelimit") as mesh:
        with pytest.raises(InvalidRequestError) as caught:
            await mesh.ratelimit.check("", descriptor={"tenant": "other", "B!": "x"})
        fields = {violation.field for violation in caught.value.violations}
        assert fields == {"name", "descriptor[tenant]", "descriptor[B!]"}
        assert (await mesh.ratelimit.check("fine")).allowed


async def until(ask: Callable[[], Awaitable[Any]], holds: Callable[[Any], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds(await ask()):  # noqa: ASYNC110 - it is another process as far as we know
            await asyncio.sleep(0.02)


MORE_LIMITS = """
[[limits]]
id = "calls"
name = "call"
algorithm = "fixed_window"
amount = 1000
period = "10h"

[[limits]]
id = "strict-calls"
name = "strict"
amount = 20
period = "10h"
strict = true

[[limits]]
id = "slots"
name = "run"
algorithm = "concurrency"
amount = 8
"""


@pytest.fixture
def more_limits(tmp_path: Path) -> Path:
    file = tmp_path / "more.toml"
    file.write_text(MORE_LIMITS)
    return file


async def test_leased_checks_admit_all_of_the_limit_and_no_more(more_limits: Path) -> None:
    async with connected("ratelimit", limits=more_limits) as mesh:

        async def client() -> int:
            decisions = [await mesh.ratelimit.check("call", leased=True) for _ in range(60)]
            return sum(decision.allowed for decision in decisions)

        assert sum(await asyncio.gather(*(client() for _ in range(20)))) == 1_000


async def test_a_mesh_that_is_closed_gives_its_leases_back(more_limits: Path) -> None:
    async with running("ratelimit", limits=more_limits) as server:
        async with Mesh.connect(ratelimit=server.address, tenant="acme", api_key="") as mesh:
            for _ in range(7):
                assert (await mesh.ratelimit.check("call", leased=True)).allowed
        async with Mesh.connect(ratelimit=server.address, tenant="acme", api_key="") as other:
            assert (await other.ratelimit.check("call", hits=0)).remaining == 993


async def test_unspent_tokens_come_back_when_their_lease_ends(more_limits: Path) -> None:
    async with connected("ratelimit", limits=more_limits, lease_ttl_s=0.2) as mesh:
        assert (await mesh.ratelimit.check("call", leased=True)).allowed
        await until(lambda: mesh.ratelimit.check("call", hits=0), lambda it: it.remaining == 999)


async def test_a_strict_limit_is_asked_about_every_time(more_limits: Path) -> None:
    async with connected("ratelimit", limits=more_limits) as mesh:
        decisions = [await mesh.ratelimit.check("strict", leased=True) for _ in range(25)]
        assert sum(each.allowed for each in decisions) == 20
        assert [each.remaining for each in decisions[:3]] == [19, 18, 17]


async def test_what_is_not_limited_is_leased_without_end() -> None:
    async with connected("ratelimit") as mesh:
        assert (await mesh.ratelimit.check("free", leased=True)).allowed
        decision = mesh.ratelimit.spend("free", hits=1_000_000)
        assert decision is not None
        assert (decision.allowed, decision.limit_id) == (True, "")


async def test_never_more_than_the_slots_are_held(more_limits: Path) -> None:
    async with connected("ratelimit", limits=more_limits) as mesh:
        holding, most, got = 0, 0, 0

        async def worker() -> None:
            nonlocal holding, most, got
            while True:
                slot = await mesh.ratelimit.acquire("run", ttl=30)
                if slot.decision.allowed:
                    break
                await asyncio.sleep(0.01)
            holding += 1
            most, got = max(most, holding), got + 1
            await asyncio.sleep(0.005)
            holding -= 1
            assert await mesh.ratelimit.release(slot.slot_id)

        await asyncio.gather(*(worker() for _ in range(100)))
        assert (most, got) == (8, 100)
        assert (await mesh.ratelimit.acquire("run", slots=8)).decision.allowed


async def test_limits_are_set_listed_used_and_deleted(more_limits: Path) -> None:
    async with connected("ratelimit", limits=more_limits) as mesh:
        limit = ratelimit_pb2.Limit(
            limit_id="fresh",
            name="fresh",
            algorithm=ratelimit_pb2.ALGORITHM_FIXED_WINDOW,
            calendar_period=ratelimit_pb2.CALENDAR_PERIOD_DAY,
            time_zone="Europe/Berlin",
            amount=2,
            per=["tenant", "user"],
        )
        found = await mesh.ratelimit.set_limit(limit)
        assert found.source == ratelimit_pb2.LIMIT_SOURCE_API
        facts = {"user": "ana"}
        allowed = [(await mesh.ratelimit.check("fresh", descriptor=facts)).allowed for _ in "123"]
        assert allowed == [True, True, False]
        usage = await mesh.ratelimit.get_usage("fresh", counted_by=facts)
        assert (usage.used, usage.remaining, usage.denied, usage.peak) == (2, 0, 1, 2)
        listed = [each.limit_id async for each in mesh.ratelimit.list_usage()]
        assert listed == ["fresh"]
        limit.amount = 5
        await mesh.ratelimit.set_limit(limit)
        decision = await mesh.ratelimit.check("fresh", descriptor=facts)
        assert (decision.remaining, decision.limit) == (2, 5), "what was used stays used"
        await mesh.ratelimit.delete_limit("fresh")
        assert (await mesh.ratelimit.check("fresh", descriptor=facts)).limit_id == ""
        limit.limit_id = "calls"
        with pytest.raises(MeshError, match="LIMIT_FROM_FILE"):
            await mesh.ratelimit.set_limit(limit)
        with pytest.raises(MeshError, match="LIMIT_UNKNOWN"):
            await mesh.ratelimit.delete_limit("fresh")
        limit.limit_id, limit.amount = "Wrong!", -1
        with pytest.raises(InvalidRequestError) as caught:
            await mesh.ratelimit.set_limit(limit)
        fields = {violation.field for violation in caught.value.violations}
        assert fields == {"limit.limit_id", "limit.amount"}


async def test_a_changed_file_is_read_and_a_wrong_one_refused(more_limits: Path) -> None:
    async with connected("ratelimit", limits=more_limits) as mesh:
        assert (await mesh.ratelimit.get_limit("calls")).amount == 1_000
        _ = more_limits.write_text(MORE_LIMITS.replace("1000", "2000"))  # noqa: ASYNC240 - small
        await until(lambda: mesh.ratelimit.get_limit("calls"), lambda it: it.amount == 2_000)
        _ = more_limits.write_text(MORE_LIMITS.replace("1000", "none"))  # noqa: ASYNC240 - small
        await asyncio.sleep(1)  # there is nothing to wait for: nothing is to happen
        assert (await mesh.ratelimit.get_limit("calls")).amount == 2_000


async def test_times_to_live_of_more_than_a_day_are_refused(more_limits: Path) -> None:
    async with connected("ratelimit", limits=more_limits) as mesh:
        slot = await mesh.ratelimit.acquire("run", ttl=86_400)
        assert slot.decision.allowed
        for asked in (
            mesh.ratelimit.reserve("call", 1, ttl=86_401),
            mesh.ratelimit.acquire("run", ttl=86_401),
            mesh.ratelimit.renew(slot.slot_id, ttl=86_401),
        ):
            with pytest.raises(InvalidRequestError) as caught:
                await asked
            assert [each.field for each in caught.value.violations] == ["ttl"]
