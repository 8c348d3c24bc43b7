"""The command line: one function for each subcommand; the work is done elsewhere."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
import threading
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from agent360.mesh.cli.audit import audit
from agent360.mesh.cli.bench import bench
from agent360.mesh.runtime.config import ConfigError, describe, load
from agent360.mesh.runtime.policies.authentication import hash_key
from agent360.mesh.services import NAMES, service_kind

app = typer.Typer(
    name="agent360-mesh",
    help="Inference, cache, rate limits and metrics for a platform of LLM agents.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(keys, name="keys")
app.add_typer(bench, name="bench")
app.add_typer(audit, name="audit")

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file with a table for each service.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting by its dotted path, such as deadline.default_s=5."),
]


class ProfileKind(StrEnum):
    """What a profile looks at."""

    CPU = "cpu"
    MEMORY = "memory"
    IO = "io"


class LogLevel(StrEnum):
    """The least level of what is printed."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


Service = Annotated[str, typer.Argument(help=f"One of {', '.join(sorted(NAMES))}.")]


@app.command()
def serve(
    service: Service,
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port.")] = None,
    http_port: Annotated[int | None, typer.Option(help="HTTP port.")] = None,
    insecure: Annotated[
        bool, typer.Option(help="Listen beyond loopback without TLS and API keys.")
    ] = False,
    while_stdin_open: Annotated[
        bool,
        typer.Option(
            "--while-stdin-open", help="Stop when standard input ends, as with its starter."
        ),
    ] = False,
    assignments: Assignments = None,
) -> None:
    """Run one service until SIGTERM."""
    from agent360.mesh.runtime.logs import configure_logging
    from agent360.mesh.runtime.server import Server
    from agent360.mesh.runtime.settings import SettingError

    flags = parse_assignments(assignments)
    for name, value in (("host", host), ("port", port), ("http_port", http_port)):
        if value is not None:
            flags[name] = value
    if insecure:
        flags["insecure"] = True
    kind = _kind(service)
    try:
        settings = load(kind.settings, config=config, flags=flags).settings
        configure_logging(settings.log, settings.redaction, settings.service)
        server = Server(settings, kind.servicer)
    except (ConfigError, ValueError) as error:
        fail(str(error))

    if while_stdin_open:
        threading.Thread(target=_stop_when_stdin_ends, daemon=True).start()
    try:
        asyncio.run(server.run_until_signal())
    except (RuntimeError, OSError, SettingError) as error:
        fail(f"{service} could not start: {error}")


@app.command()
def up(
    config: ConfigFile = None,
    limits: Annotated[Path | None, typer.Option(help="TOML file with rate limits.")] = None,
) -> None:
    """Run all four services on loopback with embedded stores, until Ctrl-C."""
    from agent360.mesh.cli.supervisor import run_up

    raise typer.Exit(run_up(config, limits))


@app.command()
def sim(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port.")] = 8370,
    ttft: Annotated[float, typer.Option(help="Seconds to the first token.")] = 0.05,
    itl: Annotated[float, typer.Option(help="Seconds between tokens.")] = 0.005,
) -> None:
    """Run a simulator of an OpenAI-compatible model server; its answers are made up."""
    from agent360.mesh.simulator import SimulatorSettings
    from agent360.mesh.simulator import run as run_simulator

    settings = SimulatorSettings(host=host, port=port, first_token_s=ttft, inter_token_s=itl)
    asyncio.run(run_simulator(settings))


@app.command()
def demo(
    requests: Annotated[Path, typer.Option(help="JSON lines to stream.")] = Path(
        "examples/agent_requests.jsonl"
    ),
    upstream: Annotated[str, typer.Option(help="URL of a real OpenAI-compatible server.")] = "",
    model: Annotated[str, typer.Option(help="Model of that server.")] = "",
    hold: Annotated[bool, typer.Option(help="Keep the mesh running afterwards.")] = False,
) -> None:
    """Stream a file of agent requests through a mesh of all four services."""
    from agent360.mesh.cli.demo import run_demo

    raise typer.Exit(run_demo(requests, upstream, model, hold=hold))


@app.command()
def generate(
    prompts: Annotated[Path, typer.Argument(help="JSON lines with a prompt or messages each.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where answers are appended.")],
    model: Annotated[str, typer.Option(help="Of lines that name none; auto: chosen.")] = "auto",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Bound of answers to lines that name none.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=10_000, help="Lines that are worked on at a time.")
    ] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds that one try may take.")] = 120.0,
    patience: Annotated[
        float, typer.Option(help="Seconds that limits and outages are waited out for a line.")
    ] = 300.0,
    priority: Annotated[
        str, typer.Option(help="low, normal or high: who is served first where not all can be.")
    ] = "low",
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Put the answers in the prompts' order at the end.")
    ] = False,
    keep_errors: Annotated[
        bool, typer.Option("--keep-errors", help="Do not try again what failed in earlier runs.")
    ] = False,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Ignore fields of lines that are not known.")
    ] = False,
    address: Annotated[
        str, typer.Option(help="host:port of the inference service; several by commas.")
    ] = "",
    tenant: Annotated[
        str, typer.Option(envvar="AGENT360_TENANT", help="On whose behalf.")
    ] = "default",
    ca: Annotated[Path | None, typer.Option(help="PEM file to trust; TLS is used.")] = None,
) -> None:
    """Answer a file of prompts; the same command goes on after a crash."""
    from agent360.client import Priority
    from agent360.mesh.cli.generate import Connection, run_generate
    from agent360.mesh.jobs.generation import JobOptions
    from agent360.mesh.jobs.prompts import LineDefaults

    if priority.upper() not in Priority.__members__:
        fail(f"--priority {priority}: must be low, normal or high")
    options = JobOptions(
        prompts=prompts,
        answers=output,
        defaults=LineDefaults(model, max_tokens),
        concurrency=concurrency,
        timeout_s=timeout,
        patience_s=patience,
        priority=Priority[priority.upper()],
        keep_errors=keep_errors,
        ordered=ordered,
        strict=not ignore_unknown,
    )
    raise typer.Exit(run_generate(options, Connection(address, tenant, ca)))


@app.command()
def health(
    address: Annotated[
        str, typer.Option(envvar="AGENT360_HEALTH_ADDRESS", help="host:port of the service.")
    ] = "127.0.0.1:7360",
    service: Annotated[str, typer.Option(help="Full gRPC service name; empty: overall.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 2.0,
    ca: Annotated[
        Path | None,
        typer.Option(envvar="AGENT360_HEALTH_CA", help="PEM file to trust; TLS is used."),
    ] = None,
) -> None:
    """Ask a service whether it is serving; exit code 0 if it is."""
    from agent360.mesh.cli.prober import probe

    status, serving = asyncio.run(probe(address, service, timeout, ca))
    typer.echo(f"{address} {status}")
    raise typer.Exit(0 if serving else 1)


@app.command()
def profile(
    service: Service,
    seconds: Annotated[float, typer.Option(help="For how long, at most 60.")] = 10.0,
    kind: Annotated[
        ProfileKind,
        typer.Option(help="cpu: where time goes; memory: allocations; io: the event loop."),
    ] = ProfileKind.CPU,
    file: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: by its subject.")
    ] = None,
    html: Annotated[bool, typer.Option(help="A page instead of JSON for speedscope.")] = False,
    opened: Annotated[
        bool, typer.Option("--open", help="Show it in a browser, as a page.")
    ] = False,
    ca: Annotated[
        Path | None, typer.Option(envvar="AGENT360_CA", help="PEM file to trust; TLS is used.")
    ] = None,
) -> None:
    """Profile a running service; its address is AGENT360_<SERVICE>_ADDRESS or the default."""
    from agent360.mesh.cli.profile import run_profile

    output: Any = "html" if html or opened else "speedscope"
    code = run_profile(service, kind.value, seconds, output, file, ca=ca, opened=opened)
    raise typer.Exit(code)


@app.command()
def top(
    window: Annotated[
        float, typer.Option(min=10, help="Rates are means over so many seconds.")
    ] = 60,
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between looks.")] = 2,
    tenant: Annotated[str, typer.Option(help="Whose figures; *: all tenants', for admins.")] = "*",
    once: Annotated[bool, typer.Option("--once", help="Print one look instead.")] = False,
    ca: Annotated[
        Path | None, typer.Option(envvar="AGENT360_CA", help="PEM file to trust; TLS is used.")
    ] = None,
) -> None:
    """Show what the mesh is doing: traffic, errors, latency, tokens, cost, denials, alerts."""
    from agent360.mesh.cli.top.command import run_top

    code = run_top(window_s=window, every_s=every, tenant=tenant, ca=ca, once=once)
    raise typer.Exit(code)


@app.command()
def logs(
    service: Annotated[str, typer.Option(help="Of one service; empty: of all.")] = "",
    level: Annotated[LogLevel | None, typer.Option(help="The least level.")] = None,
    since: Annotated[str, typer.Option(help="How far back: 90s, 15m, 1h, 2d.")] = "1h",
    tenant: Annotated[str, typer.Option(help="Whose; *: all tenants', which is for admins.")] = "*",
    pattern: Annotated[str, typer.Option(help="With this pattern.")] = "",
    trace: Annotated[str, typer.Option(help="Of this trace.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="How many at most, the latest.")] = 200,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with those to come.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
    ca: Annotated[
        Path | None, typer.Option(envvar="AGENT360_CA", help="PEM file to trust; TLS is used.")
    ] = None,
) -> None:
    """Print what the services logged at warning and above, and a sample of the rest."""
    from agent360.mesh.cli.logs import Wanted, read_duration, run_logs

    try:
        span = read_duration(since)
    except ValueError as error:
        fail(f"--since: {error}")
    least: Any = level.value if level else None
    wanted = Wanted(span, tenant, service, least, pattern, trace, limit)
    raise typer.Exit(run_logs(wanted, ca=ca, follow=follow, as_json=as_json))


@app.command("config")
def show_config(
    service: Annotated[str, typer.Argument(help="One service; empty: all.")] = "",
    config: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Print the settings in force and where each came from."""
    console = Console()
    for name in [service] if service else sorted(NAMES):
        table = Table(title=name, title_justify="left", box=None, pad_edge=False)
        for column in ("setting", "value", "from"):
            table.add_column(column, overflow="fold")
        try:
            loaded = load(_kind(name).settings, config=config, flags=parse_assignments(assignments))
        except ConfigError as error:
            fail(str(error))
        for path, value, origin in describe(loaded):
            table.add_row(path, value, origin)
        console.print(table)


@keys.command("new")
def new_key() -> None:
    """Make a random API key and print it with its hash."""
    key = f"a360_{secrets.token_urlsafe(32)}"
    typer.echo(f"key    {key}\nsha256 {hash_key(key)}")


@keys.command("hash")
def hash_of_key() -> None:
    """Read an API key from standard input and print the hash for the configuration."""
    typer.echo(hash_key(sys.stdin.readline().strip()))


def parse_assignments(assignments: list[str] | None) -> dict[str, Any]:
    """Values by dotted path, from ``path=value`` texts; lists and tables are JSON."""
    flags: dict[str, Any] = {}
    for assignment in assignments or []:
        path, separator, value = assignment.partition("=")
        if not separator:
            fail(f"--set {assignment!r}: expected path=value")
        try:
            flags[path.strip()] = json.loads(value) if value[:1] in {"[", "{"} else value
        except ValueError as error:
            fail(f"--set {assignment!r}: {error}")
    return flags


def _stop_when_stdin_ends() -> None:
    while os.read(sys.stdin.fileno(), 4_096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def fail(message: str) -> NoReturn:
    """Ends the command with an error for people."""
    typer.echo(f"agent360-mesh: {message}", err=True)
    raise typer.Exit(2)


def _kind(service: str) -> Any:
    if service not in NAMES:
        fail(f"there is no service {service!r}; one of {', '.join(sorted(NAMES))}")
    return service_kind(service)


def main() -> None:
    """Entry point."""
    app()
