"""The LiteLLM proxy beside the inference service: one worker, its own HTTP API."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple

import aiohttp

_PROGRAM: Final = "litellm"
_INSTALLED_IN: Final = ".cache/litellm/bin"
_START_S: Final = 90.0
_KEY: Final = "sk-benchmark-on-loopback-only"


class LiteLlm(NamedTuple):
    """A proxy that runs."""

    url: str
    """Base of its API."""
    key: str
    """What it asks for."""


def find_litellm() -> str | None:
    """Path of the program: on the PATH, or in .cache/litellm/bin of the current directory."""
    found = shutil.which(_PROGRAM) or shutil.which(_PROGRAM, path=_INSTALLED_IN)
    return found and str(Path(found).absolute())


@asynccontextmanager
async def litellm_proxy(
    program: str, port: int, upstream: str, model: str, directory: Path
) -> AsyncIterator[LiteLlm]:
    """Runs the proxy, with one worker and nothing configured but a model.

    Args:
        program: its path.
        port: where it listens, on the loopback address.
        upstream: base URL of the model server.
        model: its model, under the same name at the proxy.
        directory: where its configuration and its log go.
    """
    parameters = {"model": f"openai/{model}", "api_base": upstream, "api_key": "none"}
    configuration = {"model_list": [{"model_name": model, "litellm_params": parameters}]}
    file = directory / "litellm.yaml"
    # YAML is a superset of JSON.
    await asyncio.to_thread(file.write_text, json.dumps(configuration))
    log = await asyncio.to_thread((directory / "litellm.log").open, "wb")
    process = await asyncio.create_subprocess_exec(
        program,
        *("--config", str(file), "--host", "127.0.0.1", "--port", str(port)),
        env={
            **os.environ,
            "LITELLM_MASTER_KEY": _KEY,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOG": "ERROR",
        },
        stdout=log,
        stderr=log,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(_START_S), aiohttp.ClientSession() as session:
            while not await _answers(session, url):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.2)
        yield LiteLlm(f"{url}/v1", _KEY)
    finally:
        process.terminate()
        await process.wait()
        log.close()


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(f"{url}/health/liveliness") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False
