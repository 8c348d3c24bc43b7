"""The URLs that name a Redis server or cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple
from urllib.parse import unquote

from redis.asyncio.connection import parse_url

_SCHEMES: Final = ("redis", "rediss", "redis+cluster", "rediss+cluster")
_DEFAULT_PORT: Final = 6379


class Endpoint(NamedTuple):
    """Where one server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class RedisTarget:
    """What a URL says."""

    endpoints: tuple[Endpoint, ...]
    """The server, or some servers of the cluster."""
    clustered: bool = False
    """Whether it is a cluster."""
    tls: bool = False
    """Whether connections are encrypted."""
    username: str = ""
    """Whom to log in as; empty: the default user."""
    password: str = field(default="", repr=False)
    """Empty: there is no login."""
    db: int = 0
    """The number of the database."""


def check_redis_url(url: str) -> str:
    """Returns a URL if it names a server or cluster.

    ``redis://``, ``rediss://`` (TLS), ``redis+cluster://h1:p1,h2:p2`` or ``rediss+cluster://``,
    with ``user:password@`` before the hosts and, of a single server, ``/db`` after it.

    Raises:
        ValueError: it does not; the message holds no password.
    """
    parse_redis_url(url)
    return url


def redacted_url(url: str) -> str:
    """A URL, right or wrong, with nothing secret in it."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    credentials, at, hosts = rest.rpartition("@")
    hosts, question, _ = hosts.partition("?")
    user, colon, _ = credentials.partition(":")
    hidden = f"{user}:***@" if colon else "***@"
    return f"{scheme}{separator}{hidden if at else ''}{hosts}{'?***' if question else ''}"


def parse_redis_url(url: str) -> RedisTarget:
    """What a URL says.

    Raises:
        ValueError: it names no server or cluster; the message holds no password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _SCHEMES:
        raise _refused(url, f"it must begin with one of {', '.join(f'{s}://' for s in _SCHEMES)}")
    place, _, path = rest.partition("/")
    if "@" in path or "#" in rest:
        raise _refused(url, "special characters of a user or password must be percent-encoded")
    if "?" in rest:
        raise _refused(url, "it takes no options after ?: they are settings")
    credentials, at, hosts = place.rpartition("@")
    if "@" in credentials:
        raise _refused(url, "special characters of a user or password must be percent-encoded")
    clustered = scheme.endswith("+cluster")
    names = hosts.split(",")
    if len(names) > 1 and not clustered:
        raise _refused(url, f"several servers make a cluster: {scheme}+cluster://")
    user, _, password = credentials.partition(":")
    return RedisTarget(
        endpoints=tuple(_endpoint(url, name) for name in names),
        clustered=clustered,
        tls=scheme.startswith("rediss"),
        username=unquote(user) if at else "",
        password=unquote(password) if at else "",
        db=_database(url, path, clustered=clustered),
    )


def _endpoint(url: str, name: str) -> Endpoint:
    try:
        parts = parse_url(f"redis://{name}")
    except ValueError:
        raise _refused(url, "a port must be a number up to 65535") from None
    host = parts.get("host", "")
    if not host:
        raise _refused(url, "a host is missing")
    return Endpoint(host, parts.get("port", _DEFAULT_PORT))


def _database(url: str, path: str, *, clustered: bool) -> int:
    if not path:
        return 0
    if clustered:
        raise _refused(url, "a cluster has no databases to choose from")
    if not path.isdecimal():
        raise _refused(url, "the database must be a number")
    return int(path)


def _refused(url: str, reason: str) -> ValueError:
    return ValueError(f"{redacted_url(url)} is not the URL of a Redis server: {reason}")
