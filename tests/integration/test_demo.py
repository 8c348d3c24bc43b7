"""The demo, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-m", "agent360.mesh.cli", "demo"]


def requests(file: Path, count: int) -> Path:
    rows = [
        {
            "tenant": "acme" if number % 2 else "globex",
            "messages": [{"role": "user", "content": f"Say hello {number // 4}."}],
            "max_tokens": 8,
        }
        for number in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_demo_answers_every_request_and_shows_what_was_recorded(tmp_path: Path) -> None:
    file = requests(tmp_path / "requests.jsonl", 20)
    run = subprocess.run(
        [*COMMAND, f"--requests={file}"], capture_output=True, text=True, timeout=90, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "acme 10 of 10, globex 10 of 10" in run.stdout
    assert "grpcurl -plaintext" in run.stdout


def test_the_demo_fails_where_the_model_server_cannot_be_reached(tmp_path: Path) -> None:
    file = requests(tmp_path / "requests.jsonl", 2)
    arguments = [f"--requests={file}", "--upstream=http://127.0.0.1:9/v1", "--model=none"]
    run = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=90, check=False
    )
    assert run.returncode == 1, run.stdout + run.stderr
