"""Prints what the services logged, and what they log from now on."""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.text import Text

from agent360.client import Mesh, MeshError, Tls
from agent360.client.logs import LevelName
from agent360.logs.v1 import logs_pb2 as pb

_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_CONTROL: Final = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]")
_POLL_S: Final = 1.0
_LATE: Final = timedelta(seconds=60)
"""Records may come so much later than they were logged and are still shown while following."""
_COLOURS: Final = {
    pb.LOG_LEVEL_DEBUG: "dim",
    pb.LOG_LEVEL_INFO: "green",
    pb.LOG_LEVEL_WARNING: "yellow",
    pb.LOG_LEVEL_ERROR: "red",
    pb.LOG_LEVEL_CRITICAL: "bold red",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records are printed."""

    since: timedelta
    """How far back."""
    tenant: str = "*"
    """Whose; ``*``: all tenants', for admins."""
    service: str = ""
    """Of which service; empty: of all."""
    level: LevelName | None = None
    """The least level; None: any."""
    pattern: str = ""
    """With which pattern; empty: any."""
    trace_id: str = ""
    """Of which trace; empty: any."""
    limit: int = 200
    """How many at most, the latest."""


def read_duration(text: str) -> timedelta:
    """A duration such as 90s, 15m, 1h or 2d.

    Raises:
        ValueError: it is none.
    """
    matched = _DURATION.fullmatch(text.strip())
    if matched is None:
        raise ValueError(f"{text!r} is not a duration such as 90s, 15m, 1h or 2d")
    return timedelta(seconds=float(matched[1]) * _UNITS[matched[2]])


def run_logs(wanted: Wanted, *, ca: Path | None, follow: bool, as_json: bool) -> int:
    """Prints records, the oldest first; returns the exit code.

    Args:
        wanted: which.
        ca: PEM file to trust; TLS is used if it is given.
        follow: whether to go on with those that come.
        as_json: JSON lines instead of text for people.
    """
    show = _show_json if as_json else _show
    try:
        asyncio.run(_print(wanted, ca, follow, show))
    except (MeshError, ValueError) as error:
        Console(stderr=True).print(f"[red]{error}[/red]", highlight=False)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


async def _print(
    wanted: Wanted, ca: Path | None, follow: bool, show: Callable[[pb.LogRecord], None]
) -> None:
    async with Mesh.connect(tls=Tls(ca=ca) if ca else None) as mesh:
        async for record in records(mesh, wanted, follow=follow):
            show(record)


async def records(mesh: Mesh, wanted: Wanted, *, follow: bool) -> AsyncIterator[pb.LogRecord]:
    """Yields records, the oldest first, each once; with ``follow`` until it is cancelled.

    Args:
        mesh: connected to the metrics service.
        wanted: which.
        follow: whether to go on with those that come.

    Raises:
        MeshError: they cannot be had.
    """
    start = datetime.now(UTC) - wanted.since
    seen: OrderedDict[str, datetime] = OrderedDict()
    while True:
        asked = datetime.now(UTC)
        for record in await _latest(mesh, wanted, start):
            if record.record_id not in seen:
                seen[record.record_id] = record.record_time.ToDatetime(UTC)
                yield record
        if not follow:
            return
        start = max(start, asked - _LATE)
        wanted = replace(wanted, limit=max(wanted.limit, len(seen)))
        for known in [each for each, time in seen.items() if time < start]:
            del seen[known]
        await asyncio.sleep(_POLL_S)


async def _latest(mesh: Mesh, wanted: Wanted, start: datetime) -> list[pb.LogRecord]:
    found: list[pb.LogRecord] = []
    pages = mesh.logs.list(
        start=start,
        level=wanted.level,
        service=wanted.service,
        pattern=wanted.pattern,
        trace_id=wanted.trace_id,
        tenant=wanted.tenant,
        page_size=min(wanted.limit, 1_000),
    )
    async for record in pages:
        found.append(record)
        if len(found) == wanted.limit:
            break
    return found[::-1]


def _show_json(record: pb.LogRecord) -> None:
    fields = MessageToDict(record, preserving_proto_field_name=True)
    print(json.dumps(fields, sort_keys=True), flush=True)


def _show(record: pb.LogRecord) -> None:
    line = Text()  # of what anybody may have logged: nothing in it may steer the terminal
    line.append(f"{record.record_time.ToDatetime(UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3], "dim")
    level = pb.LogLevel.Name(record.level).removeprefix("LOG_LEVEL_").lower()
    line.append(f" {level:<8}", _COLOURS.get(record.level, ""))
    line.append(f" {_harmless(record.service):<9} {_harmless(record.message)}")
    for name, value in _facts(record).items():
        line.append(f" {_harmless(name)}=", "dim")
        line.append(_harmless(str(value)))
    console = Console(soft_wrap=True)
    console.print(line, highlight=False)
    if record.exception:
        console.print(Text(_harmless(record.exception), "red"), highlight=False)


def _harmless(text: str) -> str:
    """A text whose control characters, except ends of lines and tabs, are shown as numbers."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _facts(record: pb.LogRecord) -> dict[str, Any]:
    facts: dict[str, Any] = {
        name: getattr(record, name)
        for name in ("tenant", "code", "method", "request_id", "trace_id", "span_id")
        if getattr(record, name)
    }
    if record.HasField("duration"):
        facts["duration_ms"] = round(record.duration.ToNanoseconds() / 1e6, 3)
    if record.suppressed:
        facts["suppressed"] = record.suppressed
    return {**facts, **dict(record.attributes)}
