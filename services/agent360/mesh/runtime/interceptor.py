"""The gRPC server interceptor: runs the policies around every RPC of the mesh's services."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc
import structlog

from agent360.client.context import enter_scope
from agent360.client.errors import MeshError
from agent360.mesh.runtime.batch import Group
from agent360.mesh.runtime.call import Call, Item, Principal
from agent360.mesh.runtime.failures import abort, deadline_error, to_mesh_error
from agent360.mesh.runtime.pipeline import PRIORITIES
from agent360.mesh.runtime.policies import Policies, Policy
from agent360.mesh.runtime.policies.authentication import Authenticator
from agent360.mesh.runtime.single import current_group

_PREFIX: Final = "/agent360."
_CHANNELZ: Final = "/grpc.channelz."
_LOCAL_PEERS: Final = ("ipv4:127.", "ipv6:%5B::1%5D:", "ipv6:[::1]:", "unix:")
_STRANGER: Final = Principal("", frozenset())
_ITEMS_NAME_TENANTS: Final = ("/Pipeline", "/Report")
_OK: Final = grpc.StatusCode.OK
_MAX_TIME_REMAINING_S: Final = 10 * 365 * 86_400.0


@dataclass(frozen=True, slots=True)
class Compression:
    """When answers are compressed."""

    algorithm: grpc.Compression
    """How."""
    min_bytes: int
    """Smaller ones are not."""


class PolicyInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates RPCs and runs the policies for all four arities.

    A unary request is one call. A stream that lives as long as its caller wants (Pipeline, Watch,
    Report) is authenticated and, unless its items name their tenants themselves, authorised; it
    has no deadline and takes no quota.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        policies: Policies,
        authorization: Policy,
        *,
        long_lived: frozenset[str],
        compression: Compression | None,
        log: structlog.stdlib.BoundLogger,
        default_tenants: Mapping[str, str] | None = None,
    ) -> None:
        self._authenticator = authenticator
        self._policies = policies
        self._authorization = authorization
        self._long_lived = long_lived
        self._compression = compression
        self._log = log
        self._default_tenants = default_tenants or {}
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        """Wraps the handler of an RPC; once for each method."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            if method.startswith(_PREFIX) or method in self._default_tenants:
                wrapped = self._wrap(method, handler)
            elif method.startswith(_CHANNELZ):
                wrapped = self._for_operators(method, handler)
            else:
                wrapped = handler
            self._wrapped[method] = wrapped
        return wrapped

    def _for_operators(self, method: str, handler: Any) -> Any:
        """Channelz shows every connection: to callers on this machine, and to admins."""

        async def behave(request: Any, context: Any) -> Any:
            if not context.peer().startswith(_LOCAL_PEERS):
                call = await self._identify(method, context)
                if not call.principal.admin:
                    await abort(
                        context,
                        MeshError(
                            grpc.StatusCode.PERMISSION_DENIED,
                            "ADMIN_ONLY",
                            "channelz is shown to admins and to callers on the same machine",
                        ),
                    )
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(
            behave, handler.request_deserializer, handler.response_serializer
        )

    def _wrap(self, method: str, handler: Any) -> Any:
        serializers = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(method, handler.unary_unary), *serializers
            )
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(
                self._unary(method, handler.stream_unary), *serializers
            )
        if handler.stream_stream is not None:
            behave = handler.stream_stream
            return grpc.stream_stream_rpc_method_handler(
                self._lasting(method, behave)
                if method in self._long_lived
                else self._streaming(method, behave),
                *serializers,
            )
        behave = handler.unary_stream
        return grpc.unary_stream_rpc_method_handler(
            self._lasting(method, behave)
            if method in self._long_lived
            else self._streaming(method, behave),
            *serializers,
        )

    # ---------------------------------------------------------------- the three ways to run

    def _unary(self, method: str, inner: Any) -> Any:
        async def behave(request: Any, context: Any) -> Any:
            group = await self._admit(method, context)
            try:
                async with asyncio.timeout_at(group.call.deadline):
                    response = await inner(request, context)
            except BaseException as error:
                await self._fail(group, context, error)
                raise
            if self._compression is not None and response.ByteSize() >= self._compression.min_bytes:
                # gRPC heeds the choice only in metadata that are sent before the response.
                context.set_compression(self._compression.algorithm)
                await context.send_initial_metadata(())
            self._policies.finish(group, _OK, 1, time.perf_counter() - group.started)
            return response

        return behave

    def _streaming(self, method: str, inner: Any) -> Any:
        async def behave(request: Any, context: Any) -> AsyncIterator[Any]:
            group = await self._admit(method, context)
            try:
                async with asyncio.timeout_at(group.call.deadline):
                    async for response in inner(request, context):
                        yield response
            except GeneratorExit:
                self._end(group, grpc.StatusCode.CANCELLED)
                raise
            except BaseException as error:
                await self._fail(group, context, error)
                raise
            self._end(group, _OK)

        return behave

    def _lasting(self, method: str, inner: Any) -> Any:
        """A stream that is not a call: let in, then left to its handler."""

        items_name_tenants = method.endswith(_ITEMS_NAME_TENANTS)

        async def identify(context: Any) -> None:
            group = Group(await self._identify(method, context), "", None)
            if not items_name_tenants:
                try:
                    self._authorization.before(group)
                except MeshError as error:
                    await abort(context, error)
            current_group.set(group)
            enter_scope(group.scope()._replace(deadline=None))

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            await identify(context)
            try:
                async for response in inner(request, context):
                    yield response
            except Exception as error:
                await self._abort(context, method, error)
                raise

        async def run(request: Any, context: Any) -> None:
            await identify(context)
            try:
                await inner(request, context)
            except Exception as error:
                await self._abort(context, method, error)
                raise

        return generate if inspect.isasyncgenfunction(inner) else run

    async def _abort(self, context: Any, method: str, error: Exception) -> None:
        if not isinstance(error, grpc.aio.AbortError):
            await abort(context, to_mesh_error(error, method, self._log))

    # ---------------------------------------------------------------- steps

    async def _identify(self, method: str, context: Any) -> Call:
        """Builds the call from metadata; aborts where authentication fails."""
        metadata = dict(context.invocation_metadata() or ())
        try:
            principal = self._authenticator.authenticate(metadata.get("authorization"))
        except MeshError as error:
            stranger = _call(method, {}, _STRANGER, context)
            self._policies.turned_away(Group(stranger, "", None), error.code)
            await abort(context, error)
        call = _call(method, metadata, principal, context)
        if not call.tenant and not principal.only_tenant:
            default = self._default_tenants.get(method, "")
            if principal.may_speak_for(default):
                call.tenant = default
        return call

    async def _admit(self, method: str, context: Any) -> Group:
        group = Group(await self._identify(method, context), "", None)
        call = group.call
        group.items.append(Item(1, call, None, group))
        group.size = group.left = 1
        try:
            pending = self._policies.begin(group)
            if pending is not None:
                await pending
            group.raise_if_refused()
        except BaseException as error:
            await self._fail(group, context, error)
            raise
        current_group.set(group)
        enter_scope(group.scope())
        return group

    async def _fail(self, group: Group, context: Any, error: BaseException) -> None:
        """Reports a failure to the policies and ends the RPC with it."""
        if isinstance(error, grpc.aio.AbortError):
            self._end(group, context.code() or grpc.StatusCode.UNKNOWN)
            return
        if isinstance(error, asyncio.CancelledError):
            late = group.call.deadline <= time.monotonic()
            self._end(
                group, grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            )
            return
        if isinstance(error, TimeoutError) and group.call.deadline <= time.monotonic():
            mesh_error = deadline_error()
        else:
            mesh_error = to_mesh_error(error, group.call.method, self._log)
        self._end(group, mesh_error.code)
        await abort(context, mesh_error)

    def _end(self, group: Group, code: grpc.StatusCode) -> None:
        self._policies.finish(group, code, group.left, time.perf_counter() - group.started)


def _call(method: str, metadata: dict[str, Any], principal: Principal, context: Any) -> Call:
    remaining = context.time_remaining()
    bounded = remaining is not None and remaining < _MAX_TIME_REMAINING_S
    priority = metadata.get("x-agent360-priority", "")
    return Call(
        method=method,
        principal=principal,
        tenant=metadata.get("x-agent360-tenant", ""),
        deadline=time.monotonic() + remaining if bounded else math.inf,
        priority=_PRIORITY_BY_NAME.get(priority.lower(), PRIORITIES[0]),
        traceparent=metadata.get("traceparent", ""),
        request_id=metadata.get("x-request-id", ""),
        peer=context.peer(),
    )


_PRIORITY_BY_NAME: Final = {priority.name.lower(): priority for priority in PRIORITIES}
