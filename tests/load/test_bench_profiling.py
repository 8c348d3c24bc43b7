"""The benchmark runs and writes the figures it promises; no speed is asserted."""

import json
import subprocess
import sys
from pathlib import Path


def test_bench_profiling_writes_every_figure_as_one_flat_object(tmp_path: Path) -> None:
    file = tmp_path / "profiling.json"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "agent360.mesh.cli", "bench", "profiling"),
            *("--rounds=1", "--seconds=0.1", f"--json={file}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(file.read_text())
    assert figures.keys() == {"cpu_speed", "memory_speed", "io_speed"}
    assert all(value > 0 for value in figures.values())
