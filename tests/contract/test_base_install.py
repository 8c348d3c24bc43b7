"""The client installs and works without anything that only servers need."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVER_ONLY = ("aiohttp", "pydantic", "structlog", "prometheus_client", "theine", "typer")


def test_the_base_install_imports_the_client_without_server_dependencies(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    python = venv / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=120)
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", str(ROOT)], check=True, timeout=300
    )
    program = (
        "import importlib.util, agent360.client as client; "
        f"print([name for name in {SERVER_ONLY!r} if importlib.util.find_spec(name)]); "
        "print(client.Mesh.__name__)"
    )
    run = subprocess.run(
        [str(python), "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["[]", "Mesh"]
