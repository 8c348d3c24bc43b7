"""Gubernator beside the rate limit service: one process, and its own batch call.

The messages are built here, in a descriptor pool of their own (source: its gubernator.proto, v2).
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from agent360.client.channel import open_channel
from agent360.mesh.bench.bare import NAME, USER
from agent360.mesh.free_ports import free_ports

_PROGRAM: Final = "gubernator"
_INSTALLED_IN: Final = ".cache/bin"
_START_S: Final = 20.0
_CALL_S: Final = 10.0
_LIMIT: Final = 1_000_000_000
_DURATION_MS: Final = 1_000

_PACKAGE: Final = "pb.gubernator"
# Enums are read and written as the int32 that they are on the wire; the map of metadata, which a
# server that owns its keys leaves empty, is not declared.
_MESSAGES: Final[dict[str, dict[str, tuple[int, str]]]] = {
    "RateLimitReq": {
        "name": (1, "string"),
        "unique_key": (2, "string"),
        "hits": (3, "int64"),
        "limit": (4, "int64"),
        "duration": (5, "int64"),
        "algorithm": (6, "int32"),
        "behavior": (7, "int32"),
        "burst": (8, "int64"),
    },
    "RateLimitResp": {
        "status": (1, "int32"),
        "limit": (2, "int64"),
        "remaining": (3, "int64"),
        "reset_time": (4, "int64"),
        "error": (5, "string"),
    },
    "GetRateLimitsReq": {"requests": (1, "RateLimitReq")},
    "GetRateLimitsResp": {"responses": (1, "RateLimitResp")},
}
_TYPES: Final = {
    "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    "int32": descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
    "int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
}


def find_gubernator() -> str | None:
    """Path of the program: on the PATH, or in .cache/bin of the current directory."""
    found = shutil.which(_PROGRAM) or shutil.which(_PROGRAM, path=_INSTALLED_IN)
    return found and str(Path(found).absolute())


@asynccontextmanager
async def gubernator_server(program: str) -> AsyncIterator[GubernatorClient]:
    """Runs Gubernator in a process of its own, which is its only peer; yields a client of it.

    Args:
        program: its path.
    """
    port, http_port, gossip_port = free_ports(3)
    address, gossip = f"127.0.0.1:{port}", f"127.0.0.1:{gossip_port}"
    process = await asyncio.create_subprocess_exec(
        program,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("GUBER_")},
            "GUBER_GRPC_ADDRESS": address,
            "GUBER_HTTP_ADDRESS": f"127.0.0.1:{http_port}",
            "GUBER_BATCH_WAIT": "500us",
            # Without discovery it has no peers at all, not even itself, and decides nothing.
            "GUBER_PEER_DISCOVERY_TYPE": "member-list",
            "GUBER_MEMBERLIST_ADDRESS": gossip,
            "GUBER_MEMBERLIST_BIND_ADDRESS": gossip,
            "GUBER_MEMBERLIST_KNOWN_NODES": gossip,
            "OTEL_TRACES_EXPORTER": "none",
        },
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        client = GubernatorClient(address, process.pid)
        try:
            async with asyncio.timeout(_START_S):
                while not await client.decides():  # another process: nothing tells
                    if process.returncode is not None:
                        raise RuntimeError(f"{program} ended with code {process.returncode}")
                    await asyncio.sleep(0.02)
            yield client
        finally:
            await client.close()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


class GubernatorClient:
    """Calls Gubernator with messages built and read in place, as the bare client does."""

    def __init__(self, address: str, pid: int) -> None:
        self.pid: Final = pid
        """Of the server."""
        self._channel = open_channel(address)
        self._rpc = self._channel.unary_unary(
            f"/{_PACKAGE}.V1/GetRateLimits",
            request_serializer=_Request.SerializeToString,
            response_deserializer=_Response.FromString,
        )

    async def decides(self) -> bool:
        """Whether the server is up and has found itself as a peer."""
        try:
            response = await self._rpc(_request(1), timeout=_CALL_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return not response.responses[0].error

    async def many(self, count: int, message_items: int) -> None:
        """``count`` decisions in batches, two of them under way at a time.

        Raises:
            RuntimeError: if a decision is missing or is an error.
        """
        under_way: deque[Any] = deque()
        try:
            for first in range(0, count, message_items):
                items = min(message_items, count - first)
                under_way.append((items, self._rpc(_request(items), timeout=_CALL_S)))
                if len(under_way) == 2:
                    await _finish(under_way)
            while under_way:
                await _finish(under_way)
        finally:
            for _, call in under_way:
                call.cancel()

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()


def _request(items: int) -> Any:
    request = _Request()
    add = request.requests.add
    for _ in range(items):
        item = add()
        item.name = NAME
        item.unique_key = USER
        item.hits = 1
        item.limit = _LIMIT
        item.duration = _DURATION_MS
    return request


async def _finish(under_way: deque[Any]) -> None:
    items, call = under_way[0]
    response = await call
    under_way.popleft()
    answered = 0
    for item in response.responses:
        _ = (item.status, item.limit, item.remaining, item.reset_time)
        if item.error:
            raise RuntimeError(f"Gubernator: {item.error}")
        answered += 1
    if answered != items:
        raise RuntimeError(f"Gubernator answered {answered} of {items} requests")


def _build() -> DescriptorPool:
    pool = DescriptorPool()
    file = descriptor_pb2.FileDescriptorProto(
        name="gubernator.proto", package=_PACKAGE, syntax="proto3"
    )
    for message, fields in _MESSAGES.items():
        declared = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            field = declared.field.add(name=name, number=number)
            if kind in _MESSAGES:
                field.label, field.type = field.LABEL_REPEATED, field.TYPE_MESSAGE
                field.type_name = f".{_PACKAGE}.{kind}"
            else:
                field.label, field.type = field.LABEL_OPTIONAL, _TYPES[kind]
    pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL: Final = _build()
_Request: Final[Any] = GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.GetRateLimitsReq"))
_Response: Final[Any] = GetMessageClass(
    _POOL.FindMessageTypeByName(f"{_PACKAGE}.GetRateLimitsResp")
)
