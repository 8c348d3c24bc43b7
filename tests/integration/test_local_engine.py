"""llama.cpp in this process, with a tiny random model."""

import asyncio
import contextlib
import json
import socket
from pathlib import Path

import pytest
import structlog
from support.polling import eventually_async
from support.servers import running

from agent360.client.errors import MeshError
from agent360.mesh.bench.tiny_model import write_tiny_model
from agent360.mesh.inference.answers import merge
from agent360.mesh.inference.conversation import (
    EmbeddingInputs,
    Message,
    Prompt,
    Sampling,
    SchemaJson,
)
from agent360.mesh.inference.local.backend import LocalBackend
from agent360.mesh.inference.local.settings import LocalEngineSettings
from agent360.mesh.runtime.settings import SettingError

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")

SLOTS = 8
CONTEXT = 1024


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


async def opened(settings: LocalEngineSettings) -> LocalBackend:
    backend = LocalBackend(settings, structlog.get_logger())
    await backend.start()

    async def loaded() -> bool:
        try:
            return bool(await backend.list_models())
        except MeshError as error:
            if error.reason != "ENGINE_LOADING":
                raise
            return False

    await eventually_async(loaded)
    return backend


@pytest.fixture
async def backend(model_path):
    found = await opened(
        LocalEngineSettings(path=model_path, parallel=SLOTS, context_tokens=CONTEXT)
    )
    yield found
    await found.close()


def prompt(content: str, max_tokens: int = 24, **more) -> Prompt:
    sampling = Sampling(temperature=0.0, seed=1, max_tokens=max_tokens)
    message = Message("user", content)
    return Prompt(**{"model": "tiny", "messages": (message,), "sampling": sampling, **more})


async def run(backend: LocalBackend, asked: Prompt, *, streamed: bool = True):
    pieces = []
    ending = await backend.generate(asked, "tiny", pieces.extend, streamed=streamed)
    return pieces, ending


async def test_the_model_is_listed_by_the_name_of_its_file(backend):
    assert await backend.list_models() == ["tiny"]


async def test_an_answer_comes_in_pieces_with_its_usage(backend):
    pieces, ending = await run(backend, prompt("Say something"))
    assert len(pieces) > 1
    assert ending.finish_reason == "length"
    assert ending.usage.output_tokens == 24
    assert ending.usage.input_tokens > 10


async def test_an_answer_is_the_same_streamed_or_not(backend):
    streamed, _ = await run(backend, prompt("Again"))
    whole, _ = await run(backend, prompt("Again"), streamed=False)
    assert merge(streamed) == merge(whole)


async def test_every_piece_is_valid_text_though_the_model_makes_any_bytes(backend):
    sampling = Sampling(temperature=2.0, seed=7, max_tokens=500)
    pieces, ending = await run(backend, prompt("Noise", sampling=sampling))
    said = merge(pieces).content
    assert said.encode().decode() == said
    assert "\N{REPLACEMENT CHARACTER}" in said
    assert ending.usage.output_tokens <= 500


async def test_probabilities_of_tokens_are_told(backend):
    sampling = Sampling(temperature=0.0, max_tokens=8, logprobs=True, top_logprobs=3)
    pieces, _ = await run(backend, prompt("Hi", sampling=sampling))
    told = merge(pieces).logprobs
    assert told
    for each in told:
        assert each.logprob <= 0
        assert len(each.alternatives) == 3


async def test_eight_streams_are_generated_at_the_same_time(backend):
    speaking: set[int] = set()
    together = 0
    ended: set[int] = set()

    async def one(place: int) -> int:
        def sink(pieces) -> None:
            nonlocal together
            speaking.add(place)
            together = max(together, len(speaking - ended))

        asked = prompt(f"Stream {place}", 300, sampling=Sampling(seed=place, max_tokens=300))
        ending = await backend.generate(asked, "tiny", sink, streamed=True)
        ended.add(place)
        return ending.usage.output_tokens

    counts = await asyncio.gather(*map(one, range(SLOTS)))
    assert all(counts)
    assert together > SLOTS // 2


async def test_many_more_than_there_are_slots_are_all_answered(backend):
    answers = await asyncio.gather(*(run(backend, prompt(f"No. {n}")) for n in range(5 * SLOTS)))
    assert all(ending.usage.output_tokens == 24 for _, ending in answers)


async def test_cancelling_frees_the_slots(backend):
    endless = [
        prompt(f"Go on {n}", sampling=Sampling(seed=n, max_tokens=CONTEXT - 100))
        for n in range(3 * SLOTS)
    ]
    heard: set[int] = set()

    async def one(place: int) -> None:
        await backend.generate(endless[place], "tiny", lambda _: heard.add(place), streamed=True)

    tasks = [asyncio.create_task(one(place)) for place in range(len(endless))]

    async def some_speak() -> bool:
        return len(heard) >= 2

    await eventually_async(some_speak)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    heard_then = len(heard)
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*(run(backend, prompt(f"Now {n}")) for n in range(SLOTS)))
    assert all(ending.usage.output_tokens == 24 for _, ending in answers)
    assert len(heard) == heard_then < len(endless)


async def test_an_answer_whose_taker_raises_ends_with_what_it_raised(backend):
    def full(_) -> None:
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        await backend.generate(prompt("Go on", 500), "tiny", full, streamed=True)
    _, ending = await run(backend, prompt("And now?"))
    assert ending.usage.output_tokens == 24


async def test_a_json_schema_is_honoured(backend):
    schema = {
        "type": "object",
        "properties": {"count": {"type": "integer"}, "kind": {"enum": ["a", "b"]}},
        "required": ["count", "kind"],
    }
    asked = prompt(
        "Count",
        response_format=SchemaJson("counted", schema),
        sampling=Sampling(seed=3, max_tokens=400),
    )
    pieces, ending = await run(backend, asked)
    found = json.loads(merge(pieces).content)
    assert ending.finish_reason == "stop"
    assert isinstance(found["count"], int)
    assert found["kind"] in ("a", "b")


async def test_a_schema_that_is_none_is_refused_as_the_callers_mistake(backend):
    asked = prompt("Count", response_format=SchemaJson("odd", {"type": "nonsense"}))
    with pytest.raises(MeshError, match="nonsense") as caught:
        await run(backend, asked)
    assert caught.value.code.name == "INVALID_ARGUMENT"


async def test_a_prompt_beyond_the_context_is_refused_as_such(backend):
    with pytest.raises(MeshError) as caught:
        await run(backend, prompt("word " * CONTEXT))
    assert caught.value.reason == "CONTEXT_TOO_LONG"


async def test_tokens_are_counted_by_the_models_own_tokenizer(backend):
    asked = prompt("How many tokens are these?")
    _, ending = await run(backend, asked)
    assert await backend.count_tokens(asked, "tiny") == ending.usage.input_tokens


async def test_nothing_listens_on_the_network_and_the_socket_asks_for_a_key(backend):
    assert not listening_ports()
    # The socket's directory is this user's alone; even so it answers nobody without the key.
    (found,) = llama_sockets()
    assert found.parent.stat().st_mode & 0o077 == 0
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(10)
        stranger.connect(str(found))
        stranger.sendall(
            b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n"
            b'Connection: close\r\n\r\n{"content":"a"}'
        )
        assert b"401" in stranger.recv(4096).split(b"\r\n")[0]


async def test_closing_ends_what_is_generated_and_removes_the_socket(model_path):
    backend = await opened(LocalEngineSettings(path=model_path, parallel=1, context_tokens=2048))
    heard = asyncio.Event()
    task = asyncio.create_task(
        backend.generate(prompt("On", 1900), "tiny", lambda _: heard.set(), streamed=True)
    )
    async with asyncio.timeout(10):
        await heard.wait()
        await backend.close()
        with pytest.raises(MeshError):
            await task
    assert not llama_sockets()


async def test_vectors_are_made_where_the_engine_is_set_to(model_path):
    backend = await opened(
        LocalEngineSettings(path=model_path, parallel=2, context_tokens=256, embeddings=True)
    )
    try:
        vectors, usage = await backend.embed(EmbeddingInputs("tiny", ("one", "two", "one")), "tiny")
        assert [len(vector) for vector in vectors] == [64] * 3
        assert vectors[0] == pytest.approx(vectors[2], abs=1e-4)
        assert vectors[0] != pytest.approx(vectors[1], abs=1e-2)
        assert usage.input_tokens > 0
        with pytest.raises(MeshError, match="set to make vectors"):
            await run(backend, prompt("Chat"))
    finally:
        await backend.close()


@pytest.mark.parametrize("content", [None, b"not a model"])
async def test_a_file_that_is_no_model_says_so(tmp_path, content):
    path = tmp_path / "broken.gguf"
    if content is not None:
        path.write_bytes(content)
    backend = LocalBackend(LocalEngineSettings(path=path), structlog.get_logger())
    await backend.start()

    async def failed() -> bool:
        try:
            await backend.list_models()
        except MeshError as error:
            return error.reason == "ENGINE_NOT_LOADED" and str(path) in error.message
        return False

    await eventually_async(failed)
    await backend.close()


async def test_a_file_that_is_not_there_stops_the_service_from_starting(tmp_path):
    missing = tmp_path / "missing.gguf"
    engines = [{"name": "own", "path": missing}]
    with pytest.raises(SettingError, match=f"own: there is no file {missing}"):
        async with running("inference", engines=engines, backends=[]):
            pass


def llama_sockets() -> list[Path]:
    """Unix sockets on which llama.cpp listens in this process."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    own = own_sockets()
    return [Path(row[-1]) for row in rows if row[-1].endswith("/llama.sock") and row[6] in own]


def listening_ports() -> set[str]:
    """TCP sockets on which this process listens."""
    listening = "0A"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[9] for row in rows if row[3] == listening} & own_sockets()


def own_sockets() -> set[str]:
    """Inodes of the sockets that this process holds."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    return found
