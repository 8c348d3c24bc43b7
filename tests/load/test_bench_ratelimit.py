"""The benchmark runs and writes the figures it promises; no speed is asserted."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-m", "agent360.mesh.cli", "bench"]


def test_bench_ratelimit_writes_every_figure_as_one_flat_object(tmp_path: Path) -> None:
    file = tmp_path / "ratelimit.json"
    run = subprocess.run(
        [*COMMAND, "ratelimit", "--rounds=1", "--seconds=0.05", f"--json={file}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    expected = {"leased_us", "coalesced_256", "many_1000"}
    if shutil.which("redis-server"):
        expected.add("redis_64")
    figures = json.loads(file.read_text())
    assert figures.keys() == expected
    assert all(value > 0 for value in figures.values())
