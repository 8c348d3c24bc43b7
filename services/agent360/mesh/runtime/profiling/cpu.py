"""Where the event loop's thread spends its time, by sampling its stack."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from agent360.mesh.runtime.profiling.stacks import HTML_TYPE, JSON_TYPE, Profile

INTERVAL_S: Final = 0.001
"""How often the stack is looked at. What that costs: ``agent360-mesh bench profiling``."""


async def profile_cpu(seconds: float, *, html: bool) -> Profile:
    """Samples the stack of the thread that runs the event loop, tasks and callbacks alike.

    Time in which the loop waits for I/O is a frame of its own, the selector's. A task that awaits
    is not on the stack: it costs nothing.
    """
    # Heavy to import, and needed only here.
    from pyinstrument import Profiler  # noqa: PLC0415
    from pyinstrument.renderers import HTMLRenderer, SpeedscopeRenderer  # noqa: PLC0415

    # Not the mode that follows awaits: that sees one context only, and a server has thousands.
    profiler = Profiler(interval=INTERVAL_S, async_mode="disabled")
    profiler.start()
    try:
        await asyncio.sleep(seconds)
    finally:
        session = profiler.stop()
    renderer: Any = HTMLRenderer() if html else SpeedscopeRenderer(show_all=True)
    text: str = await asyncio.to_thread(renderer.render, session)
    return Profile(HTML_TYPE if html else JSON_TYPE, text.encode())
