"""Envoy's own stubs drive ShouldRateLimit, in a process of their own."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.redis_servers import RedisServer
from support.servers import running

from agent360.client import Mesh
from agent360.mesh.runtime.policies.authentication import hash_key
from agent360.ratelimit.v1 import ratelimit_pb2

ROOT = Path(__file__).parents[2]
STUBS = ROOT / ".cache/xds-protos"
LIMITS = """
[[limits]]
id = "per-path"
name = "edge"
match = { path = "*" }
per = ["tenant", "path"]
algorithm = "fixed_window"
amount = 5
period = "week"

[[limits]]
id = "per-address"
name = "edge"
match = { remote_address = "*" }
per = ["tenant", "remote_address"]
amount = 3
period = "1h"

[[limits]]
id = "per-plan"
name = "planned"
per = ["tenant", "entry.plan", "generic_key", "generic_key.2"]
amount = 2
period = "10h"
"""

Ask = Callable[..., Awaitable[dict[str, Any]]]


@asynccontextmanager
async def envoy(address: str) -> AsyncIterator[Ask]:
    if not STUBS.is_dir():
        pytest.skip("Envoy's stubs are not at hand (scripts/install-tools.sh)")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__).with_name("envoy_client.py")), address,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(STUBS)},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    async def ask(
        *descriptors: Any, domain: str = "edge", hits: int = 0, **metadata: str
    ) -> dict[str, Any]:
        rows = [each if isinstance(each, list) else [each] for each in descriptors]
        asked = {"domain": domain, "hits": hits, "descriptors": rows}
        asked["metadata"] = {name.replace("_", "-"): value for name, value in metadata.items()}
        stdin.write(json.dumps(asked).encode() + b"\n")
        async with asyncio.timeout(20):
            answer: dict[str, Any] = json.loads(await stdout.readline())
        return answer

    yield ask
    stdin.close()
    await process.wait()


@pytest.fixture
def limits(tmp_path: Path) -> Path:
    file = tmp_path / "limits.toml"
    _ = file.write_text(LIMITS)
    return file


@pytest.fixture
async def ask(limits: Path) -> AsyncIterator[Ask]:
    async with running("ratelimit", limits=limits) as server, envoy(server.address) as ask:
        yield ask


async def test_requests_are_admitted_up_to_the_limit_and_told_when_to_come_back(ask: Ask) -> None:
    answers = [await ask({"path": "/a"}) for _ in range(6)]
    codes = [each["overallCode"] for each in answers]
    assert codes == ["OK"] * 5 + ["OVER_LIMIT"]
    (status,) = answers[0]["statuses"]
    assert status["currentLimit"] == {"name": "per-path", "requestsPerUnit": 5, "unit": "WEEK"}
    assert status["limitRemaining"] == 4
    headers = {each["key"]: each["value"] for each in answers[-1]["responseHeadersToAdd"]}
    assert headers["ratelimit-limit"] == "5"
    assert headers["ratelimit-remaining"] == "0"
    assert int(headers["retry-after"]) > 0
    assert (await ask({"path": "/b"}))["overallCode"] == "OK"
    assert (await ask({"path": "/a", "tenant": "acme"}))["overallCode"] == "OK"


async def test_a_denied_request_charges_none_of_its_descriptors(ask: Ask) -> None:
    address, path = {"remote_address": "10.0.0.1"}, {"path": "/c"}
    answers = [await ask(address, path) for _ in range(5)]
    assert [each["overallCode"] for each in answers] == ["OK"] * 3 + ["OVER_LIMIT"] * 2
    assert [each["code"] for each in answers[-1]["statuses"]] == ["OVER_LIMIT", "OK"]
    look = await ask([path, 0])
    assert look["statuses"][0]["limitRemaining"] == 2


async def test_hits_are_those_of_the_descriptor_or_of_the_request(ask: Ask) -> None:
    assert (await ask({"path": "/d"}, hits=4))["statuses"][0]["limitRemaining"] == 1
    assert (await ask([{"path": "/d"}, 2], hits=1))["overallCode"] == "OVER_LIMIT"
    assert (await ask([{"path": "/d"}, 1], hits=9))["overallCode"] == "OK"


async def test_what_no_limit_matches_is_admitted_and_what_is_malformed_refused(ask: Ask) -> None:
    answer = await ask({"anything": "x"})
    assert answer["overallCode"] == "OK"
    assert "responseHeadersToAdd" not in answer
    assert (await ask(domain=""))["error"] == "INVALID_ARGUMENT"


async def test_a_long_value_is_limited_and_told_apart_by_its_end(ask: Ask) -> None:
    long = "/search?q=" + "x" * 2_000
    answers = [await ask({"path": long}) for _ in range(6)]
    assert [each["overallCode"] for each in answers] == ["OK"] * 5 + ["OVER_LIMIT"]
    assert (await ask({"path": long + "y"}))["overallCode"] == "OK"
    keyed = {"header-" + "k" * 100: "v", "path": long}
    assert (await ask(keyed))["overallCode"] == "OVER_LIMIT"


async def test_entries_named_plan_or_like_another_are_facts_of_their_own(ask: Ask) -> None:
    def entries(plan: str, first: str, second: str) -> list[Any]:
        return [[["plan", plan], ["generic_key", first], ["generic_key", second]]]

    for _ in range(2):
        assert (await ask(entries("gold", "a", "b"), domain="planned"))["overallCode"] == "OK"
    denied = await ask(entries("gold", "a", "b"), domain="planned")
    assert denied["overallCode"] == "OVER_LIMIT"
    for others in (("silver", "a", "b"), ("gold", "c", "b"), ("gold", "a", "c")):
        assert (await ask(entries(*others), domain="planned"))["overallCode"] == "OK"


async def test_a_limit_that_a_descriptor_brings_decides_in_place_of_the_configured(
    ask: Ask,
) -> None:
    row = [{"path": "/own"}, None, [7, "DAY"]]
    answers = [await ask(row) for _ in range(8)]
    assert [each["overallCode"] for each in answers] == ["OK"] * 7 + ["OVER_LIMIT"]
    (status,) = answers[0]["statuses"]
    assert status["currentLimit"] == {"requestsPerUnit": 7, "unit": "DAY"}
    assert status["limitRemaining"] == 6
    assert (await ask({"path": "/own"}))["statuses"][0]["limitRemaining"] == 4
    raised = [{"path": "/own"}, None, [9, "DAY"]]
    assert (await ask(raised))["statuses"][0]["limitRemaining"] == 1
    assert (await ask(row, domain="elsewhere"))["overallCode"] == "OK"
    assert (await ask([{"path": "/none"}, None, [0, "MONTH"]]))["overallCode"] == "OVER_LIMIT"
    wrong = await ask([{"path": "/own"}, None, [7, "UNKNOWN"]])
    assert wrong["error"] == "INVALID_ARGUMENT"
    assert "descriptors[0].limit.unit" in wrong["details"]


async def test_a_limit_of_a_descriptor_is_counted_by_all_replicas_and_outlives_a_change(
    limits: Path,
) -> None:
    async with (
        RedisServer() as redis,
        running("ratelimit", limits=limits, store=redis.url) as first,
        running("ratelimit", limits=limits, store=redis.url) as second,
        envoy(first.address) as ask_first,
        envoy(second.address) as ask_second,
        Mesh.connect(ratelimit=first.address, tenant="acme", api_key="") as mesh,
    ):
        row = [{"path": "/own"}, None, [3, "YEAR"]]
        assert (await ask_first(row))["overallCode"] == "OK"
        limit = ratelimit_pb2.Limit(
            limit_id="new", name="new", amount=5, algorithm=ratelimit_pb2.ALGORITHM_TOKEN_BUCKET
        )
        limit.period.seconds = 3_600
        await mesh.ratelimit.set_limit(limit)
        codes = [(await ask_second(row))["overallCode"] for _ in range(3)]
        assert codes == ["OK", "OK", "OVER_LIMIT"]
        assert (await ask_first(row))["overallCode"] == "OVER_LIMIT"


async def test_a_key_of_several_tenants_says_for_which_it_speaks(limits: Path) -> None:
    keys = [
        {"name": "edge", "sha256": hash_key("edge-key"), "tenants": ["acme", "globex"]},
        {"name": "own", "sha256": hash_key("own-key"), "tenants": ["envoy", "acme"]},
    ]
    async with (
        running("ratelimit", limits=limits, authentication={"keys": keys}) as server,
        envoy(server.address) as ask,
    ):
        path, edge = {"path": "/a"}, "Bearer edge-key"
        refused = await ask(path, authorization=edge)
        assert refused["error"] == "INVALID_ARGUMENT"
        assert "x-agent360-tenant" in refused["details"]
        named = await ask(path, authorization=edge, x_agent360_tenant="acme")
        assert named["overallCode"] == "OK"
        other = {**path, "tenant": "globex"}
        for _ in range(5):
            answer = await ask(other, authorization=edge, x_agent360_tenant="acme")
            assert answer["overallCode"] == "OK"
        strange = {**path, "tenant": "initech"}
        denied = await ask(strange, authorization=edge, x_agent360_tenant="acme")
        assert denied["error"] == "PERMISSION_DENIED"
        assert (await ask(path, authorization="Bearer own-key"))["overallCode"] == "OK"
