"""The URLs of Redis servers and clusters: what they say, and that they never show a password."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent360.mesh.runtime.redis import check_redis_url, redacted_url
from agent360.mesh.runtime.redis.url import Endpoint, RedisTarget, parse_redis_url


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("redis://127.0.0.1", RedisTarget((Endpoint("127.0.0.1", 6379),))),
        ("redis://cache:7000/3", RedisTarget((Endpoint("cache", 7000),), db=3)),
        ("rediss://cache", RedisTarget((Endpoint("cache", 6379),), tls=True)),
        ("redis://[::1]:7000", RedisTarget((Endpoint("::1", 7000),))),
        (
            "redis://:p%40ss@cache",
            RedisTarget((Endpoint("cache", 6379),), password="p@ss"),
        ),
        (
            "redis://mesh:secret@cache:7000/1",
            RedisTarget((Endpoint("cache", 7000),), username="mesh", password="secret", db=1),
        ),
        (
            "redis+cluster://a:7000,b,[::1]:7002",
            RedisTarget((Endpoint("a", 7000), Endpoint("b", 6379), Endpoint("::1", 7002)), True),
        ),
        (
            "rediss+cluster://mesh:secret@a:7000,b:7001",
            RedisTarget((Endpoint("a", 7000), Endpoint("b", 7001)), True, True, "mesh", "secret"),
        ),
    ],
)
def test_a_url_says_where_and_how_to_connect(url: str, target: RedisTarget) -> None:
    assert parse_redis_url(url) == target
    assert check_redis_url(url) == url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "must begin with"),
        ("cache:6379", "must begin with"),
        ("http://cache", "must begin with"),
        ("memory://", "must begin with"),
        ("redis://", "a host is missing"),
        ("redis://:secret@", "a host is missing"),
        ("redis+cluster://a,", "a host is missing"),
        ("redis://cache:secret", "a port must be a number"),
        ("redis://cache:70000", "a port must be a number"),
        ("redis://cache/secret", "the database must be a number"),
        ("redis://cache/1/2", "the database must be a number"),
        ("redis+cluster://a:1/2", "no databases"),
        ("redis://a:1,b:2", "redis\\+cluster://"),
        ("redis://cache?password=secret", "no options"),
        ("redis://:sec/ret@cache", "percent-encoded"),
        ("redis://:sec#ret@cache", "percent-encoded"),
        ("redis://:sec@ret@cache", "percent-encoded"),
    ],
)
def test_a_url_that_names_no_server_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_redis_url(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://cache:7000/1", "redis://cache:7000/1"),
        ("redis://mesh:secret@cache", "redis://mesh:***@cache"),
        ("redis://:secret@cache", "redis://:***@cache"),
        ("redis://secret@cache", "redis://***@cache"),
        ("redis://:sec/r@et@cache", "redis://:***@cache"),
        ("redis://mesh:a://b@cache", "redis://mesh:***@cache"),
        ("redis://cache?password=secret", "redis://cache?***"),
        ("mesh:secret@cache", "mesh:***@cache"),
        ("redis+cluster://m:secret@a:1,b:2", "redis+cluster://m:***@a:1,b:2"),
    ],
)
def test_a_redacted_url_still_says_where(url: str, shown: str) -> None:
    assert redacted_url(url) == shown


@given(
    password=st.text(alphabet="sEcReT/:@?#[]%,&= 0123456789", min_size=1).map("xyzzy".join),
    scheme=st.sampled_from(["redis", "rediss", "redis+cluster", "http"]),
    user=st.sampled_from(["", "mesh"]),
    hosts=st.sampled_from(["cache", "a:1,b:2", "cache:port", "cache/1", ""]),
)
def test_no_password_is_ever_shown(password: str, scheme: str, user: str, hosts: str) -> None:
    secret = f"xyzzy{password}"
    url = f"{scheme}://{user}:{secret}@{hosts}"
    assert "xyzzy" not in redacted_url(url)
    try:
        said = repr(parse_redis_url(url))
    except ValueError as error:
        said = f"{error!r} {error.__cause__!r}"
    assert "xyzzy" not in said
