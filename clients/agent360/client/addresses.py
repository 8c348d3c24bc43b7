"""Addresses of a service: parsed from text, resolved to IP addresses, and resolved again."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

RESOLVE_EVERY_S: Final = 30.0
"""How often names are resolved again."""

_DNS_SCHEME: Final = "dns:///"
_UNIX_SCHEME: Final = "unix:"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server."""

    target: str
    """What to connect to: ``ip:port`` or ``unix:path``."""
    host: str
    """The name it was resolved from, which a certificate is checked against."""


def parse_addresses(text: str | Sequence[str]) -> tuple[str, ...]:
    """Splits ``host:port,host:port``.

    Raises:
        ValueError: there is none, or one has no port.
    """
    parts = text.split(",") if isinstance(text, str) else list(text)
    addresses = tuple(part.strip().removeprefix(_DNS_SCHEME) for part in parts if part.strip())
    if not addresses:
        raise ValueError("no address given; expected host:port")
    for address in addresses:
        _, separator, port = address.rpartition(":")
        if not address.startswith(_UNIX_SCHEME) and (not separator or not port.isdigit()):
            raise ValueError(f"address {address!r} has no port; expected host:port")
    return addresses


async def resolve(addresses: Sequence[str]) -> list[Endpoint]:
    """Finds all servers behind the addresses; a name may stand for several.

    Raises:
        OSError: not one name could be resolved.
    """
    loop = asyncio.get_running_loop()
    found: dict[str, Endpoint] = {}
    failure: OSError | None = None
    for address in addresses:
        if address.startswith(_UNIX_SCHEME):
            found[address] = Endpoint(address, "localhost")
            continue
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            infos = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            failure = error
            continue
        families = {info[0] for info in infos}
        for family, _, _, _, peer in infos:
            if family == socket.AF_INET6 and socket.AF_INET in families:
                continue  # one server, two families: one stream
            ip = str(peer[0])
            if family == socket.AF_INET6:
                ip = f"[{ip}]"
            target = f"{ip}:{int(port)}"
            found.setdefault(target, Endpoint(target, host))
    if not found and failure is not None:
        raise failure
    return list(found.values())
