"""The benchmark runs and writes the figures it promises; no speed is asserted."""

import json
import subprocess
import sys
from pathlib import Path

EXPECTED = {
    "report_per_s",
    "report_ratio",
    "mean_p99_ms",
    "quantile_p99_ms",
    "series_bytes",
    "caller_us",
}


def test_bench_metrics_writes_every_figure_as_one_flat_object(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "agent360.mesh.cli", "bench", "metrics"),
            *("--rounds=1", "--seconds=0.05", f"--json={file}"),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(file.read_text())
    assert figures.keys() == EXPECTED
    assert all(value > 0 for value in figures.values())
