"""Tracing: what a real OTLP receiver is told of calls."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from support.openai_front import fronted, sdk
from support.raw_streams import RawStream
from support.servers import running

from agent360.cache.v1 import cache_pb2 as pb
from agent360.client import Mesh, MeshError, call_scope
from agent360.client.channel import open_channel
from agent360.mesh.runtime.policies.authentication import hash_key
from agent360.mesh.runtime.server import Server
from agent360.mesh.simulator import Simulator, SimulatorSettings

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{PARENT}-01"
UNSAMPLED = f"00-{TRACE}-{PARENT}-00"
STRICT = """
[[limits]]
id = "gets"
name = "agent360.cache.v1.CacheService/Get"
per = ["tenant"]
algorithm = "token_bucket"
amount = 100
period = "1s"
strict = true
"""


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver: spans by name, as they came."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        for resource in request.resource_spans:
            attributes = {each.key: each.value for each in resource.resource.attributes}
            service = attributes["service.name"].string_value
            for scope in resource.scope_spans:
                self.spans += [(service, span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[Receiver, dict[str, Any]]]:
    """A receiver, and the settings that make a service report to it."""
    servicer = Receiver()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, {"tracing": {"endpoint": f"http://127.0.0.1:{port}"}}
    await server.stop(0)


@asynccontextmanager
async def cache(settings: dict[str, Any]) -> AsyncIterator[tuple[Server, Mesh]]:
    async with (
        running("cache", **settings) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        yield server, mesh


def attributes(span: Any) -> dict[str, Any]:
    found = {}
    for each in span.attributes:
        found[each.key] = getattr(each.value, each.value.WhichOneof("value"))
    return found


async def test_a_sampled_item_leaves_a_span_below_its_callers(receiver: Any) -> None:
    servicer, settings = receiver
    async with cache(settings) as (_, mesh):
        with call_scope(traceparent=SAMPLED):
            await mesh.cache.get("k")
        await mesh.cache.get("k")
        with call_scope(traceparent=UNSAMPLED):
            await mesh.cache.get("k")
    ((service, span),) = servicer.spans
    assert service == "agent360-cache"
    assert span.name == "agent360.cache.v1.CacheService/Get"
    assert span.trace_id.hex() == TRACE
    assert span.parent_span_id.hex() == PARENT
    facts = attributes(span)
    assert facts["agent360.tenant"] == "acme"
    assert facts["rpc.system"] == "grpc"
    assert facts["rpc.method"] == "Get"
    assert facts["agent360.batch.size"] == 1
    assert span.end_time_unix_nano >= span.start_time_unix_nano


async def test_a_callers_own_span_is_the_parent_of_its_calls(receiver: Any) -> None:
    servicer, settings = receiver
    tracer = TracerProvider().get_tracer("caller")
    async with cache(settings) as (_, mesh):
        with tracer.start_as_current_span("planning") as own:
            await mesh.cache.get("k")
        await mesh.cache.get("k")
    ((_, span),) = servicer.spans
    context = own.get_span_context()
    assert span.trace_id.hex() == f"{context.trace_id:032x}"
    assert span.parent_span_id.hex() == f"{context.span_id:016x}"


async def test_a_span_names_the_tenant_that_the_callers_key_is_bound_to(receiver: Any) -> None:
    servicer, settings = receiver
    keys = [{"name": "one", "sha256": hash_key("key-one"), "tenants": ("acme",)}]
    async with (
        running("cache", authentication={"keys": keys}, **settings) as server,
        Mesh.connect(cache=server.address, tenant="", api_key="key-one") as mesh,
    ):
        with call_scope(traceparent=SAMPLED):
            await mesh.cache.get("k")
    ((_, span),) = servicer.spans
    assert attributes(span)["agent360.tenant"] == "acme"


async def test_the_question_about_a_quota_that_is_not_leased_is_part_of_the_calls_trace(
    receiver: Any, tmp_path: Path
) -> None:
    servicer, settings = receiver
    limits = tmp_path / "limits.toml"
    limits.write_text(STRICT)
    async with (
        running("ratelimit", limits=str(limits), **settings) as limiter,
        running(
            "cache", quota={"enabled": True}, mesh={"ratelimit": limiter.address}, **settings
        ) as server,
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
    ):
        with call_scope(traceparent=SAMPLED):
            await mesh.cache.get("k")
    spans = dict(servicer.spans)
    assert spans.keys() == {"agent360-cache", "agent360-ratelimit"}
    assert spans["agent360-ratelimit"].parent_span_id == spans["agent360-cache"].span_id


async def test_of_a_message_only_the_sampled_items_leave_a_span(receiver: Any) -> None:
    servicer, settings = receiver
    async with running("cache", **settings) as server, open_channel(server.address) as channel:
        get = {"namespace": "n", "key": "k"}
        traced = {"tenant": "acme", "traceparent": SAMPLED}
        untraced = {"tenant": "acme", "traceparent": UNSAMPLED}
        items = [
            {"id": 1, "get": get, "context": traced},
            {"id": 2, "get": get, "context": untraced},
            {"id": 3, "get": get},
            {"id": 4, "get": get, "context": traced},
        ]
        stream = await RawStream.opened(channel, items=items, context={"tenant": "acme"})
        await stream.read_until_answered(1, 2, 3, 4)
    ((_, span),) = servicer.spans
    assert attributes(span)["agent360.batch.size"] == 2


@pytest.mark.parametrize(
    ("traceparent", "spans"), [(SAMPLED, 1), (UNSAMPLED, 0), ("nonsense", 0), ("", 0)]
)
async def test_a_unary_call_is_followed_where_its_caller_is_sampled(
    receiver: Any, traceparent: str, spans: int
) -> None:
    servicer, settings = receiver
    async with running("cache", **settings) as server, open_channel(server.address) as channel:
        await get_unary(channel, traceparent)
    assert [span.parent_span_id.hex() for _, span in servicer.spans] == [PARENT] * spans


async def test_an_untraced_unary_call_begins_a_trace_by_chance(receiver: Any) -> None:
    servicer, settings = receiver
    settings["tracing"]["sample_ratio"] = 1.0
    async with running("cache", **settings) as server, open_channel(server.address) as channel:
        await get_unary(channel, "")
    ((_, span),) = servicer.spans
    assert span.parent_span_id == b""
    assert any(span.trace_id)


async def get_unary(channel: grpc.aio.Channel, traceparent: str) -> None:
    rpc = channel.unary_unary(
        "/agent360.cache.v1.CacheService/Get",
        request_serializer=pb.GetRequest.SerializeToString,
        response_deserializer=pb.GetResponse.FromString,
    )
    metadata = [("x-agent360-tenant", "acme")]
    if traceparent:
        metadata.append(("traceparent", traceparent))
    await rpc(pb.GetRequest(namespace="n", key="k"), metadata=metadata)


async def test_a_span_says_how_the_call_ended(receiver: Any) -> None:
    servicer, settings = receiver
    async with cache(settings) as (_, mesh):
        with call_scope(traceparent=SAMPLED):
            with pytest.raises(MeshError):
                await mesh.cache.get("")
            claim = await mesh.cache.claim("k")
            with pytest.raises(MeshError):
                await mesh.cache.claim("k", timeout=0.1)
            await mesh.cache.fill(claim.fill_token, "k", b"v")
    spans = [attributes(span) | {"status": span.status.code} for _, span in servicer.spans]
    by_code = {each.get("rpc.grpc.status_code", 0): each["status"] for each in spans}
    invalid, late = (
        code.value[0]
        for code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DEADLINE_EXCEEDED)
    )
    assert by_code[invalid] == 0, "the caller's fault is no error of the service"
    assert by_code[late] == 2
    assert by_code[0] == 0


async def test_a_trace_goes_on_through_the_services_that_are_asked(receiver: Any) -> None:
    servicer, settings = receiver
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.0, inter_token_s=0.0)) as simulator,
        running("cache", **settings) as cache_server,
        running("ratelimit", **settings) as limiter,
        running(
            "inference",
            backends=[{"url": simulator.url}],
            mesh={"cache": cache_server.address, "ratelimit": limiter.address},
            **settings,
        ) as server,
        Mesh.connect(inference=server.address, tenant="acme", api_key="") as mesh,
    ):
        with call_scope(traceparent=SAMPLED):
            await mesh.inference.generate("Name a river", model="sim-small")
    spans = {(service, span.name.rpartition("/")[2]): span for service, span in servicer.spans}
    assert {service for service, _ in spans} == {
        "agent360-inference",
        "agent360-cache",
        "agent360-ratelimit",
    }
    generate = spans["agent360-inference", "Generate"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert generate.parent_span_id.hex() == PARENT
    below = [span for key, span in spans.items() if key[0] != "agent360-inference"]
    assert {span.parent_span_id for span in below} == {generate.span_id}


async def test_a_traced_call_leaves_nothing_to_those_that_follow_it_downstream(
    receiver: Any,
) -> None:
    """The first call opens the streams to the other services; the second uses them."""
    servicer, settings = receiver
    async with (
        Simulator(SimulatorSettings(port=0, first_token_s=0.0, inter_token_s=0.0)) as simulator,
        running("cache", **settings) as cache_server,
        running("ratelimit", **settings) as limiter,
        running(
            "inference",
            backends=[{"url": simulator.url}],
            mesh={"cache": cache_server.address, "ratelimit": limiter.address},
            **settings,
        ) as server,
        Mesh.connect(inference=server.address, tenant="acme", api_key="") as mesh,
    ):
        with call_scope(traceparent=SAMPLED):
            await mesh.inference.generate("Name a river", model="sim-small")
        for tenant in ("globex", "initech"):
            await mesh.inference.generate("Name a lake", model="sim-small", tenant=tenant)
    assert {attributes(span)["agent360.tenant"] for _, span in servicer.spans} == {"acme"}
    assert {span.trace_id.hex() for _, span in servicer.spans} == {TRACE}


async def test_no_call_inherits_the_tenant_or_trace_of_another(receiver: Any) -> None:
    """The stream is opened by the first caller and used by all."""
    servicer, settings = receiver
    async with cache(settings) as (_, mesh):

        async def caller(number: int) -> bool:
            traceparent = f"00-{number + 1:032x}-{number + 1:016x}-01" if number % 2 else ""
            with call_scope(tenant=f"tenant{number}", traceparent=traceparent or None):
                await mesh.cache.set("k", str(number).encode())
                await asyncio.sleep(0)
                return (await mesh.cache.get("k")).value == str(number).encode()

        assert all(await asyncio.gather(*(caller(number) for number in range(40))))
    assert len(servicer.spans) == 40
    for _, span in servicer.spans:
        number = int(span.trace_id.hex(), 16) - 1
        assert attributes(span)["agent360.tenant"] == f"tenant{number}"
        assert span.parent_span_id.hex() == f"{number + 1:016x}"


async def test_a_request_to_the_http_front_belongs_to_its_callers_trace(receiver: Any) -> None:
    servicer, settings = receiver
    async with (
        Simulator(SimulatorSettings(port=0)) as simulator,
        fronted(simulator, **settings) as server,
        sdk(server) as client,
    ):
        for traceparent in (SAMPLED, UNSAMPLED, "nonsense"):
            await client.chat.completions.create(
                model="small",
                messages=[{"role": "user", "content": "Hi"}],
                extra_headers={"traceparent": traceparent},
            )
    (span,) = [
        each for _, each in servicer.spans if each.name.endswith("InferenceService/Generate")
    ]
    assert span.trace_id.hex() == TRACE
    assert span.parent_span_id.hex() == PARENT
    assert attributes(span)["agent360.tenant"] == "default"
