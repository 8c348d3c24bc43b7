"""The catalogue over gRPC: its file, health, warm-up, and what ListModels shows."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from support.polling import eventually, eventually_async
from support.servers import NOBODY, connected, running

from agent360.client import Mesh, MeshError
from agent360.inference.v1 import inference_pb2 as pb
from agent360.mesh.inference import InferenceServicer, InferenceSettings
from agent360.mesh.runtime.server import Server
from agent360.mesh.runtime.watched_file import WrongFileError
from agent360.mesh.simulator import Simulator, SimulatorSettings

ALONE = {"cache": {"enabled": False}, "limits": {"enabled": False}}
QUICK = SimulatorSettings(port=0, first_token_s=0.01, inter_token_s=0.0)

SMALL = '[[models]]\nname = "small"\nupstream_model = "sim-small"\n'
LARGE = '[[models]]\nname = "large"\nupstream_model = "sim-large"\n'


@pytest.fixture
async def simulator():
    async with Simulator(QUICK) as running:
        yield running


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "models.toml"


async def names(mesh: Mesh) -> list[str]:
    return [model.name async for model in mesh.inference.list_models()]


def health_is(mesh: Mesh, name: str, health: int) -> Callable[[], Awaitable[bool]]:
    async def holds() -> bool:
        return (await mesh.inference.get_model(name)).health == health

    return holds


def warm_ups(simulator: Simulator) -> int:
    return simulator.load.by_path["/v1/chat/completions"]


async def test_a_changed_file_is_in_force_without_a_restart(simulator, file):
    file.write_text(SMALL)
    backends = [{"url": simulator.url}]
    async with connected("inference", backends=backends, models_file=file, **ALONE) as mesh:
        assert await names(mesh) == ["small"]
        file.write_text(SMALL + 'quantization = "Q4_K_M"\n' + LARGE)

        async def changed() -> bool:
            return await names(mesh) == ["large", "small"]

        await eventually_async(changed)
        assert (await mesh.inference.get_model("small")).quantization == "Q4_K_M"
        assert (await mesh.inference.generate("Hi", model="large")).model == "large"
        file.write_text(LARGE)

        async def gone() -> bool:
            return await names(mesh) == ["large"]

        await eventually_async(gone)
        with pytest.raises(MeshError) as caught:
            await mesh.inference.generate("Hi", model="small")
        assert caught.value.reason == "MODEL_UNKNOWN"


async def test_changes_of_the_file_under_load_fail_no_request(simulator, file):
    file.write_text(SMALL)
    backends = [{"url": simulator.url}]
    async with connected("inference", backends=backends, models_file=file, **ALONE) as mesh:
        answered, stop = [], asyncio.Event()

        async def ask(caller: int) -> None:
            while not stop.is_set():
                text = f"{caller} asks {len(answered)}"
                answered.append(await mesh.inference.generate(text, model="small"))

        async with asyncio.TaskGroup() as callers:
            for caller in range(8):
                callers.create_task(ask(caller))
            for change in range(4):
                file.write_text(SMALL + f'quantization = "Q{change}"\n')

                async def changed(wanted: str = f"Q{change}") -> bool:
                    return (await mesh.inference.get_model("small")).quantization == wanted

                await eventually_async(changed)
            stop.set()
    assert len(answered) > 8
    assert all(answer.text for answer in answered)


async def test_a_wrong_file_changes_nothing_and_is_told_with_line_and_field(
    simulator, file, capsys
):
    file.write_text(SMALL)
    backends = [{"url": simulator.url}]
    async with connected("inference", backends=backends, models_file=file, **ALONE) as mesh:
        file.write_text(LARGE + SMALL + "weight = -1\n")
        said = []

        def told() -> bool:
            said.append(capsys.readouterr().out)
            return "models.toml:7: model 2 (small): weight" in "".join(said)

        await eventually(told)
        assert await names(mesh) == ["small"]
        assert (await mesh.inference.generate("Hi", model="small")).model == "small"
        file.write_text(LARGE)

        async def mended() -> bool:
            return await names(mesh) == ["large"]

        await eventually_async(mended)


def test_a_service_does_not_start_with_a_wrong_file(file):
    file.write_text(SMALL.replace("upstream_model", "upstraem_model"))
    settings = InferenceSettings(models_file=file, ephemeral_ports=True)

    async def start() -> None:
        await Server(settings, InferenceServicer).start()

    with pytest.raises(WrongFileError, match=r"models\.toml:3: model 1 \(small\): upstraem_model"):
        asyncio.run(start())


async def test_models_show_what_they_are_and_how_they_do(simulator):
    models = [
        {
            "name": "small",
            "upstream_model": "sim-small",
            "backends": ["b0", "b1"],
            "weights": {"b0": 3},
            "weight": 2,
            "policy": "two_choices",
            "fallbacks": ["large"],
            "context_tokens": 8192,
            "input_usd_per_million": 0.1,
            "output_usd_per_million": 0.4,
            "quantization": "Q8_0",
            "task_classes": ["simple"],
            "limits": {"max_prompt_tokens": 4000, "max_output_tokens": 500},
        },
        {"name": "large", "upstream_model": "sim-large", "backends": ["b0"]},
    ]
    backends = [{"name": "b0", "url": simulator.url}, {"name": "b1", "url": f"http://{NOBODY}"}]
    async with connected("inference", backends=backends, models=models, **ALONE) as mesh:
        for n in range(3):
            await mesh.inference.generate(f"Hi {n}", model="large")
        answering = asyncio.create_task(
            mesh.inference.generate("[[sim:stall=2]]", model="large", timeout=5)
        )
        await eventually(lambda: simulator.load.running == 1)
        await eventually_async(health_is(mesh, "small", pb.MODEL_HEALTH_DEGRADED))
        small = await mesh.inference.get_model("small")
        large = await mesh.inference.get_model("large")
        answering.cancel()
    assert (small.weight, small.policy, list(small.fallbacks)) == (2, "two_choices", ["large"])
    assert (small.context_tokens, small.quantization) == (8192, "Q8_0")
    assert (small.max_prompt_tokens, small.max_output_tokens) == (4000, 500)
    assert (small.input_usd_per_million, small.output_usd_per_million) == (0.1, 0.4)
    assert list(small.task_classes) == [pb.TASK_CLASS_SIMPLE]
    up, away = small.backend_states
    assert (up.name, up.weight, up.health) == ("b0", 3, pb.MODEL_HEALTH_READY)
    assert (away.name, away.weight) == ("b1", 1)
    assert away.health in (pb.MODEL_HEALTH_DEGRADED, pb.MODEL_HEALTH_UNAVAILABLE)
    assert large.running == 1
    assert large.backend_states[0].outstanding_tokens > 0
    assert 0 < large.latency_p50.ToNanoseconds() <= large.latency_p90.ToNanoseconds()
    assert large.backend_states[0].latency.ToNanoseconds() > 0


def warming(warm_up: str, url: str) -> dict:
    model = {"name": "small", "upstream_model": "sim-small", "warm_up": warm_up}
    other = {"name": "large", "upstream_model": "sim-large"}
    return {"backends": [{"url": url}], "models": [model, other], **ALONE}


async def test_the_service_is_ready_only_when_its_models_are_warm(simulator):
    async with connected("inference", **warming("Hello", simulator.url)) as mesh:
        assert warm_ups(simulator) == 1
        assert await health_is(mesh, "small", pb.MODEL_HEALTH_READY)()


async def test_the_service_waits_while_the_backend_fails_its_warm_up(simulator):
    values = {**warming("[[sim:error=503]]", simulator.url), "ephemeral_ports": True}
    server = Server(InferenceSettings.model_validate(values), InferenceServicer)
    starting = asyncio.create_task(server.start())
    await eventually(lambda: warm_ups(simulator) >= 2)
    assert not server.ready
    assert not starting.done()
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await server.stop()


async def test_a_model_that_refuses_its_warm_up_is_not_ready_and_the_others_are(simulator):
    async with connected("inference", **warming("[[sim:error=400]]", simulator.url)) as mesh:
        assert await health_is(mesh, "small", pb.MODEL_HEALTH_WARMING)()
        assert await health_is(mesh, "large", pb.MODEL_HEALTH_READY)()


async def test_a_backend_that_went_away_is_noticed_and_is_warmed_up_when_it_is_back():
    first = Simulator(QUICK)
    await first.start()
    port = int(first.url.split(":")[2].split("/")[0])
    settings = {**warming("Hello", first.url), "probe_interval_s": 0.1}
    async with connected("inference", **settings) as mesh:
        assert warm_ups(first) == 1
        await first.close()
        await eventually_async(health_is(mesh, "small", pb.MODEL_HEALTH_UNAVAILABLE))
        async with Simulator(QUICK.model_copy(update={"port": port})) as second:
            await eventually_async(health_is(mesh, "small", pb.MODEL_HEALTH_READY))
            assert warm_ups(second) == 1
            assert (await mesh.inference.generate("Hi", model="small")).text


async def test_a_backend_that_hangs_is_noticed_within_the_probes_timeout():
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with (
        await asyncio.start_server(say_nothing, "127.0.0.1", 0) as silent,
        Simulator(QUICK) as simulator,
    ):
        port = silent.sockets[0].getsockname()[1]
        backends = [
            {"name": "up", "url": simulator.url},
            {"name": "silent", "url": f"http://127.0.0.1:{port}/v1"},
        ]
        models = [{"name": "small", "upstream_model": "sim-small", "backends": ["up", "silent"]}]
        probes = {"probe_interval_s": 0.1, "probe_timeout_s": 0.1}
        async with connected(
            "inference", backends=backends, models=models, **probes, **ALONE
        ) as mesh:

            async def noticed() -> bool:
                _, state = (await mesh.inference.get_model("small")).backend_states
                return state.health == pb.MODEL_HEALTH_UNAVAILABLE

            await eventually_async(noticed)
            answers = [await mesh.inference.generate(f"Hi {n}", model="small") for n in range(4)]
            assert {answer.backend for answer in answers} == {"up"}


async def test_a_failing_model_is_noticed_though_its_server_lists_it(simulator):
    models = [{"name": "small", "upstream_model": "sim-small"}]
    settings = {
        "backends": [{"url": simulator.url}],
        "models": models,
        "probe_interval_s": 0.6,
        "retry": {"max_tries": 1},
        **ALONE,
    }
    async with connected("inference", **settings) as mesh:
        for n in range(3):
            with pytest.raises(MeshError):
                await mesh.inference.generate(f"{n} [[sim:error=503]]", model="small")
        listed = simulator.load.requests
        assert await health_is(mesh, "small", pb.MODEL_HEALTH_UNAVAILABLE)()
        await eventually_async(health_is(mesh, "small", pb.MODEL_HEALTH_READY))
        assert simulator.load.requests == listed, "time and a probe forgave it, no request"


async def test_prometheus_tells_how_the_backends_are_doing(simulator):
    backends = [{"name": "up", "url": simulator.url}, {"name": "away", "url": f"http://{NOBODY}"}]
    models = [{"name": "small", "upstream_model": "sim-small", "backends": ["up", "away"]}]
    probes = {"probe_interval_s": 0.1}
    async with (
        running("inference", backends=backends, models=models, **probes, **ALONE) as server,
        Mesh.connect(inference=server.address, tenant="acme", api_key="") as mesh,
        aiohttp.ClientSession() as http,
    ):
        await eventually_async(health_is(mesh, "small", pb.MODEL_HEALTH_DEGRADED))
        await mesh.inference.generate("Hi", model="small")

        async def told() -> bool:
            async with http.get(f"http://127.0.0.1:{server.http_port}/metrics") as response:
                lines = (await response.text()).splitlines()
            return {
                'inference_backend_up{backend="up"} 1.0',
                'inference_backend_up{backend="away"} 0.0',
                'inference_backend_running{backend="up"} 0.0',
            } <= set(lines)

        await eventually_async(told)


async def test_a_joining_model_that_cannot_warm_up_takes_no_other_down(simulator, file):
    file.write_text(SMALL)
    backends = [{"url": simulator.url}]
    async with connected("inference", backends=backends, models_file=file, **ALONE) as mesh:
        file.write_text(SMALL + LARGE + 'warm_up = "[[sim:error=503]]"\n')
        await eventually(lambda: warm_ups(simulator) >= 2)
        assert await health_is(mesh, "large", pb.MODEL_HEALTH_WARMING)()
        assert await health_is(mesh, "small", pb.MODEL_HEALTH_READY)()


async def test_a_model_that_joins_the_file_is_warmed_up(simulator, file):
    file.write_text(SMALL)
    backends = [{"url": simulator.url}]
    async with connected("inference", backends=backends, models_file=file, **ALONE) as mesh:
        file.write_text(SMALL + LARGE + 'warm_up = "Hello"\n')

        async def there() -> bool:
            return await names(mesh) == ["large", "small"]

        await eventually_async(there)
        await eventually_async(health_is(mesh, "large", pb.MODEL_HEALTH_READY))
        assert warm_ups(simulator) == 1


async def test_a_backend_that_is_not_probed_is_ready_once_it_is_warm(simulator):
    settings = warming("Hello", simulator.url)
    settings["backends"] = [{"url": simulator.url, "probe": False}]
    async with connected("inference", **settings) as mesh:
        assert warm_ups(simulator) == 1
        assert await health_is(mesh, "small", pb.MODEL_HEALTH_READY)()
    assert simulator.load.by_path["/v1/models"] == 0


async def test_a_backend_that_is_left_alone_says_until_when():
    models = [{"name": "small", "upstream_model": "sim-small", "backends": ["ill", "busy"]}]
    failing = QUICK.model_copy(update={"error_rate": 1.0})
    limited = {"error_rate": 1.0, "error_status": 429, "error_retry_after_s": 60.0}
    async with (
        Simulator(failing) as ill,
        Simulator(QUICK.model_copy(update=limited)) as busy,
    ):
        backends = [
            {"name": "ill", "url": ill.url, "breaker": {"consecutive_failures": 1, "open_s": 30}},
            {"name": "busy", "url": busy.url, "breaker": {"max_rest_s": 60}},
        ]
        async with connected("inference", backends=backends, models=models, **ALONE) as mesh:
            for state in (await mesh.inference.get_model("small")).backend_states:
                assert state.breaker == pb.BREAKER_STATE_CLOSED
                assert not state.HasField("resting_until")
            with pytest.raises(MeshError):
                await mesh.inference.generate("Hi", model="small", timeout=5)
            (listed,) = [each async for each in mesh.inference.list_models()]
    now = time.time()
    opened, resting = listed.backend_states
    assert (opened.breaker, resting.breaker) == (pb.BREAKER_STATE_OPEN, pb.BREAKER_STATE_CLOSED)
    assert 20 < opened.resting_until.ToNanoseconds() / 1e9 - now <= 30
    assert 50 < resting.resting_until.ToNanoseconds() / 1e9 - now <= 60
