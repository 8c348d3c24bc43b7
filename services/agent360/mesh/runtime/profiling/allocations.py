"""Where memory is allocated, by following every allocation."""

from __future__ import annotations

import asyncio
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from agent360.mesh.runtime.profiling.stacks import HTML_TYPE, Frame, Profile, Stack, speedscope

if TYPE_CHECKING:
    import memray


async def profile_allocations(seconds: float, *, html: bool) -> Profile:
    """Follows allocations of all threads. What that costs: ``agent360-mesh bench profiling``.

    The file has two parts: what was allocated at the moment when most was, and what was still
    allocated at the end. The page shows the first.
    """
    # Heavy to import, and needed only here.
    import memray  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="agent360-profile-") as directory:
        path = Path(directory) / "allocations"
        tracker = memray.Tracker(path)
        # A task of its own: below the frames of a compiled extension, such as gRPC's, the tracker
        # would not learn of Python's frames.
        await asyncio.create_task(_track(tracker, seconds))
        return await asyncio.to_thread(_page if html else _stacks, path)


async def _track(tracker: memray.Tracker, seconds: float) -> None:
    with tracker:
        await asyncio.sleep(seconds)


def _stacks(path: Path) -> Profile:
    import memray  # noqa: PLC0415

    with memray.FileReader(path) as reader:
        peak = [
            _stack(record)
            for record in reader.get_high_watermark_allocation_records(merge_threads=True)
        ]
        left = [
            _stack(record) for record in reader.get_leaked_allocation_records(merge_threads=True)
        ]
    return speedscope(
        "allocations", [("at the peak", "bytes", peak), ("left at the end", "bytes", left)]
    )


def _stack(record: object) -> Stack:
    frames = tuple(
        Frame(function, file, line)
        for function, file, line in reversed(record.stack_trace())  # type: ignore[attr-defined]
    )
    return Stack(frames or (Frame("(no Python frame)"),), record.size)  # type: ignore[attr-defined]


def _page(path: Path) -> Profile:
    import memray  # noqa: PLC0415
    from memray.reporters.flamegraph import FlameGraphReporter  # noqa: PLC0415

    with memray.FileReader(path) as reader:
        report = FlameGraphReporter.from_snapshot(
            reader.get_high_watermark_allocation_records(merge_threads=True),
            memory_records=tuple(reader.get_memory_snapshots()),
            native_traces=False,
        )
        page = io.StringIO()
        report.render(
            outfile=page,
            metadata=reader.metadata,
            show_memory_leaks=False,
            merge_threads=True,
            inverted=False,
        )
    return Profile(HTML_TYPE, page.getvalue().encode())
