"""Calls that come over HTTP instead of gRPC: the same policies, the same handlers."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import grpc
import structlog
from aiohttp import web

from agent360.client.context import enter_scope
from agent360.client.errors import InvalidRequestError, MeshError, UnavailableError, Violation
from agent360.mesh.runtime.batch import Group
from agent360.mesh.runtime.call import Call, Item, Principal, Priority
from agent360.mesh.runtime.failures import deadline_error, to_mesh_error
from agent360.mesh.runtime.policies import Policies
from agent360.mesh.runtime.policies.authentication import Authenticator
from agent360.mesh.runtime.single import current_group

TENANT_HEADER: Final = "x-agent360-tenant"
PRIORITY_HEADER: Final = "x-agent360-priority"
TIMEOUT_HEADER: Final = "x-agent360-timeout"
REQUEST_ID_HEADER: Final = "x-request-id"

_MAX_REQUEST_ID: Final = 128
_CUT_OFF_S: Final = 1.0
"""How long a call that is cut off at the end of the grace period may take to say so."""

_STRANGER: Final = Principal("", frozenset())
_PRIORITIES: Final = {priority.name.lower(): priority for priority in Priority}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request, and how it wants to be treated."""

    principal: Principal
    """As authentication found out."""
    headers: Mapping[str, str]
    """Of the request; looked up without regard to case."""
    peer: str
    """The caller's address."""
    request_id: str
    """The caller's own, or a new one."""


class HttpCalls:
    """Runs the policies around HTTP requests, so that they are calls like any other.

    The headers are those of gRPC's metadata: ``authorization``, ``x-agent360-tenant``,
    ``x-agent360-priority``, ``traceparent`` and ``x-request-id``; ``x-agent360-timeout`` (seconds)
    stands for gRPC's deadline.

    Example:
        >>> caller = calls.identify(method, request, request_id_of(request))
        >>> body = await calls.run(method, caller, answer)
    """

    def __init__(
        self,
        authenticator: Authenticator,
        policies: Policies,
        is_ready: Callable[[], bool],
        log: structlog.stdlib.BoundLogger,
        *,
        certificates: bool = False,
    ) -> None:
        """Prepares to run calls.

        Args:
            authenticator: that of the gRPC port.
            policies: those of the gRPC port.
            is_ready: whether calls are served yet.
            log: the service's.
            certificates: whether callers must show a client's certificate, as on the gRPC port.
        """
        self._certificates = certificates
        self._authenticator = authenticator
        self._policies = policies
        self._is_ready = is_ready
        self._log = log
        self._running: set[asyncio.Task[object]] = set()
        self._cut_off = False
        self.draining = False
        """Whether new calls are refused because the service is stopping."""

    def identify(self, method: str, request: web.Request, request_id: str) -> Caller:
        """Finds out who makes a request, before anything of its body is read.

        Args:
            method: full name of the RPC that the request stands for.
            request: whose body has not been read yet.
            request_id: as ``request_id_of`` says.

        Raises:
            MeshError: UNAUTHENTICATED.
        """
        headers, peer = request.headers, f"http:{request.remote}"
        try:
            if self._certificates:
                _require_certificate(request)
            principal = self._authenticator.authenticate(headers.get("authorization"))
        except MeshError as error:
            stranger = Call(method, _STRANGER, "", math.inf, request_id=request_id, peer=peer)
            self._policies.turned_away(Group(stranger, "", None), error.code)
            raise
        return Caller(principal, headers, peer, request_id)

    async def run(
        self,
        method: str,
        caller: Caller,
        work: Callable[[Call], Awaitable[T]],
        default_tenant: str = "",
    ) -> T:
        """Admits a call, does its work before its deadline, and tells the policies how it ended.

        Args:
            method: full name of the RPC that the request stands for; quotas go by it.
            caller: as ``identify`` found out.
            work: does what is asked.
            default_tenant: tenant of a caller that names none, has not just one, and may speak
                for this one.

        Raises:
            MeshError: the call was refused, or failed.
            asyncio.CancelledError: the caller went away.
        """
        group = _group_of_one(method, caller, default_tenant)
        task = asyncio.current_task()
        if task is not None:
            self._running.add(task)
        try:
            self._refuse_if_away()
            group.call.deadline = _deadline(caller.headers)
            pending = self._policies.begin(group)
            if pending is not None:
                await pending
            group.raise_if_refused()
            current_group.set(group)
            enter_scope(group.scope())
            async with asyncio.timeout_at(group.call.deadline):
                result = await work(group.call)
        except asyncio.CancelledError as error:
            if not self._cut_off:
                self._end(group, grpc.StatusCode.CANCELLED)
                raise
            self._end(group, grpc.StatusCode.UNAVAILABLE)
            raise _stopping() from error
        except BaseException as error:
            late = isinstance(error, TimeoutError) and group.call.deadline <= time.monotonic()
            failure = deadline_error() if late else to_mesh_error(error, method, self._log)
            self._end(group, failure.code)
            if failure is error:
                raise
            raise failure from error
        finally:
            if task is not None:
                self._running.discard(task)
        self._end(group, grpc.StatusCode.OK)
        return result

    def refuse(self) -> None:
        """Refuses new calls from now on: the service is stopping."""
        self.draining = True

    async def drain(self, grace_s: float) -> None:
        """Waits for the calls in progress, and cuts off what the grace period leaves of them."""
        self.refuse()
        if self._running:
            await asyncio.wait(self._running, timeout=grace_s)
        self._cut_off = True
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running, timeout=_CUT_OFF_S)

    def _refuse_if_away(self) -> None:
        if self.draining:
            raise _stopping()
        if not self._is_ready():
            raise UnavailableError(
                "the service is starting: no backend answers yet",
                reason="STARTING",
                retry_after_s=1.0,
            )

    def _end(self, group: Group, code: grpc.StatusCode) -> None:
        if not group.passed:
            self._policies.turned_away(group, code)
            return
        self._policies.finish(group, code, group.left, time.perf_counter() - group.started)


def request_id_of(request: web.Request) -> str:
    """The caller's name for its request, or a new one."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    return given if 0 < len(given) <= _MAX_REQUEST_ID and given.isascii() else str(uuid.uuid4())


def _require_certificate(request: web.Request) -> None:
    """Refuses callers without a client certificate; one that is there has been verified."""
    if not request.get_extra_info("peercert"):
        raise MeshError(
            grpc.StatusCode.UNAUTHENTICATED,
            "CERTIFICATE_MISSING",
            "this service asks its callers for a client certificate",
        )


def _plain(value: str) -> str:
    """A header as gRPC's metadata have it: ASCII alone."""
    return value if value.isascii() else value.encode("ascii", "replace").decode()


def _group_of_one(method: str, caller: Caller, default_tenant: str) -> Group:
    headers, principal = caller.headers, caller.principal
    tenant = _plain(headers.get(TENANT_HEADER, ""))
    if not tenant and not principal.only_tenant and principal.may_speak_for(default_tenant):
        tenant = default_tenant
    call = Call(
        method=method,
        principal=principal,
        tenant=tenant,
        deadline=math.inf,
        priority=_PRIORITIES.get(headers.get(PRIORITY_HEADER, "").lower(), Priority.NORMAL),
        traceparent=_plain(headers.get("traceparent", "")),
        request_id=caller.request_id,
        peer=caller.peer,
    )
    group = Group(call, "", None)
    group.items.append(Item(1, call, None, group))
    group.size = group.left = 1
    return group


def _deadline(headers: Mapping[str, str]) -> float:
    given = headers.get(TIMEOUT_HEADER)
    if given is None:
        return math.inf
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidRequestError(
            [Violation(f"header {TIMEOUT_HEADER}", "must be a positive number of seconds")]
        )
    return time.monotonic() + seconds


def _stopping() -> UnavailableError:
    return UnavailableError("the service is stopping", reason="STOPPING", retry_after_s=1.0)
