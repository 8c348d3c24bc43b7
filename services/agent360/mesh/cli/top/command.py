"""Runs ``top``: live, or one look that is printed."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console

from agent360.client import Mesh, Tls
from agent360.mesh.cli.top.reading import BoardReader
from agent360.mesh.cli.top.tables import summary, tables


def run_top(*, window_s: float, every_s: float, tenant: str, ca: Path | None, once: bool) -> int:
    """Shows what the mesh is doing; returns the exit code.

    Args:
        window_s: rates are means over so many seconds.
        every_s: seconds between looks.
        tenant: whose figures; ``*``: all tenants'.
        ca: PEM file to trust; TLS is used if it is given.
        once: whether one look is printed instead of a live screen.
    """
    return asyncio.run(_run(window_s, every_s, tenant, ca, once))


async def _run(window_s: float, every_s: float, tenant: str, ca: Path | None, once: bool) -> int:
    async with Mesh.connect(tls=Tls(ca=ca) if ca else None) as mesh:
        reader = BoardReader(mesh, window_s=window_s, tenant=tenant)
        if once:
            board = await reader.read()
            console = Console()
            console.print(summary(board), *tables(board), sep="\n")
            return 1 if board.missing and not board.services else 0
        try:
            from agent360.mesh.cli.top.screen import TopApp
        except ImportError:
            Console(stderr=True).print(
                "the live screen needs the extra top: pip install 'agent360-mesh[top]'; "
                "--once prints one look without it",
                highlight=False,
                markup=False,
            )
            return 2
        await TopApp(reader, every_s).run_async()
    return 0
