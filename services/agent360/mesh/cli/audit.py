"""The commands on audit events: verify them, export them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import IO, Annotated, Any, Final

import typer
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from rich.console import Console

from agent360.audit.v1 import audit_pb2 as pb
from agent360.client import Mesh, MeshError, Tls

audit = typer.Typer(help="Audit events: who did what to which resource.", no_args_is_help=True)

_EVERYONE: Final = "*"
_BROKEN: Final = 1
_NOT_DONE: Final = 2

Tenant = Annotated[
    str, typer.Option(help="Whose events; empty: those of all tenants, which is for admins.")
]
FirstDay = Annotated[
    datetime | None, typer.Option("--from", formats=["%Y-%m-%d"], help="The first UTC day.")
]
LastDay = Annotated[
    datetime | None, typer.Option("--to", formats=["%Y-%m-%d"], help="The last UTC day.")
]
Authority = Annotated[
    Path | None, typer.Option(envvar="AGENT360_CA", help="PEM file to trust; TLS is used.")
]


@audit.command()
def verify(
    tenant: Tenant = "",
    first: FirstDay = None,
    last: LastDay = None,
    anchors: Annotated[
        Path | None,
        typer.Option(help="File of --heads: the events must still lead through these."),
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option(help="File to write with the last hash of each day, to be kept elsewhere."),
    ] = None,
    ca: Authority = None,
) -> None:
    """Check that no event was removed, changed or inserted; exit code 1 if one was."""
    raise typer.Exit(_run(_verify(tenant, first, last, anchors, heads, ca)))


@audit.command()
def export(
    output: Annotated[
        typer.FileTextWrite,
        typer.Option("--output", "-o", encoding="utf-8", lazy=False, help="File; -: stdout."),
    ],
    tenant: Tenant = "",
    first: FirstDay = None,
    last: LastDay = None,
    actor: Annotated[str, typer.Option(help="Only by this one.")] = "",
    action: Annotated[str, typer.Option(help="Only this.")] = "",
    resource: Annotated[str, typer.Option(help="Only to this.")] = "",
    ca: Authority = None,
) -> None:
    """Write events as JSON lines, each with its place and hash; the newest first."""
    wanted = {
        "start": _midnight(first),
        "end": _midnight(last + timedelta(days=1)) if last else None,
        "actor": actor,
        "action": action,
        "resource": resource,
    }
    raise typer.Exit(_run(_export(output, tenant, wanted, ca)))


def _run(work: Coroutine[Any, Any, int]) -> int:
    try:
        return asyncio.run(work)
    except (MeshError, OSError, ValueError) as error:
        Console(stderr=True).print(f"[red]{error}[/red]", highlight=False)
        return _NOT_DONE


async def _verify(
    tenant: str,
    first: datetime | None,
    last: datetime | None,
    anchors: Path | None,
    heads: Path | None,
    ca: Path | None,
) -> int:
    known = await asyncio.to_thread(_read_heads, anchors) if anchors else []
    found: list[pb.ChainHead] = []
    broken = 0
    async with _connected(ca) as mesh:
        async for checked in mesh.audit.verify(
            first_day=first.date() if first else None,
            last_day=last.date() if last else None,
            anchors=known,
            tenant=tenant or _EVERYONE,
        ):
            found.append(checked.head)
            if checked.fault:
                broken += 1
                typer.echo(_told(checked))
    if heads is not None:
        await asyncio.to_thread(_write_heads, heads, found)
    events = sum(head.sequence for head in found)
    good = f"{events:,} events in {len(found):,} chains are as they were recorded"
    typer.echo(f"{broken:,} of {len(found):,} chains are broken; {good}" if broken else good)
    return _BROKEN if broken else 0


def _told(checked: pb.VerifyEventsResponse) -> str:
    fault = pb.ChainFault.Name(checked.fault).removeprefix("CHAIN_FAULT_").lower()
    head = checked.head
    event = f", event {checked.event_id}" if checked.event_id else ""
    return (
        f"{head.tenant} {head.day} (recorded by {head.writer}), sequence {checked.sequence:,}"
        f"{event}: {fault}: {checked.description}"
    )


def _read_heads(path: Path) -> list[pb.ChainHead]:
    """Heads from a file of JSON lines.

    Raises:
        ValueError: the file has something else.
        OSError: it cannot be read.
    """
    heads = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            heads.append(ParseDict(json.loads(line), pb.ChainHead()))
        except (ValueError, ParseError) as error:
            raise ValueError(f"{path}, line {number}: is no head of a chain: {error}") from error
    return heads


def _write_heads(path: Path, heads: list[pb.ChainHead]) -> None:
    path.write_text("".join(f"{_line(head)}\n" for head in heads if head.sequence))


async def _export(output: IO[str], tenant: str, wanted: dict[str, Any], ca: Path | None) -> int:
    count = 0
    async with _connected(ca) as mesh:
        for each in [tenant] if tenant else await _tenants(mesh):
            async for event in mesh.audit.list_events(page_size=1_000, tenant=each, **wanted):
                output.write(f"{_line(event)}\n")
                count += 1
    Console(stderr=True).print(f"{count:,} events", highlight=False)
    return 0


async def _tenants(mesh: Mesh) -> list[str]:
    """All that have events."""
    found = {each.head.tenant async for each in mesh.audit.verify(tenant=_EVERYONE)}
    return sorted(found)


def _line(message: Any) -> str:
    return json.dumps(MessageToDict(message, preserving_proto_field_name=True), sort_keys=True)


def _midnight(day: date | None) -> datetime | None:
    return datetime.combine(day, time(), UTC) if day else None


@asynccontextmanager
async def _connected(ca: Path | None) -> AsyncIterator[Mesh]:
    async with Mesh.connect(tls=Tls(ca=ca) if ca else None) as mesh:
        yield mesh
