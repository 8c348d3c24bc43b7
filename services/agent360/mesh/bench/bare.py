"""Bare gRPC: the same messages built and the same fields read on both ends, and no other work.

``python -m agent360.mesh.bench.bare PORT`` serves; the clients are used by the benchmarks.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc

from agent360.cache.v1 import cache_pb2
from agent360.client.channel import open_channel, server_options
from agent360.ratelimit.v1 import ratelimit_pb2

USER: Final = "u1"
NAME: Final = "bench"
NAMESPACE: Final = "bench"
VALUE: Final = b"x" * 100


@dataclass(frozen=True, slots=True)
class Subject:
    """One hot method, as bare code sees it."""

    key: str
    """Prefix in the results."""
    title: str
    """For people."""
    service: str
    """Full name of the gRPC service."""
    method: str
    """The RPC."""
    field: str
    """The operation in PipelineItem."""
    modules: Any
    """Its generated module."""
    fill_request: Callable[[Any, int], None]
    """Builds request number i in place."""
    read_request: Callable[[Any], None]
    """Reads all that was filled."""
    fill_response: Callable[[Any], None]
    """Builds a response in place."""
    read_response: Callable[[Any], None]
    """Reads all that was filled."""


def _fill_check(request: Any, _: int) -> None:
    request.name = NAME
    request.descriptor["user"] = USER


def _read_check(request: Any) -> None:
    _ = request.name
    _ = request.hits if request.HasField("hits") else 1
    for _ in request.descriptor.items():
        pass
    _ = request.allow_partial


def _fill_decision(response: Any) -> None:
    decision = response.decision
    decision.allowed = True
    decision.granted = 1
    decision.remaining = 99
    decision.limit = 100
    decision.limit_id = NAME
    decision.reset_after.nanos = 500


def _read_decision(response: Any) -> None:
    decision = response.decision
    reset = decision.reset_after
    _ = (
        decision.allowed,
        decision.granted,
        decision.remaining,
        decision.limit,
        reset.seconds,
        reset.nanos,
        decision.limit_id,
        decision.degraded,
    )


def _fill_get(request: Any, number: int) -> None:
    request.namespace = NAMESPACE
    request.key = key_of(number)


def _read_get(request: Any) -> None:
    _ = (request.namespace, request.key, request.allow_stale, request.include_tags)


def _fill_lookup(response: Any) -> None:
    lookup = response.lookup
    lookup.outcome = cache_pb2.OUTCOME_HIT
    lookup.value = VALUE
    lookup.version = 7
    lookup.ttl.seconds = 60


def _read_lookup(response: Any) -> None:
    lookup = response.lookup
    ttl = lookup.ttl
    _ = (
        lookup.outcome,
        lookup.value,
        lookup.content_type,
        lookup.version,
        ttl.seconds,
        ttl.nanos,
        tuple(lookup.tags),
        lookup.degraded,
    )


KEYS: Final = 1_000
_KEYS: Final = tuple(f"key-{number}" for number in range(KEYS))


def key_of(number: int) -> str:
    """Key number i of the benchmark's entries."""
    return _KEYS[number % KEYS]


CHECK: Final = Subject(
    "ratelimit_check",
    "ratelimit Check",
    "agent360.ratelimit.v1.RateLimitService",
    "Check",
    "check",
    ratelimit_pb2,
    _fill_check,
    _read_check,
    _fill_decision,
    _read_decision,
)

GET: Final = Subject(
    "cache_get",
    "cache Get",
    "agent360.cache.v1.CacheService",
    "Get",
    "get",
    cache_pb2,
    _fill_get,
    _read_get,
    _fill_lookup,
    _read_lookup,
)


class BareClient:
    """Calls a bare server."""

    def __init__(self, subject: Subject, address: str) -> None:
        self._subject = subject
        self._channel = open_channel(address)
        modules = subject.modules
        self._request_class = getattr(modules, f"{subject.method}Request")
        self._frame_class = modules.PipelineRequest
        self._unary = self._channel.unary_unary(
            f"/{subject.service}/{subject.method}",
            request_serializer=self._request_class.SerializeToString,
            response_deserializer=getattr(modules, f"{subject.method}Response").FromString,
        )
        self._stream = self._channel.stream_stream(
            f"/{subject.service}/Pipeline",
            request_serializer=modules.PipelineRequest.SerializeToString,
            response_deserializer=modules.PipelineResponse.FromString,
        )

    async def call(self, number: int) -> None:
        """One unary call."""
        request = self._request_class()
        self._subject.fill_request(request, number)
        self._subject.read_response(await self._unary(request))

    async def many(self, count: int, message_items: int) -> None:
        """``count`` calls on one stream, in messages, two of them under way at a time."""
        stream = self._stream()
        under_way = 0
        for first in range(0, count, message_items):
            await stream.write(self._frame(first, min(message_items, count - first)))
            under_way += 1
            if under_way == 2:
                self._read(await stream.read())
                under_way -= 1
        await stream.done_writing()
        while (frame := await stream.read()) is not grpc.aio.EOF:
            self._read(frame)

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()

    def _frame(self, first: int, count: int) -> Any:
        frame = self._frame_class()
        frame.context.tenant = "bench"
        frame.context.timeout.seconds = 10
        add, field, fill = frame.items.add, self._subject.field, self._subject.fill_request
        for number in range(first, first + count):
            item = add()
            item.id = number + 1
            fill(getattr(item, field), number)
        return frame

    def _read(self, frame: Any) -> None:
        field, read = self._subject.field, self._subject.read_response
        for result in frame.results:
            _ = result.id
            _ = result.HasField("error")
            read(getattr(result, field))


def bare_handlers(subject: Subject) -> grpc.GenericRpcHandler:
    """The bare server side of a subject."""
    modules = subject.modules
    response_class = getattr(modules, f"{subject.method}Response")
    frame_class = modules.PipelineResponse

    async def unary(request: Any, _: Any) -> Any:
        subject.read_request(request)
        response = response_class()
        subject.fill_response(response)
        return response

    async def pipeline(frames: AsyncIterator[Any], _: Any) -> AsyncIterator[Any]:
        field, read, fill = subject.field, subject.read_request, subject.fill_response
        async for frame in frames:
            _ = (frame.context.tenant, frame.context.timeout.seconds)
            answer = frame_class()
            add = answer.results.add
            for item in frame.items:
                _ = (item.WhichOneof("operation"), item.HasField("context"))
                read(getattr(item, field))
                result = add()
                result.id = item.id
                fill(getattr(result, field))
            yield answer

    return grpc.method_handlers_generic_handler(
        subject.service,
        {
            subject.method: grpc.unary_unary_rpc_method_handler(
                unary,
                request_deserializer=getattr(modules, f"{subject.method}Request").FromString,
                response_serializer=response_class.SerializeToString,
            ),
            "Pipeline": grpc.stream_stream_rpc_method_handler(
                pipeline,
                request_deserializer=modules.PipelineRequest.FromString,
                response_serializer=frame_class.SerializeToString,
            ),
        },
    )


async def _serve(port: int) -> None:
    server = grpc.aio.server(options=server_options())
    server.add_generic_rpc_handlers((bare_handlers(CHECK), bare_handlers(GET)))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
