"""The benchmarks run and write the figures they promise; no speed is asserted."""

import json
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-m", "agent360.mesh.cli", "bench"]
NAMES = {
    f"{subject}_{kind}"
    for subject in ("ratelimit_check", "cache_get")
    for kind in (
        "unary",
        "coalesced_1",
        "coalesced_64",
        "coalesced_256",
        "coalesced_1024",
        "many_1000",
    )
}


def test_bench_calls_writes_every_ratio_as_one_flat_object(tmp_path: Path) -> None:
    file = tmp_path / "calls.json"
    run = subprocess.run(
        [*COMMAND, "calls", "--rounds=1", "--seconds=0.05", f"--json={file}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "ratelimit Check" in run.stdout
    assert "cache Get" in run.stdout
    figures = json.loads(file.read_text())
    assert figures.keys() == NAMES
    assert all(isinstance(value, float) and value > 0 for value in figures.values())


def test_bench_compare_prints_the_ratio_of_every_figure(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text('{"cache_get_unary": 0.5, "gone": 1}')
    new.write_text('{"cache_get_unary": 0.75}')
    run = subprocess.run(
        [*COMMAND, "compare", str(old), str(new)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "1.50" in run.stdout
    assert "gone" in run.stdout


def test_bench_compare_says_which_file_is_not_a_result_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("[1, 2]")
    run = subprocess.run(
        [*COMMAND, "compare", str(broken), str(broken)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 2
    assert "broken.json is not a flat object of numbers" in run.stderr
