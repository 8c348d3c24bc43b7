"""A server's life: from its start, over being asked what it is, to its drained stop."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.polling import eventually
from support.raw_streams import ACME, INFERENCE, RawStream
from support.servers import running

from agent360.client import Mesh, MeshError
from agent360.client.channel import open_channel
from agent360.mesh.free_ports import free_ports
from agent360.mesh.services import NAMES, service_kind
from agent360.mesh.simulator import Simulator, SimulatorSettings

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def fetched(port: int, path: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}{path}") as answer,
    ):
        return answer.status, await answer.text()


# ---------------------------------------------------------------- what it says of itself


async def test_health_is_told_of_the_whole_and_of_each_service_and_changes_are_watched() -> None:
    async with running("metrics") as server, open_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "agent360.metrics.v1.MetricsService", "agent360.audit.v1.AuditService"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        stopping = asyncio.create_task(server.stop())
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
        await stopping


async def test_a_service_without_its_backends_lives_but_is_not_ready() -> None:
    nobody = {"url": "http://127.0.0.1:1/v1"}
    kind = service_kind("inference")
    settings = kind.settings.model_validate({"ephemeral_ports": True, "backends": [nobody]})
    from agent360.mesh.runtime.server import Server

    server = Server(settings, kind.servicer)
    starting = asyncio.create_task(server.start())
    await eventually(lambda: server.port)
    await eventually(lambda: server.http_port)
    assert await fetched(server.http_port, "/healthz") == (200, "ok\n")
    assert await fetched(server.http_port, "/readyz") == (503, "not ready\n")
    async with open_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == NOT_SERVING
    starting.cancel()
    await asyncio.wait((starting,))
    await server.stop()


async def test_a_ready_service_says_so_over_http_and_shows_its_metrics() -> None:
    async with running("cache") as server:
        assert await fetched(server.http_port, "/readyz") == (200, "ready\n")
        status, text = await fetched(server.http_port, "/metrics")
        assert status == 200
        assert "process_resident_memory_bytes" in text
        assert (await fetched(server.http_port, "/nothing"))[0] == 404


@pytest.mark.parametrize("name", NAMES)
async def test_reflection_shows_every_service_and_its_messages(name: str) -> None:
    settings = {"backends": ()} if name == "inference" else {}
    async with running(name, **settings) as server, open_channel(server.address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(
                file_containing_symbol=f"agent360.{name}.v1.PipelineItem"
                if name != "metrics"
                else "agent360.metrics.v1.QueryRequest"
            ),
        ]
        listed, file = [each async for each in stub.ServerReflectionInfo(iter(requests))]
        names = {each.name for each in listed.list_services_response.service}
        assert any(each.startswith(f"agent360.{name}.v1.") for each in names)
        assert {"grpc.health.v1.Health", "grpc.channelz.v1.Channelz"} <= names
        for data in file.file_descriptor_response.file_descriptor_proto:
            assert FileDescriptorProto.FromString(data).package


async def test_channelz_counts_the_calls_of_the_server() -> None:
    async with running("cache") as server, open_channel(server.address) as channel:
        stub: Any = channelz_pb2_grpc.ChannelzStub(channel)
        answer = await stub.GetServers(channelz_pb2.GetServersRequest())
        assert any(each.data.calls_started for each in answer.server)


async def test_what_is_switched_off_is_not_served() -> None:
    settings = {"reflection": False, "channelz": False}
    async with running("cache", **settings) as server, open_channel(server.address) as channel:
        for rpc in (
            channelz_pb2_grpc.ChannelzStub(channel).GetServers(channelz_pb2.GetServersRequest()),
            reflection_pb2_grpc.ServerReflectionStub(channel)
            .ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest()]))
            .read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rpc
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_port_that_is_taken_is_named() -> None:
    async with running("cache") as server:
        with pytest.raises(RuntimeError, match=str(server.port)):
            async with running("cache", port=server.port):
                pass


# ---------------------------------------------------------------- streams that grow old


async def test_a_stream_that_is_old_is_drained_and_the_client_goes_on_with_a_new_one() -> None:
    async with (
        running("cache", stream={"max_age_s": 0.2}) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        await mesh.cache.set("k", b"v")
        seen = set()
        async with asyncio.timeout(10):
            while len(seen) < 4:
                assert (await mesh.cache.get("k")).hit
                seen |= {id(stream) for stream in server._handlers.open_streams.streams}
        await eventually(lambda: len(server._handlers.open_streams.streams) <= 2)


async def test_a_stream_that_ignores_the_drain_is_cut_after_its_grace() -> None:
    settings = {"stream": {"max_age_s": 0.2, "stalled_s": 0.5}}
    async with running("cache", **settings) as server, open_channel(server.address) as channel:
        claim = {"id": 1, "claim": {"namespace": "n", "key": "k"}}
        stream = await RawStream.opened(channel, items=[claim], context=ACME)
        await stream.send(items=[{**claim, "id": 2}], context=ACME)
        error = await stream.read_to_the_end()
        assert stream.drain.reason == "max_stream_age"
        assert error is not None
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINED")
        assert set(stream.results) == {1}
        assert not server._handlers.open_streams.streams


# ---------------------------------------------------------------- stopping


async def test_stopping_lets_what_is_in_flight_finish_and_takes_nothing_new() -> None:
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.3, inter_token_s=0.01)) as simulator,
        running(
            "inference",
            backends=[{"url": simulator.url}],
            cache={"enabled": False},
            limits={"enabled": False},
            grace_s=5.0,
        ) as server,
        open_channel(server.address) as channel,
    ):
        message = {"role": "ROLE_USER", "content": "Name a river"}
        request = {"request": {"model": "sim-small", "messages": [message]}}
        item = {"id": 1, "stream_generate": request, "credits": 10_000}
        stream = await RawStream.opened(channel, INFERENCE, items=[item], context=ACME)
        await eventually(lambda: simulator.load.running == 1)
        stopping = asyncio.create_task(server.stop())
        await stream.read_until_answered(1)
        assert stream.drain.reason == "shutdown"
        assert stream.final(1).stream_generate.final.usage.output_tokens > 0
        await stream.call.done_writing()
        assert await stream.read_to_the_end() is None
        started = time.monotonic()
        await stopping
        assert time.monotonic() - started < 3.0, "it stops when the last call ends"
        async with Mesh.connect(
            inference=server.address, tenant="acme", api_key="", patience=0.1
        ) as mesh:
            with pytest.raises(MeshError) as caught:
                await mesh.inference.count_tokens("x", model="sim-small", timeout=0.5)
            assert caught.value.reason == "UNREACHABLE"


async def test_stopping_ends_what_does_not_finish_within_the_grace() -> None:
    async with (
        running("cache", grace_s=0.5) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        await mesh.cache.claim("k", fill_timeout=60)
        waiting = asyncio.create_task(mesh.cache.claim("k", timeout=3))
        await asyncio.sleep(0)
        started = time.monotonic()
        await server.stop()
        assert time.monotonic() - started < 0.5 + 3.0
        with pytest.raises(MeshError):
            await waiting


# ---------------------------------------------------------------- signals


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """``agent360-mesh serve`` with these arguments, in a process of its own."""
    program = Path(sys.executable).with_name("agent360-mesh")
    started = await asyncio.create_subprocess_exec(
        str(program), "serve", *arguments, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


async def logged(started: asyncio.subprocess.Process, event: str) -> dict[str, Any]:
    """Reads the process's log up to an event."""
    assert started.stderr is not None
    async with asyncio.timeout(20):
        while line := await started.stderr.readline():
            record: dict[str, Any] = json.loads(line)
            if record["event"] == event:
                return record
    raise AssertionError(f"the log ended without {event!r}")


async def test_sigterm_finishes_what_is_in_flight_and_exits_with_0() -> None:
    port, http_port = free_ports(2)
    address = f"127.0.0.1:{port}"
    async with (
        process("cache", f"--port={port}", f"--http-port={http_port}") as server,
        Mesh.connect(cache=address, tenant="acme", api_key="") as mesh,
    ):
        await logged(server, "serving")
        await mesh.cache.claim("k", fill_timeout=1.5)
        waiting = asyncio.create_task(mesh.cache.claim("k", timeout=20))
        await mesh.cache.get("other")
        server.send_signal(signal.SIGTERM)
        await logged(server, "stopping")
        assert not waiting.done()
        async with open_channel(address) as channel:
            rpc = channel.unary_unary("/agent360.cache.v1.CacheService/Get")
            with pytest.raises(grpc.aio.AioRpcError):
                await rpc(b"")
        assert (await waiting).fill_token, "the first one did not fill it in time"
        await logged(server, "stopped")
        assert await server.wait() == 0


async def test_a_second_signal_exits_at_once_with_1() -> None:
    port, http_port = free_ports(2)
    async with (
        process("cache", f"--port={port}", f"--http-port={http_port}") as server,
        Mesh.connect(cache=f"127.0.0.1:{port}", tenant="acme", api_key="") as mesh,
    ):
        await logged(server, "serving")
        await mesh.cache.claim("k", fill_timeout=60)
        waiting = asyncio.create_task(mesh.cache.claim("k", timeout=20))
        await mesh.cache.get("other")
        server.send_signal(signal.SIGTERM)
        await logged(server, "stopping")
        started = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 1
        assert time.monotonic() - started < 2.0
        waiting.cancel()


async def test_a_signal_while_it_waits_for_its_backends_stops_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, http_port = free_ports(2)
    monkeypatch.setenv("AGENT360_INFERENCE__BACKENDS", '[{"url": "http://127.0.0.1:1/v1"}]')
    async with process("inference", f"--port={port}", f"--http-port={http_port}") as server:
        await logged(server, "no backend is ready yet; waiting for one")
        server.send_signal(signal.SIGTERM)
        await logged(server, "stopped")
        assert await server.wait() == 0
