"""Strict mode: with AGENT360_STRICT=1 a skip that nobody expected fails the run."""

import os

import pytest
from support import skips

_unexpected: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in skips.EXPECTED:
            _unexpected.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if os.environ.get("AGENT360_STRICT") == "1" and _unexpected and exitstatus == 0:
        print("\nunexpected skips:", *_unexpected, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
