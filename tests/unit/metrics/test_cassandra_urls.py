"""URLs, settings and lifetimes of the store on Cassandra."""

import pytest
from pydantic import ValidationError

from agent360.mesh.metrics.resolution import FINE, HOUR, MINUTE, RESOLUTIONS, Retention
from agent360.mesh.metrics.settings import MetricsSettings
from agent360.mesh.metrics.stores.cassandra.lifetimes import LAYOUTS, Lifetimes, ttl_until
from agent360.mesh.metrics.stores.cassandra.settings import CassandraSettings
from agent360.mesh.metrics.stores.cassandra.url import CassandraTarget, parse_cassandra_url

DAY_S = 86_400
LAST_S = 2**31 - 2
RETENTION = Retention(2 * DAY_S, 14 * DAY_S, 400 * DAY_S)


def test_a_url_says_all_there_is_to_say() -> None:
    url = "cassandra://ana:p%40ss@h1:9043,h2,[::1]:7/metrics?consistency=quorum&dc=dc1&tls=true"
    assert parse_cassandra_url(url) == CassandraTarget(
        hosts=(("h1", 9043), ("h2", 9042), ("::1", 7)),
        keyspace="metrics",
        username="ana",
        password="p@ss",
        consistency="QUORUM",
        datacentre="dc1",
        tls=True,
    )
    assert parse_cassandra_url("cassandra://h/k") == CassandraTarget((("h", 9042),), "k")
    assert "p@ss" not in repr(parse_cassandra_url(url))


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("cassandra://h", "a keyspace must follow"),
        ("cassandra://h/Metrics", "a keyspace must follow"),
        ("cassandra://h/k;drop", "a keyspace must follow"),
        ("cassandra:///k", "hosts must be"),
        ("cassandra://h,/k", "hosts must be"),
        ("cassandra://h:0/k", "up to 65535"),
        ("cassandra://h:70000/k", "up to 65535"),
        ("cassandra://ana:se@cret@h/k", "percent-encoded"),
        ("cassandra://ana:secret@h/k?consistency=MOST", "must be one of LOCAL_ONE"),
        ("cassandra://ana:secret@h/k?tls=yes", "true or false"),
        ("cassandra://ana:secret@h/k?datacenter=a", "datacenter is not known; known: consistency"),
    ],
)
def test_a_wrong_url_is_refused_without_telling_the_password(url: str, fault: str) -> None:
    with pytest.raises(ValidationError) as caught:
        MetricsSettings(store=url)
    (error,) = caught.value.errors()
    assert fault in error["msg"]
    assert "cret" not in error["msg"]


def test_an_unknown_store_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValidationError, match="supported: sqlite:///path, cassandra://host:port"):
        MetricsSettings(store="mongodb://h/k")


@pytest.mark.parametrize("replication", [{"dc1": 0}, {"dc'1": 1}, {"": 1}])
def test_a_replication_that_is_none_is_refused(replication: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="needs the name of a data centre"):
        CassandraSettings(replication=replication)


def test_rows_live_from_the_time_of_their_data_on() -> None:
    lifetimes = Lifetimes(RETENTION, DAY_S, late_s=0.0, now=lambda: 1_000_000.0)
    assert lifetimes.of_rollups(FINE, 1_000_000.0) == 2 * DAY_S
    assert lifetimes.of_rollups(MINUTE, 1_000_000.0 - DAY_S) == 13 * DAY_S
    assert lifetimes.of_rollups(HOUR, 1_000_000.0 - 500 * DAY_S) == 60, "0 would be for ever"
    assert lifetimes.of_mark(1_000_000.0) == 2 * DAY_S


def test_no_row_is_to_live_longer_than_cassandra_takes() -> None:
    for_ever = Retention(1e12, 1e12, 1e12)
    lifetimes = Lifetimes(for_ever, 1e12, 1e12, now=lambda: 1_800_000_000.0)
    for resolution in RESOLUTIONS:
        assert lifetimes.of_rollups(resolution, 1_800_000_000.0) == LAST_S - 1_800_000_000
        assert lifetimes.default_s(resolution) == LAST_S - 1_800_000_000
    assert ttl_until(None) == 0
    assert 0 < ttl_until(1e15) < LAST_S


def test_partitions_hold_whole_rows_and_rows_whole_buckets() -> None:
    for resolution, layout in LAYOUTS.items():
        assert layout.partition_s % layout.row_s == 0
        assert layout.row_s % resolution.length_s == 0
        assert DAY_S % layout.row_s == 0
