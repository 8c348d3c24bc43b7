"""The benchmark runs and writes the figures it promises; no speed is asserted."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = {"added_p50_ms", "cached_coalesced_256", "relay_cpu"}
OF_LITELLM = {"litellm_grpc", "litellm_http"}


def test_bench_inference_writes_every_figure_as_one_flat_object(tmp_path: Path) -> None:
    expected = set(EXPECTED)
    if find_spec("xllamacpp"):
        expected.add("local_8")
    if shutil.which("litellm") or shutil.which("litellm", path=ROOT / ".cache/litellm/bin"):
        expected |= OF_LITELLM
    file = tmp_path / "inference.json"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "agent360.mesh.cli", "bench", "inference"),
            *("--rounds=1", "--seconds=0.05", f"--json={file}"),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(file.read_text())
    assert figures.keys() == expected
    assert all(value > 0 for name, value in figures.items() if name != "added_p50_ms")
    assert ("nothing about LiteLLM" in run.stdout) == figures.keys().isdisjoint(OF_LITELLM)
