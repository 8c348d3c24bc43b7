"""The images and the compose file: built, run, asked, stopped."""

import asyncio
import json
import re
import shutil
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from support.containers import COMPOSE, PYTHON_IMAGE, ROOT, Podman

from agent360.client import Mesh
from agent360.mesh.free_ports import free_ports
from agent360.mesh.services import NAMES, service_kind

GRACE_S = 10.0
"""How long calls may go on after SIGTERM, by default."""
GRPCURL = shutil.which("grpcurl") or shutil.which("grpcurl", path=ROOT / ".cache/bin")
REDIS_IMAGE = "docker.io/library/redis:7-bookworm"
ASKED = {
    "inference": ("agent360.inference.v1.InferenceService/ListModels", "{}", "models|{}"),
    "cache": (
        "agent360.cache.v1.CacheService/Set",
        '{"entry": {"namespace": "default", "key": "k", "value": "dg=="}}',
        '"stored": true',
    ),
    "ratelimit": (
        "agent360.ratelimit.v1.RateLimitService/Check",
        '{"name": "calls"}',
        '"allowed": true',
    ),
    "metrics": ("agent360.metrics.v1.MetricsService/ListSeries", "{}", "{"),
}


@pytest.fixture(scope="module")
def podman() -> Podman:
    """Podman, with the four images built."""
    podman = Podman()
    podman.have_image(PYTHON_IMAGE, "python3", "python3-venv")
    podman.skip_unless_allowed()
    podman.run("scripts/containers.sh", timeout_s=900)
    return podman


def ask(podman: Podman, port: str, method: str, request: str) -> str:
    if GRPCURL is None:
        pytest.skip("grpcurl is not installed")
    headers = ("-H", "x-agent360-tenant: acme", "-d", request)
    done = podman.run(GRPCURL, "-plaintext", *headers, f"127.0.0.1:{port}", method)
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_an_image_serves_is_healthy_runs_as_nobody_in_particular_and_stops_in_its_grace(
    podman: Podman, name: str
) -> None:
    port = service_kind(name).settings.default_port
    container = podman.run(
        *("podman", "run", "--detach", "--publish", f"127.0.0.1::{port}", "--read-only"),
        *("--cap-drop", "all", "--env", "AGENT360_COMMON__INSECURE=true"),
        *("--env", "AGENT360_INFERENCE__BACKENDS=[]"),
        f"agent360-mesh/{name}",
    ).stdout.strip()
    try:
        podman.eventually_healthy(container)
        published = podman.run("podman", "port", container).stdout.strip().rpartition(":")[2]
        method, request, expected = ASKED[name]
        assert re.search(expected, ask(podman, published, method, request))
        assert podman.run("podman", "exec", container, "id", "-u").stdout.strip() == "10001"
        started = time.monotonic()
        podman.run("podman", "stop", "--time", "30", container)
        assert time.monotonic() - started < GRACE_S
        state = json.loads(podman.run("podman", "inspect", container).stdout)[0]["State"]
        assert state["ExitCode"] == 0
        logs = podman.run("podman", "logs", container)
        events = [json.loads(line)["event"] for line in (logs.stdout + logs.stderr).splitlines()]
        assert events[0] == "serving"
        assert events[-2:] == ["stopping", "stopped"]
    finally:
        podman.run("podman", "rm", "--force", "--volumes", container)


def test_an_image_refuses_to_serve_unprotected_unless_told_to(podman: Podman) -> None:
    done = podman.run("podman", "run", "--rm", "agent360-mesh/cache", check=False)
    assert done.returncode == 2
    assert "tls.certificate" in done.stderr
    assert "authentication.keys" in done.stderr


def test_nothing_of_the_build_machine_is_in_an_image(podman: Podman) -> None:
    inspected = podman.run("podman", "inspect", "agent360-mesh/cache").stdout
    config = json.dumps(json.loads(inspected)[0]["Config"])
    history = podman.run("podman", "history", "--no-trunc", "agent360-mesh/cache").stdout
    for text in (config, history):
        assert str(ROOT) not in text
        assert "PIP_" not in text


@pytest.fixture
def composed(podman: Podman) -> Iterator[dict[str, str]]:
    """The addresses of the services that the compose file has started."""
    podman.have_image(REDIS_IMAGE, "redis-server")
    ports = [str(port) for port in free_ports(2 * len(NAMES))]
    environment = {}
    for name, port, http_port in zip(NAMES, ports[::2], ports[1::2], strict=True):
        environment[f"{name.upper()}_PORT"] = port
        environment[f"{name.upper()}_HTTP_PORT"] = http_port
    try:
        podman.run(*COMPOSE, "up", "--detach", **environment)
        yield {name: f"127.0.0.1:{port}" for name, port in zip(NAMES, ports[::2], strict=True)}
    finally:
        podman.run(*COMPOSE, "down", "--volumes", **environment)


@pytest.fixture
async def mesh(composed: dict[str, str]) -> AsyncIterator[Mesh]:
    """A client of the composed services."""
    async with Mesh.connect(**composed, tenant="acme", api_key="") as mesh:
        yield mesh


async def test_the_composed_services_know_each_other_and_share_entries_in_redis(
    podman: Podman, mesh: Mesh
) -> None:
    for name in NAMES:
        podman.eventually_healthy(f"agent360-mesh_{name}_1")
    assert (await mesh.cache.set("k", b"v", timeout=20)).shared
    assert (await mesh.cache.get("k")).value == b"v"
    assert (await mesh.ratelimit.check("calls")).allowed

    scan = ("redis-cli", "--scan", "--pattern", "agent360:cache:{acme:default:*}:e:k:v*")
    assert podman.run("podman", "exec", "agent360-mesh_redis_1", *scan).stdout.strip()
    reporting: set[str] = set()
    async with asyncio.timeout(30):
        while not {"cache", "ratelimit"} <= reporting:
            async for series in mesh.metrics.list_series("mesh_requests"):
                reporting.add(series.labels["service"])
            await asyncio.sleep(0.1)
