"""Free ports on loopback, for servers that must know each other's before they start."""

from __future__ import annotations

import socket


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody uses, whose HTTP neighbours (1,000 above) are free too."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1000))
            except (OSError, OverflowError):
                continue
            if port not in found:
                found.append(port)
    return found
