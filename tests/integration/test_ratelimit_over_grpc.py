"""The ratelimit service through the client, over real gRPC."""

import asyncio
from pathlib import Path

import pytest
from support.servers import connected

from agent360.client import CheckRequest, InvalidRequestError, MeshError

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
