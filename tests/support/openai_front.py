"""The inference service with its OpenAI-compatible front, before the simulator, for tests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from openai import AsyncOpenAI
from support.servers import running

from agent360.mesh.runtime.server import Server
from agent360.mesh.simulator import Simulator

ALONE: Final[dict[str, Any]] = {"cache": {"enabled": False}, "limits": {"enabled": False}}
"""Settings of a service that asks no other."""

MODELS: Final[list[dict[str, Any]]] = [
    {
        "name": "small",
        "upstream_model": "sim-small",
        "task_classes": ["simple"],
        "capabilities": ["chat", "tools", "json_schema", "images"],
    },
    {"name": "family/large", "upstream_model": "sim-large", "task_classes": ["complex"]},
    {"name": "embedder", "upstream_model": "sim-embed", "capabilities": ["embeddings"]},
]


@asynccontextmanager
async def fronted(simulator: Simulator, **settings: Any) -> AsyncIterator[Server]:
    """A running service before a simulator."""
    values = {"backends": [{"url": simulator.url}], "models": MODELS, **ALONE, **settings}
    async with running("inference", **values) as server:
        yield server


def base_url(server: Server, scheme: str = "http") -> str:
    """What a client is given instead of OpenAI's own address."""
    return f"{scheme}://127.0.0.1:{server.http_port}/v1"


def sdk(server: Server, **options: Any) -> AsyncOpenAI:
    """The real SDK, which does not repeat what failed unless it is told to."""
    return AsyncOpenAI(
        **{"base_url": base_url(server), "api_key": "unused", "max_retries": 0, **options}
    )
