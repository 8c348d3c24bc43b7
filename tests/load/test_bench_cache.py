"""The cache's benchmark writes the figures it promises; hit rates are promises themselves."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent360.mesh.bench.hit_rates import KEYS, OPERATIONS, TRACES, ours, scan, shift, zipf

COMMAND = [sys.executable, "-m", "agent360.mesh.cli", "bench", "cache"]
SPEEDS = {"near_hit_us", "coalesced_256", "many_1000"}
HIT_RATES = {"zipf": 0.58, "scan": 0.35, "shift": 0.56}
"""What the cache promises on each trace."""


def run_bench(file: Path, **environment: str) -> str:
    """Takes every figure for a moment; returns what was printed."""
    run = subprocess.run(
        [*COMMAND, "--rounds=1", "--seconds=0.05", "--operations=5000", f"--json={file}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment or None,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs a redis-server")
def test_bench_cache_writes_every_figure_as_one_flat_object(tmp_path: Path) -> None:
    printed = run_bench(tmp_path / "cache.json")
    assert "our get, in Redis" in printed
    assert "theine" in printed
    figures = json.loads((tmp_path / "cache.json").read_text())
    assert figures.keys() == SPEEDS | {"l2_64"} | HIT_RATES.keys()
    assert all(isinstance(value, float) and value > 0 for value in figures.values())


def test_bench_cache_without_a_redis_leaves_its_figure_out_and_says_so(tmp_path: Path) -> None:
    printed = run_bench(tmp_path / "cache.json", PATH=str(tmp_path))
    assert "Redis is left out" in printed
    figures = json.loads((tmp_path / "cache.json").read_text())
    assert figures.keys() == SPEEDS | HIT_RATES.keys()


@pytest.mark.parametrize(("trace", "promised"), HIT_RATES.items())
def test_the_hit_rate_of_a_trace_is_what_is_promised(trace: str, promised: float) -> None:
    assert ours(TRACES[trace](OPERATIONS)) >= promised


def test_a_third_of_a_scan_is_asked_for_only_once() -> None:
    trace = scan(60_000)
    once = [key for key in trace if key.startswith("scan-")]
    assert len(once) == len(set(once)) == 20_000


def test_traces_are_the_same_every_time_and_as_long_as_they_should_be() -> None:
    for make in (zipf, scan, shift):
        trace = make(10_000)
        assert len(trace) == 10_000
        assert trace == make(10_000)
        assert len(set(trace)) < KEYS
