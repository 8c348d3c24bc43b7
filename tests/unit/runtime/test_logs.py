"""What is in the logs, and what never is."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest

_FAILING = """
import structlog
from agent360.mesh.runtime.logs import configure_logging
from agent360.mesh.runtime.settings import LogSettings, RedactionSettings

configure_logging(LogSettings(format={format!r}), RedactionSettings(), "cache")

def serve():
    authorization = "Bearer " + "-".join(("a", "key"))
    raise RuntimeError("a bug")

try:
    serve()
except RuntimeError:
    structlog.get_logger().exception("it failed")
    import logging
    logging.getLogger("another").exception("it failed too")
"""


@pytest.mark.parametrize("format_", ["console", "json"])
def test_errors_are_logged_with_their_trace_and_without_the_values_of_variables(
    format_: Literal["console", "json"],
) -> None:
    code = _FAILING.format(format=format_)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr.count("a bug") >= 2
    assert "serve" in done.stderr
    assert "a-key" not in done.stderr
