"""The demo, as a user runs it."""

import json
import re
import socket
import subprocess
import sys
import time
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
    assert "http://127.0.0.1:9/v1 cannot be reached" in run.stdout


def test_what_the_demo_started_ends_with_it_however_it_ends(tmp_path: Path) -> None:
    file = requests(tmp_path / "requests.jsonl", 4)
    with subprocess.Popen(
        [*COMMAND, f"--requests={file}", "--hold"], stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        shown = []
        while "Ctrl-C stops the mesh" not in (line := demo.stdout.readline()):
            assert line, shown
            shown.append(line)
        addresses = re.findall(r"grpcurl -plaintext 127\.0\.0\.1:(\d+)", "".join(shown))
        assert len(addresses) == 4
        assert all(is_open(int(port)) for port in addresses)
        demo.kill()
    end = time.monotonic() + 15
    while any(is_open(int(port)) for port in addresses):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
