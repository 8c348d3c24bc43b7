"""The README's examples work as pasted."""

import asyncio
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent360.mesh.cli.supervisor import Supervisor
from agent360.mesh.free_ports import free_ports
from agent360.mesh.services import NAMES, service_kind

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GRPCURL = shutil.which("grpcurl") or shutil.which("grpcurl", path=ROOT / ".cache/bin")
EXAMPLES = re.findall(r"```grpcurl\n(.+?)\n```", README, re.DOTALL)
EXPECTED = ("SERVING", "stored", "OUTCOME_HIT", "allowed", "must not be empty", "event_id")

pytestmark = pytest.mark.skipif(GRPCURL is None, reason="grpcurl is not installed")


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A running mesh; its ports by the default ones."""
    directory = tmp_path_factory.mktemp("mesh")
    chosen = dict(zip(NAMES, free_ports(len(NAMES)), strict=True))
    arguments: dict[str, list[str]] = {name: [] for name in NAMES if name != "inference"}
    arguments["metrics"] = [f"--set=store=sqlite:///{directory}/metrics.db"]
    with asyncio.Runner() as runner:
        mesh = Supervisor(arguments, chosen, log_file=directory / "log")
        runner.run(mesh.__aenter__())
        yield {
            str(service_kind(name).settings.default_port): str(port)
            for name, port in chosen.items()
        }
        runner.run(mesh.stop())


def test_every_example_says_what_it_is_expected_to(ports: dict[str, str]) -> None:
    assert len(EXAMPLES) == len(EXPECTED)
    for example, expected in zip(EXAMPLES, EXPECTED, strict=True):
        text = re.sub(r"127\.0\.0\.1:(\d+)", lambda m: f"127.0.0.1:{ports[m[1]]}", example)
        run = subprocess.run(
            [str(GRPCURL), *shlex.split(text)[1:]],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert run.returncode == 0, (example, run.stderr)
        assert expected in run.stdout


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, "b'pack, drive, unload' True\n"), (1, "0 b'pack, drive, unload'\n1 b'unpack'\n")],
)
def test_a_client_example_runs_as_pasted(
    ports: dict[str, str], tmp_path: Path, number: int, expected: str
) -> None:
    example = re.findall(r"```python\n(.+?)\n```", README, re.DOTALL)[number]
    script = tmp_path / "example.py"
    script.write_text(example)
    run = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={
            "AGENT360_CACHE_ADDRESS": f"127.0.0.1:{ports['7361']}",
            "AGENT360_RATELIMIT_ADDRESS": f"127.0.0.1:{ports['7362']}",
        },
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == expected
