"""Requests to a Cassandra cluster from the event loop.

The driver talks to the nodes on a thread of its own (libev). What blocks in it, which is connecting
and preparing, is done on other threads; requests are handed to it without waiting, and answers come
back to the loop many at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import structlog
from cassandra import ProtocolVersion
from cassandra.auth import PlainTextAuthProvider
from cassandra.cluster import Cluster, ExecutionProfile
from cassandra.io.libevreactor import LibevConnection
from cassandra.policies import (
    DCAwareRoundRobinPolicy,
    ExponentialReconnectionPolicy,
    TokenAwarePolicy,
)
from cassandra.query import (
    BatchStatement,
    BatchType,
    PreparedStatement,
    tuple_factory,
)

from agent360.mesh.metrics.ports import StoreError
from agent360.mesh.metrics.stores.cassandra.counts import Counts, Operation
from agent360.mesh.metrics.stores.cassandra.failures import DRIVER_ERRORS, kind_of, told_plainly
from agent360.mesh.metrics.stores.cassandra.levels import DEFAULT_PROFILE, LEVELS
from agent360.mesh.metrics.stores.cassandra.retries import CountedRetries
from agent360.mesh.metrics.stores.cassandra.settings import CassandraSettings
from agent360.mesh.metrics.stores.cassandra.url import CassandraTarget

T = TypeVar("T")

Row = tuple[Any, ...]

# What goes wrong is told once, by what raises StoreError; the driver would tell it for every try.
logging.getLogger("cassandra").setLevel(logging.CRITICAL)

_AGAIN_S: Final = 1.0
_CONDITIONAL: Final = " IF "
_TABLE: Final = re.compile(
    r"\b(FROM|INTO|UPDATE|TRUNCATE|TABLE|TABLE IF NOT EXISTS) ([a-z]\w*)(?![.\w])"
)


class Statement(NamedTuple):
    """A statement with its values; it is prepared when it is first met."""

    cql: str
    """Tables without a keyspace; values are ``?``."""
    values: Sequence[Any] = ()


class Batch(NamedTuple):
    """Writes that go together."""

    statements: Sequence[Statement]
    one_partition: bool = True
    """True: all to the same partition, applied as one. False: any, made sure of by a log of the
    cluster, which costs more."""


class _Exchange:
    """A request that was handed to the driver."""

    __slots__ = ("answer", "began_s", "connections", "operation", "response", "rows")

    def __init__(
        self, answer: asyncio.Future[list[Row]], operation: Operation, connections: _Connections
    ) -> None:
        self.answer = answer
        self.operation = operation
        self.connections = connections
        self.began_s = time.perf_counter()
        self.rows: list[Row] = []
        self.response: Any = None


class _Connections:
    """One connection to each node."""

    def __init__(self, session: Any, expires_s: float) -> None:
        self.session = session
        self.expires_s = expires_s
        self.idle = asyncio.Event()
        self.idle.set()
        self._users = 0

    def take(self) -> None:
        """Keeps it open until it is given back."""
        self._users += 1
        self.idle.clear()

    def give_back(self) -> None:
        """Ends what ``take`` began."""
        self._users -= 1
        if not self._users:
            self.idle.set()


class Session:
    """Connections to a cluster, and a keyspace of it.

    A node that goes away is tried again by the driver, from then on and for ever.

    Example:
        >>> session = Session(parse_cassandra_url(url), CassandraSettings(), log)
        >>> await session.open()
        >>> await session.run(Statement("SELECT position FROM writers WHERE writer = ?", ("w",)))
        [(7,)]
        >>> await session.close()
    """

    def __init__(
        self,
        target: CassandraTarget,
        settings: CassandraSettings,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self.target = target
        self.settings = settings
        self.counts = Counts()
        """What it counts of itself; see ``exposition``."""
        self.in_flight = 0
        """Requests on their way."""
        self.waiting = 0
        """Requests that wait until fewer are on their way."""
        self._log = log
        self._slots = asyncio.Semaphore(settings.max_in_flight)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="cassandra")
        self._cluster: Any = None
        self._connections: list[_Connections] = []
        self._turn = itertools.count()
        self._prepared: dict[str, asyncio.Task[PreparedStatement]] = {}
        self._arrived: list[tuple[_Exchange, Any, Exception | None]] = []
        self._arrived_lock = threading.Lock()
        self._recycler: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connects; returns when a node has answered and the keyspace is there.

        Keeps trying until then, and says so in the log. If it fails, ``close`` cleans up.

        Raises:
            StoreError: trying again will not help: the login is refused, or the keyspace missing.
        """
        self._loop = asyncio.get_running_loop()
        said = False
        while True:
            try:
                sessions = await self.in_thread(self._connect)
                break
            except DRIVER_ERRORS as error:
                kind = kind_of(error)
                self.counts.errors[kind] += 1
                if kind in ("refused", "other"):
                    raise told_plainly(error, self.target) from error
                if not said:
                    self._log.error(
                        "store not there; waiting", error=str(told_plainly(error, self.target))
                    )
                    said = True
            await asyncio.sleep(_AGAIN_S)
        if said:
            self._log.info("store is there")
        age_s, count = self.settings.max_lifetime_s, len(sessions)
        self._connections = [
            _Connections(session, self._loop.time() + age_s * (place + 1) / count)
            for place, session in enumerate(sessions)
        ]
        self._recycler = asyncio.create_task(self._recycle())

    async def close(self) -> None:
        """Lets go of the cluster; requests under way fail."""
        if self._recycler is not None:
            self._recycler.cancel()
            await asyncio.gather(self._recycler, return_exceptions=True)
        if self._cluster is not None:
            await self.in_thread(self._cluster.shutdown)
        self._threads.shutdown(wait=False)
        for task in self._prepared.values():
            task.cancel()

    async def run(self, request: Statement | Batch) -> list[Row]:
        """Carries out a request.

        A caller that is cancelled leaves it to run to its end.

        Returns:
            The rows, of all pages.

        Raises:
            StoreError: it failed; if it was a write, it may have been carried out or not.
        """
        bound, operation = await self._bound(request)
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        exchange = _Exchange(self._loop.create_future(), operation, self._next_connections())
        self._began(exchange)
        try:
            response = exchange.connections.session.execute_async(bound)
        except BaseException as error:
            self._ended(exchange)
            if isinstance(error, DRIVER_ERRORS):
                raise self._noted(error) from error
            raise
        exchange.response = response
        response.add_callbacks(partial(self._on_rows, exchange), partial(self._on_error, exchange))
        return await exchange.answer

    async def run_all(self, requests: Sequence[Statement | Batch]) -> list[list[Row]]:
        """Carries out many requests at once, in no order.

        Returns:
            The rows of each, in the order of the requests.

        Raises:
            StoreError: one failed; others may have been carried out or not.
        """
        answers: list[list[Row]] = [[]] * len(requests)
        numbers = iter(range(len(requests)))

        async def work() -> None:
            for number in numbers:
                answers[number] = await self.run(requests[number])

        workers = [
            asyncio.create_task(work())
            for _ in range(min(len(requests), self.settings.max_in_flight))
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return answers

    async def in_thread(self, work: Any, *arguments: Any) -> Any:
        """Runs what blocks, on a thread of the session."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def change_schema(self, cql: str) -> None:
        """Carries out a statement that changes tables; returns when all nodes know.

        Raises:
            StoreError: it failed; it may have been carried out or not.
        """
        statement = _qualified(cql, self.target.keyspace)
        with self._borrowed() as session:
            try:
                await self.in_thread(lambda: session.execute(statement, timeout=_SCHEMA_S))
            except DRIVER_ERRORS as error:
                raise self._noted(error) from error

    @property
    def connections(self) -> int:
        """Connections that are open."""
        states = [each.session.get_pool_state().values() for each in self._connections]
        return sum(state["open_count"] for nodes in states for state in nodes)

    def nodes(self) -> dict[str, bool]:
        """Whether each node is there, by address."""
        if self._cluster is None:
            return {}
        hosts = self._cluster.metadata.all_hosts()
        return {str(host.endpoint): bool(host.is_up) for host in hosts}

    # ---------------------------------------------------------------- connecting

    def _connect(self) -> list[Any]:
        """On a thread: the sessions of the driver."""
        if self._cluster is not None:
            self._cluster.shutdown()
        self._cluster = self._make_cluster()
        sessions = [self._cluster.connect() for _ in range(self.settings.connections_per_host)]
        if self.target.keyspace not in self._cluster.metadata.keyspaces:
            if not self.settings.create_keyspace:
                raise StoreError(
                    f"Cassandra at {self.target} has no keyspace {self.target.keyspace}; make it, "
                    "or let it be made (cassandra.create_keyspace)"
                )
            sessions[0].execute(self._keyspace_statement(), timeout=_SCHEMA_S)
        return sessions

    def _make_cluster(self) -> Any:
        target, settings = self.target, self.settings
        login = PlainTextAuthProvider(target.username, target.password) if target.username else None
        policy = TokenAwarePolicy(DCAwareRoundRobinPolicy(local_dc=target.datacentre))
        profile = ExecutionProfile(
            load_balancing_policy=policy,
            retry_policy=CountedRetries(settings.retries, self.counts),
            consistency_level=LEVELS[target.consistency],
            serial_consistency_level=LEVELS["LOCAL_SERIAL"],
            request_timeout=settings.request_timeout_s,
            row_factory=tuple_factory,
        )
        return Cluster(
            list(target.hosts),
            auth_provider=login,
            ssl_context=ssl.create_default_context(cafile=settings.ca) if target.tls else None,
            connection_class=LibevConnection,
            protocol_version=ProtocolVersion.V5,
            execution_profiles={DEFAULT_PROFILE: profile},
            reconnection_policy=ExponentialReconnectionPolicy(
                settings.reconnect_s, settings.max_reconnect_s, max_attempts=None
            ),
            connect_timeout=settings.connect_timeout_s,
            control_connection_timeout=settings.connect_timeout_s,
            idle_heartbeat_interval=settings.heartbeat_s,
            idle_heartbeat_timeout=settings.heartbeat_timeout_s,
            application_name="agent360-metrics",
            monitor_reporting_enabled=False,
        )

    def _keyspace_statement(self) -> str:
        copies = self.settings.replication
        replication = (
            {"class": "NetworkTopologyStrategy", **copies}
            if copies
            else {"class": "SimpleStrategy", "replication_factor": 1}
        )
        return f"CREATE KEYSPACE IF NOT EXISTS {self.target.keyspace} WITH replication = " + str(
            {name: str(value) for name, value in replication.items()}
        )

    async def _recycle(self) -> None:
        """Replaces connections that are old, one after the other."""
        while True:
            oldest = min(self._connections, key=lambda each: each.expires_s)
            await asyncio.sleep(max(0.0, oldest.expires_s - self._loop.time()))
            try:
                session = await self.in_thread(self._cluster.connect)
            except DRIVER_ERRORS as error:
                self._noted(error)
                await asyncio.sleep(_AGAIN_S)
                continue
            expires_s = self._loop.time() + self.settings.max_lifetime_s
            self._connections[self._connections.index(oldest)] = _Connections(session, expires_s)
            await oldest.idle.wait()
            await self.in_thread(oldest.session.shutdown)
            self.counts.recycled += 1

    # ---------------------------------------------------------------- requests

    async def _bound(self, request: Statement | Batch) -> tuple[Any, Operation]:
        if isinstance(request, Statement):
            prepared = await self._statement(request.cql)
            return prepared.bind(request.values), _operation(request.cql)
        batch = BatchStatement(BatchType.UNLOGGED if request.one_partition else BatchType.LOGGED)
        for statement in request.statements:
            batch.add(await self._statement(statement.cql), statement.values)
        batch.is_idempotent = True
        return batch, "write"

    async def _statement(self, cql: str) -> Any:
        """The prepared statement; many may ask for it at the same time."""
        task = self._prepared.get(cql)
        if task is None:
            task = self._prepared[cql] = asyncio.create_task(self._prepare(cql))
        if task.done():
            return task.result()
        return await asyncio.shield(task)

    async def _prepare(self, cql: str) -> Any:
        with self._borrowed() as session:
            try:
                prepared = await self.in_thread(
                    session.prepare, _qualified(cql, self.target.keyspace)
                )
            except DRIVER_ERRORS as error:
                del self._prepared[cql]
                raise self._noted(error) from error
        prepared.is_idempotent = _operation(cql) != "conditional"
        return prepared

    def _next_connections(self) -> _Connections:
        if not self._connections:
            raise StoreError(f"Cassandra at {self.target}: not connected")
        return self._connections[next(self._turn) % len(self._connections)]

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[Any]:
        """The driver's session, for what blocks; it is not replaced meanwhile."""
        connections = self._next_connections()
        connections.take()
        try:
            yield connections.session
        finally:
            connections.give_back()

    def _began(self, exchange: _Exchange) -> None:
        self.in_flight += 1
        exchange.connections.take()

    def _ended(self, exchange: _Exchange) -> None:
        self.in_flight -= 1
        self._slots.release()
        exchange.connections.give_back()

    def _noted(self, error: Exception) -> StoreError:
        self.counts.errors[kind_of(error)] += 1
        return told_plainly(error, self.target)

    # ---------------------------------------------------------------- on the driver's thread

    def _on_rows(self, exchange: _Exchange, rows: Any) -> None:
        self._arrives(exchange, rows, None)

    def _on_error(self, exchange: _Exchange, error: Exception) -> None:
        self._arrives(exchange, None, error)

    def _arrives(self, exchange: _Exchange, rows: Any, error: Exception | None) -> None:
        with self._arrived_lock:
            self._arrived.append((exchange, rows, error))
            if len(self._arrived) > 1:
                return
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            self._loop.call_soon_threadsafe(self._deliver)

    # ---------------------------------------------------------------- on the loop again

    def _deliver(self) -> None:
        with self._arrived_lock:
            arrived, self._arrived = self._arrived, []
        now_s = time.perf_counter()
        for exchange, rows, error in arrived:
            if error is None and rows:
                exchange.rows += rows
            if error is None and exchange.response.has_more_pages:
                exchange.response.start_fetching_next_page()
                continue
            self._ended(exchange)
            answer = exchange.answer
            if error is None:
                self.counts.latencies[exchange.operation].note(now_s - exchange.began_s)
                if not answer.done():
                    answer.set_result(exchange.rows)
            else:
                failure = self._noted(error)
                failure.__cause__ = error
                if not answer.done():
                    answer.set_exception(failure)


_SCHEMA_S: Final = 60.0
"""How long a change of the tables may take, in seconds."""


def _qualified(cql: str, keyspace: str) -> str:
    """A statement with the keyspace before its table."""
    return _TABLE.sub(rf"\1 {keyspace}.\2", cql)


def _operation(cql: str) -> Operation:
    if cql.startswith("SELECT"):
        return "read"
    return "conditional" if _CONDITIONAL in cql else "write"
