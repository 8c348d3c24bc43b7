"""The benchmark runs and writes the figures it promises; no speed is asserted."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-m", "agent360.mesh.cli", "bench"]
ROOT = Path(__file__).resolve().parents[2]
EXPECTED = {"leased_us", "coalesced_256", "many_1000"}
OF_GUBERNATOR = {"gubernator_per_s", "gubernator_ratio", "gubernator_cpu_ratio"}


def test_bench_ratelimit_writes_every_figure_as_one_flat_object(tmp_path: Path) -> None:
    expected = set(EXPECTED)
    if shutil.which("redis-server"):
        expected.add("redis_64")
    if shutil.which("gubernator") or shutil.which("gubernator", path=ROOT / ".cache/bin"):
        expected |= OF_GUBERNATOR
    figures, output = bench(tmp_path / "ratelimit.json", ROOT, os.environ["PATH"])
    assert figures.keys() == expected
    assert all(value > 0 for value in figures.values())
    assert ("nothing about Gubernator" in output) == figures.keys().isdisjoint(OF_GUBERNATOR)


def test_bench_ratelimit_says_which_programs_are_not_there_to_compare_with(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    figures, output = bench(tmp_path / "ratelimit.json", tmp_path, str(tmp_path / "empty"))
    assert figures.keys() == EXPECTED
    assert "nothing about Gubernator" in output
    assert "nothing about Redis" in output


def bench(file: Path, directory: Path, path: str) -> tuple[dict[str, float], str]:
    run = subprocess.run(
        [*COMMAND, "ratelimit", "--rounds=1", "--seconds=0.05", f"--json={file}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=directory,
        env={**os.environ, "PATH": path},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(file.read_text()), run.stdout
