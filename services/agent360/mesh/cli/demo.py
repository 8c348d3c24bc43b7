"""The demo: a file of agent requests goes through the simulator and all four services."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import grpc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from agent360.client import (
    AnswerSource,
    GenerateRequest,
    Mesh,
    MeshError,
    Message,
    Tool,
)
from agent360.mesh.cli.supervisor import Supervisor
from agent360.mesh.free_ports import free_ports
from agent360.mesh.services import NAMES, service_kind
from agent360.mesh.simulator import Simulator, SimulatorSettings
from agent360.metrics.v1 import metrics_pb2

_CONCURRENCY: Final = 64
_PROBE_S: Final = 10.0
_STEP_REQUESTS: Final = 12
"""Requests that come at once: a step of an agent, or several agents' steps, ask for several."""
_STEPS_PER_S: Final = 7.0
_KEY: Final = "AGENT360_UPSTREAM_API_KEY"

_LIMITS: Final = """
[[limits]]
id = "requests-per-minute"
name = "inference.requests"
amount = 600
period = "1m"

[[limits]]
id = "requests-per-minute"
name = "inference.requests"
tenant = "umbrella-labs"
amount = 70
period = "1h"

[[limits]]
id = "tokens-per-minute"
name = "inference.tokens"
algorithm = "sliding_window"
amount = 2000000
period = "1m"
"""


@dataclass(slots=True)
class Tally:
    """What became of one tenant's requests."""

    requests: int = 0
    sources: Counter[AnswerSource] = field(default_factory=Counter)
    denied: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    input_tokens: int = 0
    output_tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)
    first_tokens_s: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """Requests that got an answer."""
        return sum(self.sources.values())


def run_demo(requests: Path, upstream: str, model: str, *, hold: bool) -> int:
    """Runs the demo; returns 0 only if every request got an answer or a proper denial."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        rows = [json.loads(line) for line in requests.read_text().splitlines() if line.strip()]
    except (OSError, json.JSONDecodeError) as error:
        console.print(f"agent360-mesh: {requests}: {error}")
        return 2
    if upstream and not model:
        console.print("agent360-mesh: --upstream needs --model")
        return 2
    try:
        return asyncio.run(_demo(rows, upstream, model, hold, console))
    except KeyboardInterrupt:
        return 130


async def _demo(
    rows: list[dict[str, Any]], upstream: str, model: str, hold: bool, console: Console
) -> int:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        log = directory / "mesh.log"
        simulator = Simulator(SimulatorSettings(port=free_ports(1)[0]))
        if not upstream:
            await simulator.start()
            console.print(
                f"simulator of a model server at {simulator.url}: its answers are made up"
            )
        try:
            if upstream:
                await _require_answer(upstream)
            config = _write_config(directory, upstream or simulator.url, model)
            arguments = {name: [f"--config={config}"] for name in NAMES}
            async with Supervisor(arguments, _ports(), log_file=log) as processes:
                failed = await _stream_all(rows, processes, console)
                if failed:
                    console.print(log.read_text()[-4_000:], style="dim", markup=False)
                if hold:
                    console.print("Ctrl-C stops the mesh.")
                    await processes.wait()
                return 1 if failed else 0
        except RuntimeError as error:
            console.print(f"agent360-mesh: {error}")
            if log.exists():
                console.print(log.read_text()[-4_000:], markup=False)
            return 1
        finally:
            if not upstream:
                await simulator.close()


async def _stream_all(rows: list[dict[str, Any]], processes: Supervisor, console: Console) -> bool:
    """Streams all requests and prints the tables; returns whether any failed."""
    addresses = processes.addresses
    tallies: dict[str, Tally] = {}
    async with Mesh.connect(
        inference=addresses["inference"],
        cache=addresses["cache"],
        ratelimit=addresses["ratelimit"],
        metrics=addresses["metrics"],
        api_key="",
    ) as mesh:
        gate = asyncio.Semaphore(_CONCURRENCY)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("requests", total=len(rows), tokens=0)
            produced = 0

            async def run(row: dict[str, Any]) -> None:
                nonlocal produced
                async with gate:
                    tally = tallies.setdefault(row["tenant"], Tally())
                    produced += await _run_one(mesh, row, tally)
                    progress.update(bar, advance=1, tokens=produced)

            async with asyncio.TaskGroup() as tasks:
                for start in range(0, len(rows), _STEP_REQUESTS):
                    for row in rows[start : start + _STEP_REQUESTS]:
                        tasks.create_task(run(row))
                    await asyncio.sleep(1 / _STEPS_PER_S)
        _print_tallies(tallies, console)
        await _print_recorded(mesh, tallies, console)
    _print_addresses(addresses, console)
    return any(tally.failed for tally in tallies.values())


async def _run_one(mesh: Mesh, row: dict[str, Any], tally: Tally) -> int:
    """Streams one request; returns the tokens that it got."""
    tally.requests += 1
    started = time.perf_counter()
    first: float | None = None
    stream = mesh.inference.stream(_request(row), tenant=row["tenant"])
    try:
        async for _ in stream:
            first = first or time.perf_counter() - started
    except MeshError as error:
        if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.quotas:
            tally.denied += 1
        else:
            tally.failed[str(error)] += 1
        return 0
    finally:
        tally.batch_sizes.append(stream.batch_size)
    answer = stream.answer
    tally.latencies_s.append(time.perf_counter() - started)
    if first is not None:
        tally.first_tokens_s.append(first)
    tally.sources[answer.source] += 1
    tally.input_tokens += answer.usage.input_tokens
    tally.output_tokens += answer.usage.output_tokens
    return answer.usage.output_tokens


def _request(row: dict[str, Any]) -> GenerateRequest:
    return GenerateRequest(
        [Message(each["role"], each["content"]) for each in row["messages"]],
        max_tokens=row.get("max_tokens"),
        tools=[Tool(**tool) for tool in row.get("tools", ())],
        session_id=row.get("session", ""),
    )


def _print_tallies(tallies: dict[str, Tally], console: Console) -> None:
    table = Table(title="What became of the requests", title_justify="left")
    for column in (
        "tenant",
        "requests",
        "answered",
        "cached",
        "coalesced",
        "denied",
        "tokens in/out",
        "p50 / p95 / p99 ms",
        "first token ms",
        "mean batch",
    ):
        table.add_column(column, justify="left" if column == "tenant" else "right")
    for tenant, tally in sorted(tallies.items()):
        latencies = " / ".join(_ms(tally.latencies_s, q) for q in (0.5, 0.95, 0.99))
        table.add_row(
            tenant,
            str(tally.requests),
            str(tally.answered),
            str(tally.sources[AnswerSource.CACHE]),
            str(tally.sources[AnswerSource.COALESCED]),
            str(tally.denied),
            f"{tally.input_tokens:,}/{tally.output_tokens:,}",
            latencies,
            _ms(tally.first_tokens_s, 0.5),
            f"{statistics.fmean(tally.batch_sizes or [0]):.1f}",
        )
    console.print(table)
    for tenant, tally in tallies.items():
        for error, count in tally.failed.items():
            console.print(f"{tenant}: {count} failed: {error}", style="red", markup=False)


async def _print_recorded(mesh: Mesh, tallies: dict[str, Tally], console: Console) -> None:
    """Asks the metrics service what it has recorded, until that is everything or 8 s are over."""
    query = metrics_pb2.QueryRequest(
        name="inference_answers_total", aggregation=metrics_pb2.AGGREGATION_SUM
    )
    deadline = time.monotonic() + 8.0
    recorded: dict[str, int] = {}
    while time.monotonic() < deadline:
        for tenant in sorted(tallies):
            groups = [group async for group in mesh.metrics.query(query, tenant=tenant)]
            recorded[tenant] = int(sum(point.value for group in groups for point in group.points))
        if all(count >= tallies[tenant].answered for tenant, count in recorded.items()):
            break
        await asyncio.sleep(0.5)
    text = ", ".join(
        f"{tenant} {count} of {tallies[tenant].answered}" for tenant, count in recorded.items()
    )
    console.print(f"answers recorded by the metrics service: {text}")


def _print_addresses(addresses: dict[str, str], console: Console) -> None:
    console.print("the services listened here; with --hold they go on, for example:")
    for name, address in addresses.items():
        console.print(f"  {name:<10} grpcurl -plaintext {address} list", highlight=False)


def _ms(seconds: list[float], quantile: float) -> str:
    if not seconds:
        return "-"
    ordered = sorted(seconds)
    return f"{ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] * 1e3:.0f}"


async def _require_answer(url: str) -> None:
    """Checks that a model server is there; what it says does not matter yet.

    Raises:
        RuntimeError: it is not.
    """
    timeout = aiohttp.ClientTimeout(total=_PROBE_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"{url.rstrip('/')}/models"),
        ):
            return
    except (aiohttp.ClientError, TimeoutError) as error:
        raise RuntimeError(f"the model server at {url} cannot be reached: {error}") from error


def _write_config(directory: Path, url: str, model: str) -> Path:
    """Writes the demo's configuration: limits, models, and a database that goes with it."""
    limits = directory / "limits.toml"
    limits.write_text(_LIMITS)
    key = f'api_key_env = "{_KEY}"\n' if os.environ.get(_KEY) else ""
    models = (
        [("demo", model, '["simple", "complex"]')]
        if model
        else [("small", "sim-small", '["simple"]'), ("large", "sim-large", '["complex"]')]
    )
    lines = [
        f'[ratelimit]\nlimits = "{limits}"',
        f'[metrics]\nstore = "sqlite:///{directory}/metrics.db"',
        f'[[inference.backends]]\nname = "default"\nurl = "{url}"\n{key}',
    ]
    for name, upstream, classes in models:
        lines.append(
            f'[[inference.models]]\nname = "{name}"\nupstream_model = "{upstream}"\n'
            f"task_classes = {classes}\ninput_usd_per_million = 0.2\n"
            "output_usd_per_million = 0.8"
        )
    config = directory / "mesh.toml"
    config.write_text("\n\n".join(lines) + "\n")
    return config


def _ports() -> dict[str, int]:
    """The default ports, or free ones where one of them is taken."""
    import socket

    wanted = {name: service_kind(name).settings.default_port for name in NAMES}
    for port in wanted.values():
        for each in (port, port + 1000):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", each)) == 0:
                    print("default ports are taken: using free ones", file=sys.stderr)
                    return dict(zip(NAMES, free_ports(len(NAMES)), strict=True))
    return wanted
