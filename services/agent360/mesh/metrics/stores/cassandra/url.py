"""The URLs that name a keyspace of a Cassandra cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote

SCHEME: Final = "cassandra"
CONSISTENCIES: Final = ("LOCAL_ONE", "ONE", "LOCAL_QUORUM", "QUORUM", "EACH_QUORUM", "ALL")
"""What ``consistency`` may say."""

_DEFAULT_PORT: Final = 9042
_MAX_PORT: Final = 65_535
_KEYSPACE: Final = re.compile(r"[a-z][a-z0-9_]{0,47}")
_HOST: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]/?#@,]+)(?::(\d{1,5}))?")
_OPTIONS: Final = ("consistency", "dc", "tls")


@dataclass(frozen=True, slots=True)
class CassandraTarget:
    """What a URL says."""

    hosts: tuple[tuple[str, int], ...]
    """Host and port of nodes that are asked for the others."""
    keyspace: str
    username: str = ""
    """Whom to log in as; empty: there is no login."""
    password: str = field(default="", repr=False)
    consistency: str = "LOCAL_QUORUM"
    """How many copies have to take a write or answer a read; one of ``CONSISTENCIES``."""
    datacentre: str = ""
    """Whose nodes are asked; empty: that of the first host."""
    tls: bool = False
    """Whether connections are encrypted."""

    def __str__(self) -> str:
        """The hosts, for messages."""
        return ", ".join(f"{host}:{port}" for host, port in self.hosts)


def parse_cassandra_url(url: str) -> CassandraTarget:
    """What a URL says.

    ``cassandra://user:password@h1:9042,h2/keyspace?consistency=LOCAL_QUORUM&dc=dc1&tls=true``; all
    but one host and the keyspace may be left out.

    Raises:
        ValueError: it names no keyspace of a cluster; the message holds no password.
    """
    scheme, _, rest = url.partition("://")
    if scheme != SCHEME:
        raise _refused(url, f"it must begin with {SCHEME}://")
    place, _, query = rest.partition("?")
    place, _, keyspace = place.partition("/")
    credentials, at, hosts = place.rpartition("@")
    if "@" in f"{credentials}{keyspace}{query}" or "#" in rest:
        raise _refused(url, "special characters of a user or password must be percent-encoded")
    if not _KEYSPACE.fullmatch(keyspace):
        raise _refused(
            url,
            "a keyspace must follow the hosts: /name, up to 48 of a-z, 0-9 and _, a letter first",
        )
    options = _options(url, query)
    user, _, password = credentials.partition(":")
    return CassandraTarget(
        hosts=tuple(_host(url, each) for each in hosts.split(",")),
        keyspace=keyspace,
        username=unquote(user) if at else "",
        password=unquote(password) if at else "",
        consistency=options.get("consistency", "LOCAL_QUORUM").upper(),
        datacentre=options.get("dc", ""),
        tls=options.get("tls", "false") == "true",
    )


def _options(url: str, query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            raise _refused(url, f"the option {name} is not known; known: {', '.join(_OPTIONS)}")
    consistency = options.get("consistency", "LOCAL_QUORUM").upper()
    if consistency not in CONSISTENCIES:
        raise _refused(url, f"consistency must be one of {', '.join(CONSISTENCIES)}")
    if options.get("tls", "false") not in ("true", "false"):
        raise _refused(url, "tls must be true or false")
    return options


def _host(url: str, text: str) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    if not found:
        raise _refused(url, "hosts must be host or host:port, with commas between them")
    port = int(found[2] or _DEFAULT_PORT)
    if not 0 < port <= _MAX_PORT:
        raise _refused(url, "a port must be a number up to 65535")
    return found[1].strip("[]"), port


def _refused(url: str, reason: str) -> ValueError:
    scheme, _, rest = url.partition("://")
    shown = f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"
    return ValueError(f"{shown} is not the URL of a Cassandra keyspace: {reason}")
