"""How connections are opened: redis-py connects and logs in, then hands its socket over."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any, Final

from redis import exceptions
from redis.asyncio.connection import Connection as PlainConnection
from redis.asyncio.connection import SSLConnection

from agent360.mesh.runtime.redis.connection import Wire
from agent360.mesh.runtime.redis.failures import UnwillingError
from agent360.mesh.runtime.redis.url import Endpoint, RedisTarget

_FULL: Final = "max number of clients"


class Dialer:
    """Opens connections to the servers of one target."""

    def __init__(self, target: RedisTarget, connect_timeout_s: float, ca: Path | None) -> None:
        """Reads the authorities to trust, if connections are encrypted.

        Raises:
            OSError: the file cannot be read.
        """
        self._timeout_s = connect_timeout_s
        self._tls = ssl.create_default_context(cafile=ca) if target.tls else None
        # Without a Retry redis-py tries once; without a dispatcher, driver or maintenance
        # configuration it does no more than log in and choose the database.
        self._arguments: dict[str, Any] = {
            "username": target.username or None,
            "password": target.password or None,
            "db": target.db,
            "protocol": 2,
            "decode_responses": False,
            "driver_info": None,
            "maint_notifications_config": None,
            "socket_timeout": connect_timeout_s,
            "socket_connect_timeout": connect_timeout_s,
        }

    async def dial(self, endpoint: Endpoint, wire: Wire) -> None:
        """Connects a wire to a server.

        Raises:
            OSError: the server cannot be reached; TimeoutError: not in time.
            UnwillingError: it refuses the login or is full.
        """
        connection = self._connection(endpoint)
        try:
            async with asyncio.timeout(self._timeout_s):
                await connection.connect()  # type: ignore[no-untyped-call]
            connection.hand_over(wire)
        except exceptions.TimeoutError as error:
            raise TimeoutError(str(error)) from None
        except TimeoutError:
            raise TimeoutError(f"not connected within {self._timeout_s} s") from None
        except exceptions.AuthenticationError as error:
            raise UnwillingError(str(error)) from None
        except exceptions.ConnectionError as error:
            kind = UnwillingError if _FULL in str(error) else ConnectionError
            raise kind(str(error)) from None
        except exceptions.RedisError as error:
            raise UnwillingError(str(error)) from None
        finally:
            connection.drop()

    def _connection(self, endpoint: Endpoint) -> _Plain | _Secure:
        if self._tls is None:
            return _Plain(host=endpoint.host, port=endpoint.port, **self._arguments)
        connection = _Secure(host=endpoint.host, port=endpoint.port, **self._arguments)
        connection.ssl_context.context = self._tls
        return connection


class _HandsOver:
    """Lets go of a connection's socket once it has logged in."""

    _reader: asyncio.StreamReader | None
    _writer: asyncio.StreamWriter | None

    def hand_over(self, wire: Wire) -> None:
        """Makes the wire the protocol of the socket.

        Raises:
            ConnectionError: the server has already closed it, or spoke unasked.
        """
        reader, writer = self._reader, self._writer
        if reader is None or writer is None:
            raise ConnectionError("closed by the server")
        if reader.at_eof() or writer.transport.is_closing():
            raise ConnectionError("closed by the server")
        said = bytes(reader._buffer)  # type: ignore[attr-defined]  # noqa: SLF001 - as redis-py does
        if said:
            text = said.decode(errors="replace").strip()
            raise UnwillingError(text) if _FULL in text else ConnectionError(text)
        writer.transport.set_protocol(wire)
        wire.connected(writer)
        self._reader = self._writer = None

    def drop(self) -> None:
        """Closes the socket if it is still here."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None


class _Plain(_HandsOver, PlainConnection):
    pass


class _Secure(_HandsOver, SSLConnection):
    pass
