"""Limits on functions and on ASGI applications."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, Final, ParamSpec, TypeVar

import grpc

from agent360.client.decisions import Decision, Descriptor
from agent360.client.errors import MeshError, QuotaViolation, RateLimitedError
from agent360.client.ratelimit import RateLimitClient

P = ParamSpec("P")
R = TypeVar("R")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_TENANT_HEADER: Final = b"x-agent360-tenant"
_MAX_FACT_BYTES: Final = 256
_AWAY: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def limit(
    limiter: RateLimitClient,
    name: str,
    *,
    hits: int = 1,
    descriptor: Descriptor | Callable[P, Descriptor] | None = None,
    leased: bool = True,
    tenant: str | None = None,
) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R]]]:
    """Makes a coroutine function ask before it runs.

    Example:
        >>> @limit(mesh.ratelimit, "search", descriptor=lambda user, text: {"user": user})
        ... async def search(user: str, text: str) -> list[str]: ...

    Args:
        limiter: decides.
        name: what the function does; limits are matched by it.
        hits: how much a call is charged.
        descriptor: facts for matching, or what makes them of the call's arguments.
        leased: whether tokens may be leased; see ``RateLimitClient.check``.
        tenant: on whose behalf; None: that of the current scope, or the Mesh's.

    Returns:
        A decorator; the decorated function raises RateLimitedError instead of running.
    """

    def decorate(function: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
        @functools.wraps(function)
        async def limited(*args: P.args, **kwargs: P.kwargs) -> R:
            facts = descriptor(*args, **kwargs) if callable(descriptor) else descriptor
            decision = await limiter.check(
                name, hits=hits, descriptor=facts, leased=leased, tenant=tenant
            )
            if not decision.allowed:
                raise denial(name, decision)
            return await function(*args, **kwargs)

        return limited

    return decorate


class LimitMiddleware:
    """Limits the HTTP requests of an ASGI application.

    A denied request is answered with 429 and, where it is known when to come back, Retry-After;
    every answer says RateLimit-Limit, RateLimit-Remaining and RateLimit-Reset (seconds). While the
    ratelimit service is away, requests are let through, or answered with 503. What it refuses to
    decide is not served: 400 where the facts are malformed, 429 where the application itself asks
    too often, else 503.

    Example:
        >>> app = LimitMiddleware(app, mesh.ratelimit, "http.requests")
    """

    def __init__(
        self,
        app: Application,
        limiter: RateLimitClient,
        name: str,
        *,
        descriptor: Callable[[Scope], Descriptor | None] | None = None,
        tenant: Callable[[Scope], str | None] | None = None,
        leased: bool = True,
        when_away_open: bool = True,
    ) -> None:
        """Wraps an application.

        Args:
            app: the application.
            limiter: decides.
            name: what a request is; limits are matched by it.
            descriptor: makes the facts of a request, as few as limits need: tokens are leased
                apart for each. None: no facts if leased, else ``method`` and ``path`` (its first
                256 bytes).
            tenant: says on whose behalf; None: the header ``x-agent360-tenant``, which must be
                set by a gateway that callers cannot avoid, or the Mesh's.
            leased: whether tokens may be leased.
            when_away_open: whether requests are served while the service is away.
        """
        self._app = app
        self._limiter = limiter
        self._name = name
        self._descriptor = descriptor or (_no_facts if leased else _method_and_path)
        self._tenant = tenant or _tenant_of
        self._leased = leased
        self._open = when_away_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            decision = await self._limiter.check(
                self._name,
                descriptor=self._descriptor(scope),
                leased=self._leased,
                tenant=self._tenant(scope),
            )
        except MeshError as error:
            if self._open and error.code in _AWAY:
                await self._app(scope, receive, send)
            else:
                await _refuse(send, _status_of(error), error.reason, _retry_after(error))
            return
        headers = list(rate_limit_headers(decision).items())
        if not decision.allowed:
            await _refuse(send, 429, "RATE_LIMITED", headers)
            return
        added = _encoded(headers)

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self._app(scope, receive, send_with_headers)


def rate_limit_headers(decision: Decision) -> Mapping[str, str]:
    """HTTP headers that tell a caller of a decision; none if no limit applies."""
    if not decision.limit_id:
        return {}
    headers = {
        "ratelimit-limit": str(decision.limit),
        "ratelimit-remaining": str(decision.remaining),
        "ratelimit-reset": str(math.ceil(decision.reset_after_s)),
    }
    if not decision.allowed and decision.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(decision.retry_after_s)))
    return headers


def denial(name: str, decision: Decision) -> RateLimitedError:
    """The error of a denied request."""
    wait_s = decision.retry_after_s
    hint = "" if wait_s is None else f"; try again in {wait_s:.3g} s"
    return RateLimitedError(
        f"limit {decision.limit_id!r} of {name!r} is exhausted{hint}",
        metadata={"limit_id": decision.limit_id},
        retry_after_s=wait_s,
        quotas=[QuotaViolation(name, f"limit {decision.limit_id}")],
    )


def _no_facts(_: Scope) -> None:
    return None


def _method_and_path(scope: Scope) -> Descriptor:
    path = str(scope["path"]).encode(errors="replace")[:_MAX_FACT_BYTES]
    return {"method": str(scope["method"]), "path": path.decode(errors="ignore")}


def _status_of(error: MeshError) -> int:
    if isinstance(error, RateLimitedError):
        return 429
    return 400 if error.code is grpc.StatusCode.INVALID_ARGUMENT else 503


def _retry_after(error: MeshError) -> Iterable[tuple[str, str]]:
    if error.code is grpc.StatusCode.INVALID_ARGUMENT:
        return ()
    return (("retry-after", str(max(1, math.ceil(error.retry_after_s or 1)))),)


def _tenant_of(scope: Scope) -> str | None:
    for key, value in scope["headers"]:
        if key == _TENANT_HEADER:
            return str(value.decode("latin-1"))
    return None


def _encoded(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers]


async def _refuse(send: Send, status: int, reason: str, headers: Iterable[tuple[str, str]]) -> None:
    body = json.dumps({"error": reason}).encode()
    content = (("content-type", "application/json"), ("content-length", str(len(body))))
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": _encoded((*content, *headers)),
        }
    )
    await send({"type": "http.response.body", "body": body})
