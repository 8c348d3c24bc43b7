"""A program that asks for what takes long, says so when it is being answered, and waits to be
killed.

Run with the addresses of an inference and a cache service, and a key that somebody else fills.
"""

from __future__ import annotations

import asyncio
import sys

from agent360.client import Mesh
from agent360.client.inference import AnswerStream


async def main(inference: str, cache: str, key: str) -> None:
    """Makes the calls."""
    mesh = Mesh.connect(inference=inference, cache=cache, tenant="acme", api_key="")
    claims = [mesh.cache.claim(key, timeout=300) for _ in range(20)]
    asked = "[[sim:itl=0.01]][[sim:tokens=50000]] go on"
    streams = [mesh.inference.stream(f"{asked} {n}", model="small", timeout=300) for n in range(3)]
    await asyncio.gather(*claims, *(listen(stream) for stream in streams))


async def listen(stream: AnswerStream) -> None:
    """Reads an answer in pieces."""
    async for _ in stream:
        print("answered", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
