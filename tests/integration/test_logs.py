"""The log of a service: its lines carry their calls; they are sampled, counted, kept and listed."""

import asyncio
import io
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
import structlog
from support.polling import eventually
from support.servers import NOBODY, running

from agent360.cache.v1 import cache_pb2
from agent360.client import InvalidRequestError, Mesh, MeshError, call_scope
from agent360.client.channel import open_channel
from agent360.client.errors import UnavailableError, Violation
from agent360.client.metric_queries import metric_query
from agent360.logs.v1 import logs_pb2 as pb
from agent360.mesh.cache import CacheServicer, CacheSettings
from agent360.mesh.runtime.call import Emit, Item
from agent360.mesh.runtime.logs import LogHub, LogReport, configure_logging
from agent360.mesh.runtime.logs.hub import set_hub
from agent360.mesh.runtime.policies.authentication import hash_key
from agent360.mesh.runtime.server import Server
from agent360.mesh.runtime.service import ServiceDefinition
from agent360.mesh.runtime.settings import (
    LogSettings,
    LogShippingSettings,
    RedactionSettings,
)

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
METHOD = "/agent360.cache.v1.CacheService/Get"


class Log:
    """The process's log, set up anew; ``lines`` are what was written."""

    def __init__(self) -> None:
        self._file = io.StringIO()
        self.hub: LogHub

    def configure(self, **settings: Any) -> LogHub:
        values = LogSettings.model_validate({"format": "json", **settings})
        self.hub = configure_logging(values, RedactionSettings(), "metrics", file=self._file)
        return self.hub

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._file.getvalue().splitlines()]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]


@pytest.fixture
def log() -> Iterator[Log]:
    before = structlog.get_config()
    handlers, level = logging.root.handlers[:], logging.root.level
    yield Log()
    set_hub(None)
    structlog.configure(**before)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@asynccontextmanager
async def two_services(path: Path, **cache: Any) -> AsyncIterator[tuple[Server, Server, Mesh]]:
    """The metrics service, and a cache that hands its log on to it."""
    async with (
        running("metrics", store=f"sqlite:///{path}/m.db") as metrics,
        running("cache", mesh={"metrics": metrics.address}, **cache) as server,
        Mesh.connect(
            metrics=metrics.address, cache=server.address, tenant="acme", api_key=""
        ) as mesh,
    ):
        yield metrics, server, mesh


async def listed(mesh: Mesh, tenant: str = "*", **wanted: Any) -> list[Any]:
    return [each async for each in mesh.logs.list(tenant=tenant, **wanted)]


async def found(mesh: Mesh, count: int, **wanted: Any) -> list[Any]:
    """Records, once there are so many."""
    records: list[Any] = []

    async def enough() -> bool:
        records[:] = await listed(mesh, **wanted)
        return len(records) >= count

    for _ in range(200):
        if await enough():
            return records
        await asyncio.sleep(0.05)
    raise AssertionError(f"only {len(records)} records: {records}")


async def test_a_line_of_a_call_carries_what_the_call_is(log: Log, tmp_path: Path) -> None:
    log.configure(access="all")
    async with two_services(tmp_path, log={"access": "all"}) as (_, _, mesh):
        with call_scope(traceparent=TRACEPARENT, request_id="r-1"):
            await mesh.cache.get("k")
    (line,) = [each for each in log.of("call") if each["method"].endswith("CacheService/Get")]
    assert line["tenant"] == "acme"
    assert line["request_id"] == "r-1"
    assert line["trace_id"] == TRACEPARENT[3:35]
    assert line["span_id"] == TRACEPARENT[36:52]
    assert (line["code"], line["level"], line["service"]) == ("OK", "info", "cache")
    assert line["duration_ms"] >= 0
    assert datetime.fromisoformat(line["timestamp"]).tzinfo is not None


class Talkative(CacheServicer):
    """A cache whose Get logs, then fails."""

    @property
    def definitions(self) -> tuple[ServiceDefinition, ...]:
        first, *others = super().definitions
        return (replace(first, batch={**first.batch, "Get": self.noisy}), *others)

    async def noisy(self, items: Sequence[Item], emit: Emit) -> None:
        for item in items:
            emit.start(item, self._noisy())

    async def _noisy(self) -> None:
        logging.getLogger("library").warning("from %s", "a library")
        structlog.get_logger(service="cache").warning("from the handler")
        raise ZeroDivisionError


async def test_what_a_handler_logs_carries_its_call_in_both_forms(log: Log) -> None:
    log.configure()
    settings = CacheSettings(ephemeral_ports=True, mesh={"metrics": NOBODY})
    server = Server(settings, Talkative)
    await server.start()
    async with (
        Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh,
        open_channel(server.address) as channel,
    ):
        with (
            call_scope(traceparent=TRACEPARENT, request_id="r-2"),
            pytest.raises(MeshError, match="internal error"),
        ):
            await mesh.cache.get("k")
        rpc = channel.unary_unary(
            METHOD,
            request_serializer=cache_pb2.GetRequest.SerializeToString,
            response_deserializer=cache_pb2.GetResponse.FromString,
        )
        with pytest.raises(grpc.RpcError):
            await rpc(
                cache_pb2.GetRequest(namespace="n", key="k"),
                metadata=(
                    ("x-agent360-tenant", "acme"),
                    ("traceparent", TRACEPARENT),
                    ("x-request-id", "r-2"),
                ),
            )
    await server.stop()
    for event in ("from the handler", "from a library", "internal error", "call"):
        lines = log.of(event)
        assert len(lines) == 2, event
        for line in lines:
            assert line["tenant"] == "acme"
            assert line["request_id"] == "r-2"
            assert line["trace_id"] == TRACEPARENT[3:35]
            assert line["span_id"] == TRACEPARENT[36:52]
            assert line["method"] == METHOD
    assert {line["logger"] for line in log.of("from a library")} == {"library"}
    assert {line["code"] for line in log.of("call")} == {"INTERNAL"}
    (trace, *_) = log.of("internal error")[0]["exception"]
    assert trace["exc_type"] == "ZeroDivisionError"


async def test_secrets_are_neither_written_nor_kept(log: Log, tmp_path: Path) -> None:
    log.configure()
    async with two_services(tmp_path) as (_, server, mesh):
        server.log.warning(
            "login failed with password=hunter2&page=1",
            api_key="hunter2",
            header={"Authorization": "Bearer hunter2hunter2", "accept": "all"},
            url="redis://ana:hunter2@host/1",
        )
        logging.getLogger("library").warning("token: %s", "hunter2")
        try:
            int("secret=hunter2")
        except ValueError:
            server.log.exception("broken")
        (broken, failed) = await found(mesh, 2, service="cache")
        assert failed.message == "login failed with password=[redacted]&page=1"
        assert failed.attributes["api_key"] == "[redacted]"
        assert failed.attributes["url"] == "redis://ana:[redacted]@host/1"
        assert "ValueError" in broken.exception
    assert len(log.lines) >= 3
    assert "hunter2" not in json.dumps(log.lines)
    nowhere("hunter2", tmp_path)


def nowhere(secret: str, directory: Path) -> None:
    files = [file for file in directory.rglob("*") if file.is_file()]
    assert files
    for file in files:
        assert secret.encode() not in file.read_bytes()


async def test_a_noisy_pattern_is_sampled_says_how_many_were_left_out_and_is_counted_whole(
    log: Log, tmp_path: Path
) -> None:
    log.configure(sampling={"first": 5, "then_every": 100, "interval_s": 3_600})
    async with two_services(tmp_path) as (metrics, server, mesh):
        for number in range(1_000):
            text = f"lost item {number} of 'x{number}'"
            server.log.warning(text)
            if number == 500:
                server.log.error("rare")
            logging.getLogger("library").error("retry %d", number)
        lost = [line for line in log.lines if line["event"].startswith("lost item")]
        retries = [line for line in log.lines if line["event"].startswith("retry")]
        for lines in (lost, retries):
            assert len(lines) == 5 + 9
            assert sum(line.get("suppressed", 0) for line in lines) == 9 * 99
        assert len(log.of("rare")) == 1
        kept = await found(mesh, 15, service="cache")
        assert len(kept) == 15
        assert sum(each.suppressed for each in kept) == 9 * 99

        server._logs.count()
        metrics._logs.count()
        await mesh.metrics.flush()
        await server._mesh.metrics.flush()
        counts = await counted(mesh, 3)
        assert counts["cache", "warning", "lost item * of *"] == 1_000
        assert counts["cache", "error", "rare"] == 1
        assert counts["metrics", "error", "retry %d"] == 1_000


async def counted(mesh: Mesh, at_least: int) -> dict[tuple[str, str, str], float]:
    """The metric of log records, once it has so many series above info."""
    found_: dict[tuple[str, str, str], float] = {}
    for _ in range(200):
        groups = [
            each
            async for each in mesh.metrics.query(
                metric_query("mesh_log_records", "sum", group_by=["service", "level", "pattern"]),
                tenant="agent360-mesh",
            )
        ]
        found_ = {
            (
                each.labels["service"],
                each.labels["level"],
                each.labels["pattern"],
            ): each.points[-1].value
            for each in groups
        }
        if sum(level != "info" for _, level, _ in found_) >= at_least:
            return found_
        await asyncio.sleep(0.05)
    raise AssertionError(found_)


async def test_patterns_beyond_the_limit_count_as_other(log: Log) -> None:
    hub = log.configure(sampling={"max_patterns": 3})
    logger = structlog.get_logger(service="cache")
    for word in ("one", "two", "three", "four", "five", "one"):
        logger.warning(word)
    assert hub.drain("cache") == {
        ("warning", "one"): 2,
        ("warning", "two"): 1,
        ("warning", "three"): 1,
        ("warning", "other"): 2,
    }
    assert hub.drain("cache") == {}


@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_warnings_and_a_share_of_the_rest_are_kept(
    log: Log, tmp_path: Path, share: float
) -> None:
    log.configure(shipping={"share": share})
    async with two_services(tmp_path) as (metrics, server, mesh):
        server.log.info("an info")
        metrics.log.info("an info")
        server.log.warning("a warning", plan=7)
        metrics.log.error("an error")
        await found(mesh, 4 if share else 2, start=datetime.now(UTC) - timedelta(hours=1))
        records = {(each.service, each.message) for each in await listed(mesh)}
        assert {("cache", "a warning"), ("metrics", "an error")} <= records
        assert (("cache", "an info") in records) == (share == 1.0)
        assert (("metrics", "an info") in records) == (share == 1.0)
        above = await listed(mesh, level="error")
        assert [(each.service, each.message) for each in above] == [("metrics", "an error")]
        (warning,) = await listed(mesh, service="cache", level="warning")
        assert warning.attributes["plan"] == "7"
        assert warning.tenant == "agent360-mesh"
        (bare,) = await listed(mesh, fields=["message"], level="error")
        assert (bare.message, bare.service, bare.record_id) == ("an error", "", "")


async def test_the_metrics_service_keeps_its_own_records_without_a_call(
    log: Log, tmp_path: Path
) -> None:
    log.configure(access="all", shipping={"share": 1.0})
    async with (
        running("metrics", store=f"sqlite:///{tmp_path}/m.db", log={"access": "all"}) as server,
        Mesh.connect(metrics=server.address, api_key="", tenant="acme") as mesh,
    ):
        server.log.warning("a warning")
        records = await found(mesh, 3)
        assert {each.method for each in records if each.message == "call"} == {
            "/agent360.logs.v1.LogService/ListRecords"
        }
        labels = {"grpc_type": "unary", "grpc_service": "agent360.logs.v1.LogService"}
        handled = {
            name: server.registry.get_sample_value(
                "grpc_server_handled_total", {**labels, "grpc_method": name, "grpc_code": "OK"}
            )
            for name in ("Write", "ListRecords")
        }
        assert handled["Write"] is None
        assert handled["ListRecords"]


async def test_records_wait_for_the_service_and_none_is_kept_because_of_keeping(log: Log) -> None:
    hub = log.configure()
    logger = structlog.get_logger(service="cache")
    kept: list[pb.LogRecord] = []
    away = True

    async def keep(records: Sequence[pb.LogRecord]) -> None:
        logger.warning("keeping")
        if away:
            raise UnavailableError("away")
        kept.extend(records)

    report = LogReport("cache", LogShippingSettings(max_waiting=10), Counts(), keep, hub)
    task = asyncio.create_task(report.run())
    for number in range(25):
        logger.warning("lost", number=number)
    await eventually(lambda: len(log.of("keeping")) >= 2)
    away = False
    await eventually(lambda: len(kept) == 10)
    logger.warning("later")
    await eventually(lambda: len(kept) == 11)
    assert {each.message for each in kept} == {"lost", "later"}
    assert len({each.record_id for each in kept}) == 11
    report.count()
    task.cancel()
    await report.close()
    assert hub.sinks == {}
    assert Counts.taken["mesh_log_records_lost"] == 15


class Counts:
    """Adds counts up."""

    taken: ClassVar[Counter[str]] = Counter()

    def count(
        self,
        name: str,
        value: float = 1.0,
        labels: dict[str, str] | None = None,
        tenant: str = "",
    ) -> None:
        assert labels
        assert tenant == "agent360-mesh"
        self.taken[name] += int(value)


async def test_records_that_are_refused_are_dropped_and_those_after_them_are_kept(
    log: Log,
) -> None:
    hub = log.configure()
    logger = structlog.get_logger(service="cache")
    kept: list[pb.LogRecord] = []

    async def keep(records: Sequence[pb.LogRecord]) -> None:
        if any(each.message == "bad" for each in records):
            raise InvalidRequestError([Violation("records", "are bad")])
        kept.extend(records)

    report = LogReport("cache", LogShippingSettings(), Counts(), keep, hub)
    task = asyncio.create_task(report.run())
    for _ in range(500):
        report.offer({"event": "bad", "level": "error"}, 40, "bad")
    logger.error("good")
    await eventually(lambda: [each.message for each in kept] == ["good"])
    task.cancel()
    await report.close()


async def test_who_may_read_and_write_which_records(log: Log, tmp_path: Path) -> None:
    log.configure()
    keys = [
        {"name": "a", "sha256": hash_key("ka"), "tenants": ["acme"]},
        {"name": "root", "sha256": hash_key("kr"), "tenants": ["*"], "admin": True},
    ]

    def record(tenant: str, message: str = "m") -> pb.LogRecord:
        return pb.LogRecord(
            tenant=tenant,
            level=pb.LOG_LEVEL_ERROR,
            service="planner",
            message=message,
            exception="Traceback ...",
        )

    async with (
        running(
            "metrics", store=f"sqlite:///{tmp_path}/m.db", authentication={"keys": keys}
        ) as server,
        Mesh.connect(metrics=server.address, api_key="ka") as acme,
        Mesh.connect(metrics=server.address, api_key="kr", tenant="globex") as root,
    ):
        await acme.logs.write([record(""), record("acme", "n")])
        await root.logs.write([record("globex")])
        with pytest.raises(MeshError) as refused:
            await acme.logs.write([record("globex")])
        assert refused.value.reason == "TENANT_NOT_ALLOWED"
        with pytest.raises(MeshError) as refused:
            await listed(acme, "*")
        assert refused.value.code is grpc.StatusCode.PERMISSION_DENIED
        own = await listed(acme, "acme", service="planner")
        assert {each.message for each in own} == {"m", "n"}
        assert [each.exception for each in own] == ["", ""]
        everyone = await listed(root, "*", service="planner")
        assert sorted(each.tenant for each in everyone) == ["acme", "acme", "globex"]
        assert {each.exception for each in everyone} == {"Traceback ..."}
        assert [each.tenant for each in await listed(root, "globex", service="planner")] == [
            "globex"
        ]
        bad = pb.LogRecord(record_id="x", trace_id="y", attributes={"": "z"})
        bad.record_time.FromDatetime(datetime.now(UTC) + timedelta(days=1))
        with pytest.raises(InvalidRequestError) as invalid:
            await acme.logs.write([bad])
        assert {each.field.removeprefix("records[0].") for each in invalid.value.violations} == {
            "level",
            "service",
            "message",
            "trace_id",
            "record_id",
            "record_time",
            "attributes[]",
        }


async def test_records_are_paged_whole_while_others_are_written_and_go_after_a_while(
    log: Log, tmp_path: Path
) -> None:
    log.configure()
    now = datetime.now(UTC)

    def record(hours: float) -> pb.LogRecord:
        made = pb.LogRecord(level=pb.LOG_LEVEL_INFO, service="planner", message=f"{hours:g} h")
        made.record_time.FromDatetime(now - timedelta(hours=hours))
        return made

    async with (
        running(
            "metrics",
            store=f"sqlite:///{tmp_path}/m.db",
            retention={"logs_s": 5 * 86_400},
        ) as server,
        Mesh.connect(metrics=server.address, api_key="", tenant="acme") as mesh,
    ):
        await mesh.logs.write([record(0.1 * n) for n in range(800)])
        await mesh.logs.write([record(24 * 30)])  # past its retention: not taken
        texts: list[str] = []
        async for each in mesh.logs.list(service="planner", page_size=50):
            if len(texts) % 100 == 0:
                await mesh.logs.write([record(0), record(-0.1)])
            texts.append(each.message)
        assert texts == [f"{0.1 * n:g} h" for n in range(800)]

        page = await page_of(mesh, "acme")
        with pytest.raises(InvalidRequestError):
            await page_of(mesh, "globex", page.next_page_token)
        with pytest.raises(InvalidRequestError):
            await page_of(mesh, "*", page.next_page_token)

        keeper = server._servicer.started.logs
        keeper._now = lambda: now.timestamp() + 3 * 86_400
        await keeper.expire()
        left = [each.record_time.ToDatetime(UTC) async for each in mesh.logs.list()]
        assert left
        assert min(left).date() == (now - timedelta(days=2)).date()


async def page_of(mesh: Mesh, tenant: str, token: str = "") -> Any:
    request = pb.ListRecordsRequest(page_token=token)
    return await mesh._coalescers[5].unary(
        "ListRecords", request, pb.ListRecordsResponse, tenant=tenant
    )
