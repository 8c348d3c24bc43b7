"""The bench subcommands."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

bench = typer.Typer(help="Benchmarks; they report, and judge nothing.", no_args_is_help=True)

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the ratios to this file.")]


Rounds = Annotated[int, typer.Option(min=1, help="How often each figure is taken.")]
Seconds = Annotated[float, typer.Option(min=0.05, help="Length of one measurement.")]


@bench.command()
def calls(
    rounds: Rounds = 5,
    seconds: Seconds = 1.0,
    json_file: JsonFile = None,
) -> None:
    """Calls a second beside a bare gRPC server: unary, coalesced, and many at once."""
    from agent360.mesh.bench.calls import flatten, measure
    from agent360.mesh.bench.report import print_results, write_json

    found = asyncio.run(measure(rounds, seconds, _report))
    flat = flatten(found)
    print_results(found, flat, Console())
    if json_file is not None:
        write_json(flat, json_file)


@bench.command()
def cache(
    rounds: Rounds = 5,
    seconds: Seconds = 1.0,
    operations: Annotated[int, typer.Option(min=1_000, help="Length of the traces.")] = 1_000_000,
    json_file: JsonFile = None,
) -> None:
    """The cache: near hits, many gets, gets answered by Redis, and hit rates."""
    from agent360.mesh.bench.cache import flatten, measure
    from agent360.mesh.bench.cache_report import print_cache_figures
    from agent360.mesh.bench.report import write_json

    figures = asyncio.run(measure(rounds, seconds, _report, operations))
    flat = flatten(figures)
    print_cache_figures(figures, flat, Console())
    if json_file is not None:
        write_json(flat, json_file)


@bench.command()
def ratelimit(
    rounds: Rounds = 5,
    seconds: Seconds = 1.0,
    json_file: JsonFile = None,
) -> None:
    """The limiter: leased, awaited and many checks, checks decided in Redis, and Gubernator."""
    from agent360.mesh.bench.ratelimit import flatten, measure, print_ratelimit_figures
    from agent360.mesh.bench.report import write_json

    figures = asyncio.run(measure(rounds, seconds, _report))
    flat = flatten(figures)
    print_ratelimit_figures(figures, flat, Console())
    if json_file is not None:
        write_json(flat, json_file)


@bench.command()
def inference(
    rounds: Rounds = 5,
    seconds: Seconds = 1.0,
    json_file: JsonFile = None,
) -> None:
    """The gateway: beside a direct client and the LiteLLM proxy, cached, and the local engine."""
    from agent360.mesh.bench.inference import flatten, measure, print_inference_figures
    from agent360.mesh.bench.report import write_json

    figures = asyncio.run(measure(rounds, seconds, _report))
    flat = flatten(figures)
    print_inference_figures(figures, flat, Console())
    if json_file is not None:
        write_json(flat, json_file)


@bench.command()
def metrics(
    rounds: Rounds = 5,
    seconds: Seconds = 1.0,
    json_file: JsonFile = None,
) -> None:
    """The metrics service: samples taken in, queries over a day, and what they cost."""
    from agent360.mesh.bench.metrics import flatten, measure, print_metrics_figures
    from agent360.mesh.bench.report import write_json

    figures = asyncio.run(measure(rounds, seconds, _report))
    flat = flatten(figures)
    print_metrics_figures(figures, flat, Console())
    if json_file is not None:
        write_json(flat, json_file)


@bench.command()
def profiling(
    rounds: Rounds = 5,
    seconds: Seconds = 1.0,
    json_file: JsonFile = None,
) -> None:
    """What profiles cost: the speed of a busy event loop while it is profiled."""
    from agent360.mesh.bench.profiling import flatten, measure, print_profiling_figures
    from agent360.mesh.bench.report import write_json

    flat = flatten(asyncio.run(measure(rounds, seconds, _report)))
    print_profiling_figures(flat, Console())
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


def _report(text: str) -> None:
    Console(stderr=True).print(text, style="dim")
