"""Profiles a running service and writes what came to a file."""

from __future__ import annotations

import asyncio
import webbrowser
from pathlib import Path

from rich.console import Console

from agent360.client import Mesh, MeshError, Tls
from agent360.client.profiling import Format, Kind, ProfileFile

_SUFFIXES = {"speedscope": "speedscope.json", "html": "html"}
_SPEEDSCOPE = "https://www.speedscope.app"


def run_profile(
    service: str,
    kind: Kind,
    seconds: float,
    output: Format,
    file: Path | None,
    *,
    ca: Path | None,
    opened: bool,
) -> int:
    """Profiles a service; returns the exit code.

    Args:
        service: inference, cache, ratelimit or metrics.
        kind: what is looked at.
        seconds: for how long.
        output: how the profile is written.
        file: where to; None: a name made of the service and the kind.
        ca: PEM file to trust; TLS is used if it is given.
        opened: whether a browser shows the page.
    """
    console = Console(stderr=True)
    path = file or Path(f"{service}-{kind}.{_SUFFIXES[output]}")
    try:
        with console.status(f"profiling {service} for {seconds:g} s"):
            profile = asyncio.run(_profile(service, kind, seconds, output, ca))
    except (MeshError, ValueError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        return 1
    path.write_bytes(profile.content)
    console.print(f"{path} ({len(profile.content):,} bytes)", highlight=False)
    if output == "speedscope":
        console.print(f"open it with {_SPEEDSCOPE}, which reads it in the browser", highlight=False)
    elif opened:
        webbrowser.open(path.resolve().as_uri())
    return 0


async def _profile(
    service: str, kind: Kind, seconds: float, output: Format, ca: Path | None
) -> ProfileFile:
    async with Mesh.connect(tls=Tls(ca=ca) if ca else None) as mesh:
        return await mesh.profiling.profile(service, kind, seconds=seconds, output=output)
