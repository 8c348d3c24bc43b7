"""The ``generate`` command: a job, its progress bar and its summary."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from agent360.client import AnswerSource, Mesh, MeshError, Tls
from agent360.mesh.jobs.answers import AnswersFileError
from agent360.mesh.jobs.generation import GenerationJob, JobOptions, Tally, UnreachableError

_REFRESH_S: Final = 0.2
_INTERRUPTED: Final = 130


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the inference service is, and as whom it is asked."""

    address: str
    """host:port; empty: from the environment, else the default."""
    tenant: str
    """On whose behalf."""
    ca: Path | None
    """PEM file to trust; None: plaintext."""


def run_generate(options: JobOptions, connection: Connection) -> int:
    """Answers a file.

    Returns:
        0: every line has an answer; 1: some have errors; 2: it could not be done; 130: it was
        interrupted, and the same command goes on with it.
    """
    console = Console(stderr=True)
    try:
        return asyncio.run(_run(options, connection, console))
    except (AnswersFileError, UnreachableError, OSError, ValueError) as error:
        _complain(console, str(error))
        return 2


async def _run(options: JobOptions, connection: Connection, console: Console) -> int:
    size = options.prompts.stat().st_size
    if options.answers.exists() and options.answers.samefile(options.prompts):
        raise ValueError("the answers cannot go into the file of the prompts")
    async with Mesh.connect(
        inference=connection.address or None,
        tenant=connection.tenant,
        tls=Tls(ca=connection.ca) if connection.ca else None,
    ) as mesh:
        job = GenerationJob(mesh, options)
        await _require_service(mesh)
        began = time.monotonic()
        running = asyncio.create_task(job.run())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, running.cancel)
        try:
            await _watch(running, job.tally, size, console)
            await running
            interrupted = False
        except asyncio.CancelledError:
            interrupted = True
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            _print_summary(job.tally, time.monotonic() - began, options, console)
    if interrupted:
        _complain(console, "interrupted; the same command goes on where it stopped")
        return _INTERRUPTED
    return 1 if job.tally.errors else 0


async def _require_service(mesh: Mesh) -> None:
    """Asks for the models, so that a wrong address or key is told before the first line.

    Raises:
        ValueError: the service cannot be reached, or does not let the caller in.
    """
    try:
        async for _ in mesh.inference.list_models(page_size=1, fields=["name"]):
            return
    except MeshError as error:
        raise ValueError(str(error)) from error


async def _watch(running: asyncio.Task[Tally], tally: Tally, size: int, console: Console) -> None:
    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[lines]:,} lines, {task.fields[errors]:,} errors"),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("", total=size, lines=0, errors=0, tokens=0)
        while not running.done():
            await asyncio.wait((running,), timeout=_REFRESH_S)
            progress.update(
                bar,
                completed=tally.done_bytes,
                lines=tally.lines,
                errors=tally.errors.total(),
                tokens=tally.output_tokens,
            )


def _print_summary(tally: Tally, seconds: float, options: JobOptions, console: Console) -> None:
    table = Table(title=str(options.answers), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")

    def row(what: str, figure: str) -> None:
        table.add_row(what, figure)

    row("lines", f"{tally.lines:,}")
    if tally.before:
        row("answered before", f"{tally.before:,}")
    row("answered now", f"{tally.answered:,}")
    for source in (AnswerSource.CACHE, AnswerSource.COALESCED):
        if tally.sources[source]:
            row(f"  of them {_SOURCES[source]}", f"{tally.sources[source]:,}")
    for reason, count in tally.errors.most_common():
        row(f"error {reason}", f"{count:,}")
    if tally.retries:
        row("tries beyond the first", f"{tally.retries:,}")
    row("tokens in / out", f"{tally.input_tokens:,} / {tally.output_tokens:,}")
    row("cost", f"${tally.cost_usd:,.4f}")
    row("time", f"{seconds:,.1f} s")
    row("rate", f"{tally.answered / seconds:,.1f} lines/s" if seconds else "-")
    console.print(table)
    if tally.dropped_bytes:
        console.print(f"a half-written answer of {tally.dropped_bytes:,} bytes was removed")
    if tally.tried_again:
        console.print(f"{tally.tried_again:,} errors of earlier runs were tried again")
    if tally.stale:
        console.print(
            f"{tally.stale:,} answers in {options.answers} belong to no line of "
            f"{options.prompts} any more: it was changed"
        )
    for fault in tally.faults:
        console.print(f"{options.prompts}: {fault}", markup=False, highlight=False, soft_wrap=True)


_SOURCES: Final = {
    AnswerSource.CACHE: "from the cache",
    AnswerSource.COALESCED: "with an identical line",
}


def _complain(console: Console, message: str) -> None:
    console.print(f"agent360-mesh: {message}", markup=False, highlight=False, soft_wrap=True)
