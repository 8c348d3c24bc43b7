"""Asks a service for its health."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agent360.client import Tls
from agent360.client.channel import open_channel


async def probe(
    address: str, service: str = "", timeout_s: float = 2.0, ca: Path | None = None
) -> tuple[str, bool]:
    """Asks once.

    Args:
        address: ``host:port``.
        service: full gRPC service name; empty: overall.
        timeout_s: seconds to wait.
        ca: PEM file to trust; None: plaintext.

    Returns:
        The status for people, and whether it is SERVING.
    """
    async with open_channel(address, tls=Tls(ca=ca) if ca else None) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}", False
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return status, answer.status == health_pb2.HealthCheckResponse.SERVING


async def wait_until_serving(address: str, timeout_s: float) -> bool:
    """Asks until the service is serving; False if it is not in time."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while loop.time() < deadline:
        _, serving = await probe(address, timeout_s=1.0)
        if serving:
            return True
        await asyncio.sleep(0.1)
    return False
