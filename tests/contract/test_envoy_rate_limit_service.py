"""Envoy's own stubs drive ShouldRateLimit, in a process of their own."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support.servers import running

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
"""

Ask = Callable[..., Awaitable[dict[str, Any]]]


@pytest.fixture
async def ask(tmp_path: Path) -> AsyncIterator[Ask]:
    if not STUBS.is_dir():
        pytest.skip("Envoy's stubs are not at hand (scripts/install-tools.sh)")
    file = tmp_path / "limits.toml"
    _ = file.write_text(LIMITS)
    async with running("ratelimit", limits=file) as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(Path(__file__).with_name("envoy_client.py")), server.address,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(STUBS)},
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        async def ask(*descriptors: Any, domain: str = "edge", hits: int = 0) -> dict[str, Any]:
            rows = [each if isinstance(each, list) else [each] for each in descriptors]
            asked = {"domain": domain, "hits": hits, "descriptors": rows}
            stdin.write(json.dumps(asked).encode() + b"\n")
            async with asyncio.timeout(20):
                answer: dict[str, Any] = json.loads(await stdout.readline())
            return answer

        yield ask
        stdin.close()
        await process.wait()


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
