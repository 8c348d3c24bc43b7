"""The bench subcommands."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

bench = typer.Typer(help="Benchmarks; they report, and judge nothing.", no_args_is_help=True)

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the ratios to this file.")]


@bench.command()
def calls(
    rounds: Annotated[int, typer.Option(min=1, help="How often each figure is taken.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.05, help="Length of one measurement.")] = 1.0,
    json_file: JsonFile = None,
) -> None:
    """Calls a second beside a bare gRPC server: unary, coalesced, and many at once."""
    from agent360.mesh.bench.calls import flatten, measure
    from agent360.mesh.bench.report import print_results, write_json

    progress = Console(stderr=True)
    found = asyncio.run(measure(rounds, seconds, lambda text: progress.print(text, style="dim")))
    flat = flatten(found)
    print_results(found, flat, Console())
    if json_file is not None:
        write_json(flat, json_file)


@bench.command()
def compare(old: Path, new: Path) -> None:
    """Print the ratios between two result files."""
    from agent360.mesh.bench.report import print_comparison

    try:
        print_comparison(old, new, Console())
    except ValueError as error:
        typer.echo(f"agent360-mesh: {error}", err=True)
        raise typer.Exit(2) from None
