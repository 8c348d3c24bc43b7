"""Strict mode: with AGENT360_STRICT=1 a skip that nobody expected fails the run."""

import os

import pytest
from support import skips

_CASSANDRA = "cassandra"
"""Fixtures whose name has it run a Cassandra: tests with them share a process, and the server."""

_unexpected: list[str] = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a file stay together when several processes share the work: so do fixtures."""
    for item in items:
        names: tuple[str, ...] = getattr(item, "fixturenames", ())
        shared = _CASSANDRA if any(_CASSANDRA in name for name in names) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(shared))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in skips.EXPECTED:
            _unexpected.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if os.environ.get("AGENT360_STRICT") == "1" and _unexpected and exitstatus == 0:
        print("\nunexpected skips:", *_unexpected, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
