"""Options of gRPC channels and servers that both ends must agree on, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

MAX_MESSAGE_BYTES: Final = 16 * 2**20
"""Largest message sent or taken, unless configured."""

KEEPALIVE_S: Final = 60
"""A client pings an idle connection this often; a server accepts pings twice as often."""


@dataclass(frozen=True, slots=True)
class Tls:
    """How a client proves the server, and itself.

    Example:
        >>> Tls(ca=Path("mesh-ca.pem"))
    """

    ca: Path | None = None
    """PEM file with the authorities to trust; None: those of the system."""
    certificate: Path | None = None
    """PEM file with the client's own certificate chain, where the server asks for one."""
    key: Path | None = None
    """PEM file with the client's private key."""
    server_name: str = ""
    """The name that the server's certificate must have; empty: the host of its address."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files."""
        return grpc.ssl_channel_credentials(
            root_certificates=self.ca.read_bytes() if self.ca else None,
            private_key=self.key.read_bytes() if self.key else None,
            certificate_chain=self.certificate.read_bytes() if self.certificate else None,
        )


def channel_options(max_message_bytes: int = MAX_MESSAGE_BYTES) -> list[tuple[str, Any]]:
    """Options of every client channel."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
    ]


def server_options(max_message_bytes: int = MAX_MESSAGE_BYTES) -> list[tuple[str, Any]]:
    """Options of every server."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_S * 500),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_S * 500),
        ("grpc.http2.max_ping_strikes", 5),
        ("grpc.so_reuseport", 0),
        # gRPC cancels calls at random beyond 1,000 that wait; here load shedding decides.
        ("grpc.server.max_pending_requests", 50_000),
        ("grpc.server.max_pending_requests_hard_limit", 100_000),
    ]


def open_channel(
    target: str,
    *,
    host: str = "",
    tls: Tls | None = None,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """Opens a channel to one server.

    Args:
        target: ``ip:port`` or ``host:port``.
        host: the name the address was resolved from, which a certificate is checked against.
        tls: None for plaintext.
        max_message_bytes: largest message.
    """
    options = channel_options(max_message_bytes)
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    name = tls.server_name or host
    if name:
        options.append(("grpc.ssl_target_name_override", name))
    return grpc.aio.secure_channel(target, tls.credentials(), options=options)
