"""agent360-mesh audit and agent360-mesh logs, against a running service."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.polling import eventually
from support.servers import running
from typer.testing import CliRunner, Result

from agent360.client import AuditEvent, Mesh
from agent360.logs.v1 import logs_pb2 as pb
from agent360.mesh.cli.app import app
from agent360.mesh.cli.logs import Wanted, read_duration, records


class Service:
    """A metrics service, its file, and the command line to it."""

    def __init__(self, address: str, path: Path, mesh: Mesh) -> None:
        self.path = path
        self.mesh = mesh
        self._env = {"AGENT360_METRICS_ADDRESS": address, "COLUMNS": "400"}

    async def run(self, *arguments: str) -> Result:
        """Runs a command."""
        return await asyncio.to_thread(CliRunner(env=self._env).invoke, app, arguments)

    def forge(self, statement: str) -> None:
        """Changes the file behind the service's back."""
        with sqlite3.connect(self.path) as db:
            assert db.execute(statement).rowcount > 0


@asynccontextmanager
async def service(directory: Path) -> AsyncIterator[Service]:
    """A service with three events of each of two tenants."""
    path = directory / "m.db"
    async with (
        running("metrics", store=f"sqlite:///{path}") as server,
        Mesh.connect(metrics=server.address, tenant="acme", api_key="") as mesh,
    ):
        for tenant in ("acme", "globex"):
            for number in range(3):
                event = AuditEvent("plans.approve", f"plans/{number}", actor="ana")
                await mesh.audit.record(event, tenant=tenant)
        yield Service(server.address, path, mesh)


async def test_verify_says_that_all_is_well_or_where_it_is_not(tmp_path: Path) -> None:
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    async with service(tmp_path) as here:
        result = await here.run("audit", "verify")
        assert result.exit_code == 0
        assert result.output == "6 events in 2 chains are as they were recorded\n"
        here.forge("UPDATE audit_events SET actor = 'eve' WHERE tenant = 'globex' AND sequence = 2")
        result = await here.run("audit", "verify")
        assert result.exit_code == 1
        told, summary = result.output.splitlines()
        assert told.startswith(f"globex {today} (recorded by ")
        assert "sequence 2, event " in told
        assert told.endswith(": changed: event 2 is not what was recorded")
        assert summary.startswith("1 of 2 chains are broken; 4 events in 2 chains are as")
        assert (await here.run("audit", "verify", "--tenant", "acme")).exit_code == 0
        assert (await here.run("audit", "verify", "--tenant", "globex")).exit_code == 1
        earlier = await here.run("audit", "verify", "--to", "2020-01-01")
        assert earlier.exit_code == 0
        assert earlier.output.startswith("0 events in 0 chains")
        assert (await here.run("audit", "verify", "--from", today, "--to", today)).exit_code == 1


async def test_heads_that_were_kept_elsewhere_show_that_the_end_is_gone(tmp_path: Path) -> None:
    heads = tmp_path / "heads.jsonl"
    async with service(tmp_path) as here:
        assert (await here.run("audit", "verify", "--heads", str(heads))).exit_code == 0
        assert [json.loads(line)["tenant"] for line in heads.read_text().splitlines()] == [
            "acme",
            "globex",
        ]
        with sqlite3.connect(here.path) as db:
            db.execute("DELETE FROM audit_events WHERE tenant = 'acme' AND sequence = 3")
            db.execute(
                "UPDATE audit_heads SET sequence = 2, hash = (SELECT hash FROM audit_events "
                "WHERE tenant = 'acme' AND sequence = 2) WHERE tenant = 'acme'"
            )
        assert (await here.run("audit", "verify")).exit_code == 0
        result = await here.run("audit", "verify", "--anchors", str(heads))
        assert result.exit_code == 1
        assert "removed: the events from 3 to 3 are missing" in result.output
        heads.write_text("{}\nno json\n")
        assert (await here.run("audit", "verify", "--anchors", str(heads))).exit_code == 2


async def test_export_writes_every_event_as_a_line_of_json(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    async with service(tmp_path) as here:
        result = await here.run("audit", "export", "-o", str(file))
        assert result.exit_code == 0
        events = [json.loads(line) for line in file.read_text().splitlines()]
        assert [event["tenant"] for event in events] == ["acme"] * 3 + ["globex"] * 3
        assert [event["resource"] for event in events[:3]] == ["plans/2", "plans/1", "plans/0"]
        assert events[0]["place"]["previous_hash"] == events[1]["place"]["hash"]
        assert events[0]["outcome"] == "EVENT_OUTCOME_SUCCEEDED"
        part = await here.run(
            "audit", "export", "-o", "-", "--tenant", "acme", "--resource", "plans/1"
        )
        assert [json.loads(line)["resource"] for line in part.stdout.splitlines()] == ["plans/1"]
        before = await here.run("audit", "export", "-o", str(file), "--to", "2020-01-01")
        assert before.exit_code == 0
        assert file.read_text() == ""


def line(text: str, service_: str = "cache", level: int = 30, age_s: float = 0.0) -> pb.LogRecord:
    record = pb.LogRecord(
        level=level,  # type: ignore[arg-type]
        service=service_,
        message=text,
        code="UNAVAILABLE",
        attributes={"peer": "here"},
    )
    record.record_time.FromDatetime(datetime.now(UTC) - timedelta(seconds=age_s))
    return record


async def test_logs_prints_what_was_asked_for_the_oldest_first(tmp_path: Path) -> None:
    async with service(tmp_path) as here:
        await here.mesh.logs.write(
            [
                line("newest", age_s=1),
                line("older", age_s=100),
                line("an info", level=20, age_s=2),
                line("of another", "inference", 40, age_s=3),
                line("long ago", age_s=7_200),
            ]
        )
        result = await here.run("logs", "--service", "cache", "--level", "warning")
        assert result.exit_code == 0
        first, second = result.output.splitlines()
        assert "warning  cache     older tenant=acme code=UNAVAILABLE peer=here" in first
        assert "newest" in second
        result = await here.run("logs", "--since", "1d", "--json", "--limit", "2")
        shown = [json.loads(each)["message"] for each in result.output.splitlines()]
        assert shown == ["an info", "newest"]
        result = await here.run("logs", "--tenant", "globex")
        assert (result.exit_code, result.output) == (0, "")
        assert (await here.run("logs", "--since", "soon")).exit_code == 2


async def test_following_shows_each_record_once_also_one_that_comes_late(tmp_path: Path) -> None:
    shown: list[str] = []

    async def follow(mesh: Mesh) -> None:
        wanted = Wanted(timedelta(hours=1), service="cache", limit=3)
        async for record in records(mesh, wanted, follow=True):
            shown.append(record.message)
            if record.message == "late":
                return

    async with service(tmp_path) as here, asyncio.timeout(30):
        await here.mesh.logs.write([line(f"{n}", age_s=10 - n) for n in range(5)])
        following = asyncio.create_task(follow(here.mesh))
        await eventually(lambda: len(shown) == 3)
        await here.mesh.logs.write([line("new")])
        await eventually(lambda: len(shown) == 4)
        await here.mesh.logs.write([line("late", age_s=5)])
        await following
    assert shown == ["2", "3", "4", "new", "late"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("1.5h", 5_400), ("2d", 172_800)]
)
def test_durations_have_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert read_duration(text).total_seconds() == seconds
    with pytest.raises(ValueError, match="not a duration"):
        read_duration(text[:-1])
