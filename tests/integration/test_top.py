"""``agent360-mesh top``: what it shows is what happened."""

import asyncio
import io
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest
from rich.console import Console
from support.polling import eventually_async

from agent360.client import Mesh
from agent360.mesh.cli.top.board import AlertRow, Board, ModelRow, ServiceRow, TenantRow
from agent360.mesh.cli.top.reading import BoardReader
from agent360.mesh.cli.top.tables import summary, tables
from agent360.mesh.inprocess import embedded

CALLS = 40


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with embedded(tenant="acme") as connected:
        yield connected


async def test_a_board_shows_the_calls_hits_and_tokens_of_all_tenants(mesh: Mesh) -> None:
    for number in range(CALLS):
        await mesh.cache.set(f"k{number}", b"v")
        await mesh.cache.get(f"k{number}")
        await mesh.cache.get(f"k{number}", tenant="globex")
    mesh.metrics.count(
        "inference_tokens_total", 600, {"model": "small", "direction": "output"}, "acme"
    )
    mesh.metrics.count("inference_answers_total", 6, {"model": "small", "source": "model"}, "acme")
    mesh.metrics.count("inference_answers_total", 2, {"model": "small", "source": "cache"}, "acme")
    await mesh.metrics.flush()
    reader = BoardReader(mesh, window_s=60, wall=lambda: time.time() + 10)
    board = await reader.read()

    async def complete() -> bool:
        nonlocal board
        board = await reader.read()
        rows = {row.tenant: row for row in board.tenants}
        return {"acme", "globex"} <= rows.keys() and rows["acme"].per_s * 60 >= 2 * CALLS

    await eventually_async(complete, timeout_s=20)
    assert board.missing == ()
    (cache,) = (row for row in board.services if row.service == "cache")
    assert cache.per_s * 60 >= 3 * CALLS
    assert cache.p50_s is not None
    assert cache.p99_s is not None
    assert 0 < cache.p50_s <= cache.p99_s
    assert board.cache_hits == pytest.approx(0.5)
    (small,) = board.models
    assert small.tokens_out_per_s == pytest.approx(10)
    assert small.kept == pytest.approx(0.25)


async def test_one_tenants_board_has_nothing_of_another(mesh: Mesh) -> None:
    mesh.metrics.count("mesh_requests", 7, {"service": "cache", "code": "OK"}, "acme")
    mesh.metrics.count("mesh_requests", 500, {"service": "cache", "code": "OK"}, "globex")
    await mesh.metrics.flush()
    reader = BoardReader(mesh, window_s=60, tenant="acme", wall=lambda: time.time() + 10)
    board = await reader.read()
    (row,) = board.tenants
    assert row.tenant == "acme"
    assert row.per_s * 60 < 500


def test_the_tables_tell_everything_that_is_on_the_board() -> None:
    board = Board(
        services=[ServiceRow("cache", 12.5, 0.02, 0.001, 0.002, None)],
        tenants=[TenantRow("acme", 3.0, 1.0, 2.0, 100.0, 0.5)],
        models=[ModelRow("small", 1.0, 0.25, 10.0, 20.0, 4.0, 1.5)],
        cache_hits=0.75,
        alerts=[AlertRow("burn", {"service": "cache"}, "firing", 14.5, "errors burn")],
        missing=("alerts: AWAY: not there",),
    )
    shown = Console(file=io.StringIO(), width=160)
    shown.print(summary(board), *tables(board))
    text = shown.file.getvalue()
    for expected in (
        "75.0%", "firing 1", "AWAY", "12.5", "2.00%", "1.00", "acme", "small", "25.0%", "4.0",
        "burn", "service=cache", "errors burn",
    ):  # fmt: skip
        assert expected in text


async def test_the_live_screen_shows_a_board_and_pauses(mesh: Mesh) -> None:
    pytest.importorskip("textual", reason="textual is not installed")
    from agent360.mesh.cli.top.screen import TopApp

    mesh.metrics.count("mesh_requests", 600, {"service": "cache", "code": "OK"}, "acme")
    await mesh.metrics.flush()
    app = TopApp(BoardReader(mesh, window_s=60, wall=lambda: time.time() + 10), every_s=0.1)
    async with app.run_test(size=(140, 50)) as pilot:

        async def shown() -> bool:
            await pilot.pause()
            texts = [str(line.text) for line in app.screen._compositor.render_strips()]
            return any("acme" in text for text in texts)

        await eventually_async(shown, timeout_s=20)
        await pilot.press("p")
        assert app.sub_title == "paused"
        await pilot.press("q")


async def test_once_prints_a_look_and_says_what_could_not_be_asked_for(mesh: Mesh) -> None:
    mesh.metrics.count("mesh_requests", 600, {"service": "cache", "code": "OK"}, "acme")
    await mesh.metrics.flush()
    for address, code, expected in (
        (mesh_address(mesh), 0, "services"),
        ("127.0.0.1:1", 1, "not known"),
    ):
        run = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "agent360.mesh.cli", "top", "--once"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "AGENT360_METRICS_ADDRESS": address},
        )
        assert run.returncode == code, run.stdout + run.stderr
        assert expected in run.stdout


def mesh_address(mesh: Mesh) -> str:
    """Where the mesh's metrics service is."""
    return mesh._coalescers[3]._addresses[0]
