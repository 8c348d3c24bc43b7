"""Limits on functions and on ASGI applications."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.servers import NOBODY, connected

from agent360.client import (
    InvalidRequestError,
    LimitMiddleware,
    Mesh,
    MeshError,
    RateLimitedError,
    limit,
)
from agent360.client.errors import DeadlineExceededError

LIMITS = """
[[limits]]
id = "per-user"
name = "search"
per = ["tenant", "user"]
amount = 2
period = "1h"

[[limits]]
id = "requests"
name = "http"
amount = 2
period = "1h"
"""


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    file = tmp_path / "limits.toml"
    _ = file.write_text(LIMITS)
    async with connected("ratelimit", limits=file) as mesh:
        yield mesh


async def test_a_limited_function_runs_as_often_as_its_limit_admits(mesh: Mesh) -> None:
    @limit(mesh.ratelimit, "search", descriptor=lambda user, _: {"user": user})
    async def search(user: str, text: str) -> str:
        return f"{user}: {text}"

    assert [await search("ana", text) for text in "ab"] == ["ana: a", "ana: b"]
    with pytest.raises(RateLimitedError) as caught:
        await search("ana", "c")
    assert caught.value.metadata == {"limit_id": "per-user"}
    assert caught.value.retry_after_s == pytest.approx(1_800, abs=10)
    assert await search("ben", "d") == "ben: d"


async def request(app: Any, **headers: str) -> tuple[int, dict[str, str]]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    rows = [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": rows}
    await app(scope, asyncio.Queue().get, send)
    return sent[0]["status"], {key.decode(): value.decode() for key, value in sent[0]["headers"]}


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"1")]})
    await send({"type": "http.response.body", "body": b"hello"})


async def test_an_application_answers_429_with_the_headers_of_the_limit(mesh: Mesh) -> None:
    app = LimitMiddleware(hello, mesh.ratelimit, "http", leased=False)
    status, headers = await request(app)
    assert (status, headers["x-app"]) == (200, "1")
    assert (headers["ratelimit-limit"], headers["ratelimit-remaining"]) == ("2", "1")
    assert (await request(app))[0] == 200
    status, headers = await request(app)
    assert status == 429
    assert headers["ratelimit-remaining"] == "0"
    assert 1_780 <= int(headers["retry-after"]) <= 1_801
    assert (await request(app, x_agent360_tenant="globex"))[0] == 200


@pytest.mark.parametrize(("when_away_open", "expected"), [(True, 200), (False, 503)])
async def test_while_the_service_is_away_it_serves_or_refuses(
    when_away_open: bool, expected: int
) -> None:
    async with Mesh.connect(ratelimit=NOBODY, tenant="acme", api_key="", patience=0.1) as mesh:
        app = LimitMiddleware(hello, mesh.ratelimit, "http", when_away_open=when_away_open)
        assert (await request(app))[0] == expected


class _Failing:
    """A client whose checks fail."""

    def __init__(self, error: MeshError) -> None:
        self._error = error

    async def check(self, name: str, **_: Any) -> Any:
        raise self._error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidRequestError([]), 400),
        (RateLimitedError("slower", retry_after_s=2.5), 429),
        (MeshError(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "busy"), 503),
        (MeshError(grpc.StatusCode.PERMISSION_DENIED, "TENANT_NOT_ALLOWED", "no"), 503),
        (DeadlineExceededError(), 200),
    ],
)
async def test_only_a_service_that_is_away_lets_requests_through(
    error: MeshError, expected: int
) -> None:
    limiter: Any = _Failing(error)
    status, headers = await request(LimitMiddleware(hello, limiter, "http"))
    assert status == expected
    assert headers.get("retry-after") == {429: "3", 503: "1"}.get(expected)


async def test_facts_of_a_request_fit_and_leases_have_none() -> None:
    seen: list[Any] = []

    class Seeing:
        async def check(self, name: str, **rest: Any) -> Any:
            seen.append(rest["descriptor"])
            raise DeadlineExceededError

    limiter: Any = Seeing()
    scope = {"type": "http", "method": "GET", "path": "/" + "\u00e9" * 200, "headers": []}

    async def ignore(_: Any) -> None:
        pass

    for leased in (True, False):
        app = LimitMiddleware(hello, limiter, "http", leased=leased)
        await app(scope, asyncio.Queue().get, ignore)
    assert seen == [None, {"method": "GET", "path": "/" + "\u00e9" * 127}]
