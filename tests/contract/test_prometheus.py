"""What Prometheus makes of /metrics and of the shipped rules: the real one, and promtool."""

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.polling import eventually_async
from support.whole_mesh import use_everything, whole_mesh

from agent360.mesh.free_ports import free_ports

SHIPPED = Path(__file__).parents[2] / "deploy/observability"
CASES = Path(__file__).with_name("prometheus_alerts.yml")
DEFAULT_PORTS = {"inference": 8360, "cache": 8361, "ratelimit": 8362, "metrics": 8363}

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="prometheus and promtool are not at hand",
)


def promtool(*arguments: str, given: str = "") -> str:
    """What it complains about; empty if nothing."""
    done = subprocess.run(
        ["promtool", *arguments], input=given, capture_output=True, text=True, check=False
    )
    return f"{done.stdout}{done.stderr}" if done.returncode else ""


def recorded() -> set[str]:
    """The names that the shipped rules record."""
    text = (SHIPPED / "rules/recording.yml").read_text()
    return set(re.findall(r"record: (\S+)", text))


async def page(port: int) -> str:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/metrics") as response,
    ):
        return await response.text()


@asynccontextmanager
async def prometheus(directory: Path, ports: Mapping[str, int]) -> AsyncIterator[str]:
    """A Prometheus with the shipped configuration, at other ports and a faster pace."""
    (port,) = free_ports(1)
    config = (SHIPPED / "prometheus.yml").read_text().replace("15s", "1s")
    for name, default in DEFAULT_PORTS.items():
        assert f"127.0.0.1:{default}" in config
        config = config.replace(f"127.0.0.1:{default}", f"127.0.0.1:{ports[name]}")
    (directory / "prometheus.yml").write_text(config)
    shutil.copytree(SHIPPED / "rules", directory / "rules")
    with (directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={directory}/prometheus.yml",
            f"--storage.tsdb.path={directory}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            stderr=log,
            stdout=log,
        )
    try:
        yield f"http://127.0.0.1:{port}/api/v1"
    finally:
        process.terminate()
        await process.wait()


async def asked(session: aiohttp.ClientSession, url: str, **params: str) -> Any:
    """The data of an answer; None while it does not listen yet."""
    try:
        async with session.get(url, params=params) as response:
            return (await response.json())["data"] if response.status == 200 else None
    except aiohttp.ClientConnectionError:
        return None


async def test_promtool_has_no_complaint_about_the_metrics_of_any_service() -> None:
    async with whole_mesh() as (servers, mesh):
        await use_everything(mesh)
        for name, server in servers.items():
            text = await page(server.http_port)
            assert "grpc_server_handled_total{" in text, name
            assert promtool("check", "metrics", given=text) == "", name
    assert promtool("check", "metrics", given="# TYPE x_count counter\nx_count 1\n") != ""


def test_promtool_accepts_what_is_shipped_and_its_cases_hold() -> None:
    rules = sorted(str(path) for path in (SHIPPED / "rules").iterdir())
    assert len(rules) == 2
    assert promtool("check", "rules", "--lint-fatal", *rules) == ""
    assert promtool("check", "config", str(SHIPPED / "prometheus.yml")) == ""
    assert promtool("test", "rules", str(CASES)) == ""


async def test_a_real_prometheus_scrapes_all_services_and_its_rules_find_data(
    tmp_path: Path,
) -> None:
    async with whole_mesh() as (servers, mesh), aiohttp.ClientSession() as session:
        ports = {name: server.http_port for name, server in servers.items()}
        async with prometheus(tmp_path, ports) as url:

            async def are_up() -> bool:
                found = await asked(session, f"{url}/targets")
                health = [each["health"] for each in found["activeTargets"]] if found else []
                return health == ["up"] * 4

            await eventually_async(are_up, 30)

            without_data = recorded()
            assert len(without_data) > 15

            async def all_have_data() -> bool:
                await use_everything(mesh)
                for name in sorted(without_data):
                    # NaN, which is not itself, is what a rate is of before anything happened.
                    query = f"{name} == {name}"
                    found = await asked(session, f"{url}/query", query=query)
                    if found and found["result"]:
                        without_data.discard(name)
                return not without_data

            with contextlib.suppress(TimeoutError):
                await eventually_async(all_have_data, 60)
            assert without_data == set()
            rates: dict[str, float] = {}

            async def all_are_counted() -> bool:
                query = "service:grpc_server_handled:rate5m > 0"
                found = await asked(session, f"{url}/query", query=query)
                for each in found["result"]:
                    rates[each["metric"]["service"]] = float(each["value"][1])
                return rates.keys() == DEFAULT_PORTS.keys()

            await eventually_async(all_are_counted, 30)
            for group in (await asked(session, f"{url}/rules"))["groups"]:
                for rule in group["rules"]:
                    assert rule["health"] == "ok", rule


def test_the_dashboard_asks_for_what_is_recorded_or_exposed() -> None:
    dashboard = json.loads((SHIPPED / "grafana/agent360-mesh.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) > 10
    names = {name for query in queries for name in re.findall(r"\w+:\w+:\w+", query)}
    assert names
    assert names <= recorded()
