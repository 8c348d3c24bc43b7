"""The inference service on the wire: the real server, the real client, the simulator behind it."""

import asyncio
import time
from contextlib import asynccontextmanager

import grpc
import pytest
from support.polling import eventually

from agent360.client import (
    AnswerSource,
    GenerateRequest,
    InvalidRequestError,
    Mesh,
    MeshError,
    Message,
    Tool,
    UnavailableError,
)
from agent360.client.inference import TokenCount
from agent360.inference.v1 import inference_pb2 as pb
from agent360.mesh.inference import InferenceServicer, InferenceSettings
from agent360.mesh.runtime.server import Server
from agent360.mesh.simulator import Simulator, SimulatorSettings

ALONE = {"cache": {"enabled": False}, "limits": {"enabled": False}}
NOBODY = "127.0.0.1:9"
AWAY = {"mesh": {"cache": NOBODY, "ratelimit": NOBODY, "metrics": NOBODY}}
MODELS = [
    {"name": "small", "upstream_model": "sim-small", "task_classes": ["simple"]},
    {"name": "large", "upstream_model": "sim-large", "task_classes": ["complex"]},
    {"name": "embedder", "upstream_model": "sim-embed", "capabilities": ["embeddings"]},
]


@asynccontextmanager
async def served(simulator: Simulator, **settings):
    values = {
        "ephemeral_ports": True,
        "grace_s": 0.5,
        "backends": [{"url": simulator.url}],
        "models": MODELS,
        **AWAY,
        **settings,
    }
    server = Server(InferenceSettings.model_validate(values), InferenceServicer)
    await server.start()
    try:
        async with Mesh.connect(
            inference=server.address, metrics=NOBODY, tenant="acme", patience=0.2
        ) as mesh:
            yield server, mesh
    finally:
        await server.stop()


@pytest.fixture
async def simulator():
    async with Simulator(
        SimulatorSettings(port=0, first_token_s=0.01, inter_token_s=0.0)
    ) as running:
        yield running


@pytest.fixture
async def mesh(simulator):
    async with served(simulator, **ALONE) as (_, connected):
        yield connected


async def listen(mesh: Mesh, request: str, **more) -> tuple[list[str], object]:
    stream = mesh.inference.stream(request, **more)
    texts = [delta.text async for delta in stream]
    return texts, stream.answer


async def test_an_answer_crosses_the_wire_whole_and_in_pieces(mesh):
    whole = await mesh.inference.generate("Name three rivers", model="small")
    texts, streamed = await listen(mesh, "Name three rivers [[sim:itl=0.005]]", model="small")
    assert whole.text.startswith("This is a simulated answer")
    assert whole.source is AnswerSource.MODEL
    assert (whole.model, whole.backend, whole.rule) == ("small", "default", "explicit")
    assert whole.usage.output_tokens > 0
    assert len(texts) > 5
    assert streamed.text == "".join(texts)
    assert 0 < streamed.first_token_s < streamed.total_s


async def test_auto_tells_its_rule(mesh):
    simple = await mesh.inference.generate("Hi")
    request = GenerateRequest("Hi", tools=[Tool("look", parameters={"type": "object"})])
    complex_ = await mesh.inference.generate(request)
    assert (simple.model, simple.rule) == ("small", "auto:simple")
    assert (complex_.model, complex_.rule) == ("large", "auto:complex")


async def test_tool_calls_cross_the_wire(mesh):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    request = GenerateRequest(
        [Message("system", "Use tools."), Message("user", "Weather in Rome?")],
        model="small",
        tools=[Tool("weather", "Tells the weather", schema)],
        tool_choice="required",
    )
    (call,) = (await mesh.inference.generate(request)).tool_calls
    assert call.name == "weather"
    assert "city" in call.arguments


async def test_many_streams_are_interleaved_and_none_waits_for_a_stalled_one(mesh):
    stalled = asyncio.create_task(listen(mesh, "[[sim:stall=30]]", model="small"))
    began = time.monotonic()
    answers = await asyncio.gather(
        *(listen(mesh, f"Tell me about {n} [[sim:itl=0.002]]", model="small") for n in range(30))
    )
    assert time.monotonic() - began < 10
    assert all(answer.text == "".join(texts) for texts, answer in answers)
    assert not stalled.done()
    stalled.cancel()


async def test_leaving_a_stream_stops_the_model(mesh, simulator):
    stream = mesh.inference.stream("[[sim:itl=0.02]][[sim:tokens=2000]]", model="small")
    async for _ in stream:
        break
    await eventually(lambda: simulator.load.cancelled == 1)


async def test_a_deadline_stops_the_model(mesh, simulator):
    with pytest.raises(TimeoutError):
        await mesh.inference.generate("[[sim:stall=30]]", model="small", timeout=0.2)
    await eventually(lambda: simulator.load.cancelled == 1)


def wire_request(content: str) -> pb.StreamGenerateRequest:
    message = pb.Message(role=pb.ROLE_USER, content=content)
    return pb.StreamGenerateRequest(request=pb.GenerateRequest(model="small", messages=[message]))


async def test_a_slow_reader_gets_fewer_larger_pieces_and_loses_nothing(simulator):
    asked = wire_request("[[sim:itl=0.001]][[sim:tokens=300]] go on")
    item = pb.PipelineItem(id=1, stream_generate=asked, credits=1)
    item.context.tenant = "acme"
    async with (
        served(simulator, **ALONE) as (server, _),
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stream = channel.stream_stream(
            "/agent360.inference.v1.InferenceService/Pipeline",
            request_serializer=pb.PipelineRequest.SerializeToString,
            response_deserializer=pb.PipelineResponse.FromString,
        )()
        await stream.write(pb.PipelineRequest(items=[item]))
        texts, final = [], None
        while final is None:
            for result in (await stream.read()).results:
                assert not result.HasField("error"), result.error
                event = result.stream_generate
                if event.HasField("final"):
                    final = event.final
                    assert not result.more
                else:
                    texts.append(event.delta.content)
                    assert result.more
            await asyncio.sleep(0.05)
            await stream.write(pb.PipelineRequest(credits=[{"id": 1, "chunks": 1}]))
        await stream.done_writing()
    assert final.usage.output_tokens == 300
    assert len(texts) < 100
    assert len("".join(texts).split()) == 300


async def test_the_streaming_rpc_alone_ends_with_a_final(simulator):
    async with (
        served(simulator, **ALONE) as (server, _),
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        call = channel.unary_stream(
            "/agent360.inference.v1.InferenceService/StreamGenerate",
            request_serializer=pb.StreamGenerateRequest.SerializeToString,
            response_deserializer=pb.StreamGenerateResponse.FromString,
        )
        metadata = (("x-agent360-tenant", "acme"),)
        events = [event async for event in call(wire_request("Name a river"), metadata=metadata)]
        assert "".join(event.delta.content for event in events).endswith(".")
        assert [event.WhichOneof("event") for event in events][-1] == "final"
        assert events[-1].final.finish_reason == pb.FINISH_REASON_STOP
        assert not events[-1].final.message.content
        broken = call(wire_request("[[sim:break=5]]"), metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [event async for event in broken]
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_broken_upstream_is_told_with_what_was_produced(mesh):
    texts = []

    async def hear() -> None:
        async for delta in mesh.inference.stream("[[sim:break=10]]", model="small"):
            texts.append(delta.text)  # noqa: PERF401 - what came before the error is wanted

    with pytest.raises(UnavailableError) as caught:
        await hear()
    assert caught.value.reason == "STREAM_BROKEN"
    assert caught.value.metadata["partial_text"] == "".join(texts)
    assert caught.value.metadata["produced_bytes"] == str(len("".join(texts)))


async def test_malformed_requests_and_unknown_models_are_told_clearly(mesh):
    with pytest.raises(MeshError) as caught:
        await mesh.inference.generate("Hi", model="gpt")
    assert (caught.value.code, caught.value.reason) == (
        grpc.StatusCode.NOT_FOUND,
        "MODEL_UNKNOWN",
    )
    assert caught.value.metadata["known"] == "embedder, large, small"
    with pytest.raises(InvalidRequestError) as refused:
        await mesh.inference.generate(GenerateRequest("x" * (10 * 2**20), model="small"))
    assert [violation.field for violation in refused.value.violations] == ["messages"]
    assert (await mesh.inference.generate("Hi", model="small")).text


async def test_vectors_and_token_counts_cross_the_wire(mesh):
    found = await mesh.inference.embed(["one text", "another"], model="embedder", dimensions=8)
    assert [len(vector) for vector in found.vectors] == [8, 8]
    count = await mesh.inference.count_tokens("four and four", model="small")
    assert count == TokenCount(7, estimated=False, tokenizer="backend")


async def test_models_are_listed_in_pages_and_masked(mesh):
    await mesh.inference.generate("Hi", model="small")
    models = [model async for model in mesh.inference.list_models(page_size=2)]
    assert [model.name for model in models] == ["embedder", "large", "small"]
    small = models[2]
    assert small.health == pb.MODEL_HEALTH_READY
    assert small.HasField("latency_p50")
    assert list(small.task_classes) == [pb.TASK_CLASS_SIMPLE]
    masked = [model async for model in mesh.inference.list_models(fields=["name"])]
    assert masked[0] == pb.Model(name="embedder")
    assert (await mesh.inference.get_model("large")).backends == ["default"]
    with pytest.raises(MeshError, match="no model 'gpt'"):
        await mesh.inference.get_model("gpt")


async def test_models_are_discovered_where_none_are_configured(simulator):
    async with served(simulator, **ALONE, models=[]) as (_, mesh):
        names = {model.name async for model in mesh.inference.list_models()}
        assert names == {"sim-small", "sim-large", "sim-embed"}
        assert (await mesh.inference.generate("Hi", model="sim-small")).text


async def test_without_cache_and_limits_requests_are_served_all_the_same(simulator):
    async with served(simulator) as (_, mesh):
        began = time.monotonic()
        answers = await asyncio.gather(
            *(mesh.inference.generate(f"Hi {n}", model="small") for n in range(20))
        )
        assert all(answer.source is AnswerSource.MODEL for answer in answers)
        assert time.monotonic() - began < 5


async def test_closed_limits_refuse_while_the_ratelimit_service_is_away(simulator):
    async with served(simulator, limits={"when_away": "closed"}) as (_, mesh):
        with pytest.raises(UnavailableError) as caught:
            await mesh.inference.generate("Hi", model="small")
    assert caught.value.reason == "RATELIMIT_UNAVAILABLE"
    assert caught.value.retry_after_s == 1.0
    assert simulator.load.by_path["/v1/chat/completions"] == 0


async def test_the_service_is_ready_only_when_a_backend_answers():
    async with Simulator(SimulatorSettings(port=0)) as probe:
        port = int(probe.url.rsplit(":", 1)[1].removesuffix("/v1"))
        url = probe.url
    settings = InferenceSettings.model_validate(
        {"ephemeral_ports": True, "grace_s": 0.1, "backends": [{"url": url}], **ALONE, **AWAY}
    )
    server = Server(settings, InferenceServicer)
    starting = asyncio.create_task(server.start())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(starting), 0.5)
    assert not server.ready
    async with Simulator(SimulatorSettings(port=port)):
        async with asyncio.timeout(10):
            await starting
        assert server.ready
        await server.stop()


async def test_probabilities_of_tokens_cross_the_wire_whole_and_in_pieces(mesh):
    request = GenerateRequest("Hi", model="small", logprobs=True, top_logprobs=2)
    whole = await mesh.inference.generate(request)
    assert "".join(each.token for each in whole.logprobs) == whole.text
    assert all(each.logprob < 0 for each in whole.logprobs)
    assert [len(each.alternatives) for each in whole.logprobs] == [2] * len(whole.logprobs)
    assert whole.logprobs[0].token_bytes == whole.logprobs[0].token.encode()
    stream = mesh.inference.stream(GenerateRequest("Hi", model="small", logprobs=True))
    heard = [each for delta in [delta async for delta in stream] for each in delta.logprobs]
    assert "".join(each.token for each in heard) == stream.answer.text
    assert stream.answer.logprobs == tuple(heard)
    plain = await mesh.inference.generate("Hi", model="small")
    assert not plain.logprobs
    with pytest.raises(InvalidRequestError) as refused:
        await mesh.inference.generate(
            GenerateRequest("Hi", model="small", logprobs=True, top_logprobs=21)
        )
    assert [each.field for each in refused.value.violations] == ["sampling.top_logprobs"]
