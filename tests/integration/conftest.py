"""Stores of the metrics service: the same tests hold for each."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.cassandra_server import CassandraServer
from support.stores import KINDS, opened

from agent360.mesh.metrics.ports import Stores


@pytest.fixture(scope="session")
def cassandra() -> Iterator[Callable[[], CassandraServer]]:
    """Gives the one Cassandra of the tests, which is started when it is first asked for."""
    with ExitStack() as stack:
        started: list[CassandraServer] = []

        def server() -> CassandraServer:
            if not started:
                started.append(stack.enter_context(CassandraServer(forgetful=True)))
            return started[0]

        yield server


@pytest.fixture(params=KINDS)
async def stores(
    request: pytest.FixtureRequest, tmp_path: Path, cassandra: Callable[[], CassandraServer]
) -> AsyncIterator[Stores]:
    """An empty store of each kind."""
    async with opened(request.param, tmp_path, cassandra) as each:
        yield each
