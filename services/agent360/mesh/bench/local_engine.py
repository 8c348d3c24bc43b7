"""The local engine: tokens a second of eight streams beside one, on a tiny random model."""

from __future__ import annotations

import asyncio
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import structlog

from agent360.client.errors import MeshError
from agent360.mesh.inference.conversation import Message, Prompt, Sampling
from agent360.mesh.inference.local.backend import LocalBackend
from agent360.mesh.inference.local.settings import LocalEngineSettings

STREAMS: Final = 8
"""Answers at the same time."""

_TOKENS: Final = 200
_CONTEXT_TOKENS: Final = 512
_LOAD_S: Final = 30.0


async def measure_local_engine(seconds: float) -> float | str:
    """Tokens a second of eight streams beside those of one; or why that cannot be measured.

    Args:
        seconds: about how long each of the two is measured.
    """
    if find_spec("xllamacpp") is None or find_spec("gguf") is None:
        return "xllamacpp and gguf are not both installed"
    from agent360.mesh.bench.tiny_model import write_tiny_model  # noqa: PLC0415 - needs gguf

    with tempfile.TemporaryDirectory() as directory:
        path = await asyncio.to_thread(write_tiny_model, Path(directory) / "tiny.gguf")
        backend = LocalBackend(
            LocalEngineSettings(path=path, parallel=STREAMS, context_tokens=_CONTEXT_TOKENS),
            structlog.get_logger(),
        )
        await backend.start()
        try:
            await _loaded(backend)
            await _tokens_per_s(backend, STREAMS, seconds / 4)
            one = await _tokens_per_s(backend, 1, seconds)
            eight = await _tokens_per_s(backend, STREAMS, seconds)
        finally:
            await backend.close()
    return eight / one


async def _loaded(backend: LocalBackend) -> None:
    async with asyncio.timeout(_LOAD_S):
        while True:
            try:
                await backend.list_models()
            except MeshError as error:
                if error.reason != "ENGINE_LOADING":
                    raise
                await asyncio.sleep(0.01)
            else:
                return


async def _tokens_per_s(backend: LocalBackend, streams: int, seconds: float) -> float:
    tokens = 0
    end = time.perf_counter() + seconds

    async def stream(number: int) -> None:
        nonlocal tokens
        while time.perf_counter() < end:
            ending = await backend.generate(_prompt(number), "tiny", lambda _: None, streamed=True)
            tokens += 0 if ending.usage is None else ending.usage.output_tokens
            number += streams

    began = time.perf_counter()
    await asyncio.gather(*(stream(number) for number in range(streams)))
    return tokens / (time.perf_counter() - began)


def _prompt(number: int) -> Prompt:
    more: dict[str, Any] = {"sampling": Sampling(seed=number, max_tokens=_TOKENS)}
    return Prompt("tiny", (Message("user", f"Say something, no. {number}"),), **more)
