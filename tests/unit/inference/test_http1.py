"""The HTTP/1.1 client, before servers that say exactly what the tests let them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from support.polling import eventually

from agent360.mesh.inference.backends import http1

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Behave = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Raw:
    """A server that answers each request by what ``behave`` does after its head and body."""

    def __init__(self, behave: Behave) -> None:
        self._behave = behave
        self.requests: list[bytes] = []
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while not reader.at_eof():
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                body = await reader.readexactly(int(length or 0))
                self.requests.append(head + body)
                await self._behave(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def client_of(behave: Behave, most: int = 4) -> AsyncIterator[tuple[http1.HttpServer, Raw]]:
    raw = Raw(behave)
    server = await asyncio.start_server(raw.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = http1.HttpServer(f"http://127.0.0.1:{port}/v1", most=most, connect_timeout_s=2.0)
    try:
        yield client, raw
    finally:
        await client.close()
        server.close()


def says(*parts: bytes) -> Behave:
    """Sends the parts, each in a write of its own."""

    async def behave(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)

    return behave


def says_and_closes(*parts: bytes) -> Behave:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await says(*parts)(reader, writer)
        writer.close()

    return behave


async def asked(client: http1.HttpServer, body: bytes = b"{}", **options: float) -> bytes:
    response = await client.ask("POST", "/v1/x", {"X": "y"}, body, within_s=5.0, **options)
    try:
        return await response.read(1 << 24)
    finally:
        response.close()


CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'5;note="a"\r\nhello\r\n1\r\n,\r\n006\r\n world\r\n0\r\nX-Trailer: yes\r\n\r\n'
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_chunks_are_put_together_wherever_the_network_cuts_them(size: int) -> None:
    parts = [CHUNKED[at : at + size] for at in range(0, len(CHUNKED), size)]
    async with client_of(says(*parts)) as (client, raw):
        assert await asked(client) == b"hello, world"
        assert await asked(client) == b"hello, world"
        assert raw.connections == 1
        assert raw.requests[0].startswith(b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1:")
        assert raw.requests[0].endswith(b"\r\nX: y\r\nContent-Length: 2\r\n\r\n{}")


async def test_a_body_without_a_length_goes_on_until_the_end() -> None:
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    async with client_of(says_and_closes(head, b"all ", b"of it")) as (client, raw):
        assert await asked(client) == b"all of it"
        assert await asked(client) == b"all of it"
        assert raw.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok and more",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nok\r\n0\r\n\r\n"
        ),
    ],
    ids=["more than it said", "close", "HTTP/1.0", "two ways to end"],
)
async def test_a_connection_that_cannot_be_trusted_again_is_not_kept(answer: bytes) -> None:
    async with client_of(says(answer)) as (client, raw):
        assert await asked(client) == b"ok"
        assert await asked(client) == b"ok"
        assert raw.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"220 mail.example.org ESMTP\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n+2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nokay\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
    ],
)
async def test_what_is_no_http_is_told_apart(answer: bytes) -> None:
    async with client_of(says(answer)) as (client, _):
        with pytest.raises(http1.NotHttpError):
            await asked(client)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"",
    ],
)
async def test_an_answer_that_ends_too_soon_is_broken(answer: bytes) -> None:
    async with client_of(says_and_closes(answer)) as (client, _):
        with pytest.raises(http1.BrokenError) as broken:
            await asked(client)
        # Only of a connection that was used before it is known that the server did not see it.
        assert not isinstance(broken.value, http1.DeadConnectionError)


async def test_a_kept_connection_that_died_is_told_apart() -> None:
    answers = [OK]

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answers:
            writer.write(answers.pop())
        else:
            writer.close()

    async with client_of(behave) as (client, raw):
        assert await asked(client) == b"ok"
        with pytest.raises(http1.DeadConnectionError):
            await asked(client)
        answers.append(OK)
        assert await asked(client, fresh=True) == b"ok"
        assert raw.connections == 2


async def test_a_connection_that_the_server_closed_meanwhile_is_not_used() -> None:
    async with client_of(says_and_closes(OK)) as (client, raw):
        for count in range(1, 4):
            assert await asked(client) == b"ok"
            assert raw.connections == count
            await asyncio.sleep(0.02)


async def test_connections_are_bounded_and_given_to_those_who_wait() -> None:
    release = asyncio.Event()

    async def behave(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(OK)

    async with client_of(behave, most=3) as (client, raw):
        asking = [asyncio.create_task(asked(client)) for _ in range(10)]
        await eventually(lambda: len(raw.requests) == 3)
        # Those that give up while they wait, or while they are asking, leave their room.
        asking.pop(9).cancel()
        asking.pop(0).cancel()
        with pytest.raises(http1.LateError):
            await client.ask("GET", "/late", {}, within_s=0.05)
        release.set()
        assert await asyncio.gather(*asking) == [b"ok"] * 8
        assert raw.connections == 4
        assert await asyncio.gather(*(asked(client) for _ in range(9))) == [b"ok"] * 9
        assert raw.connections == 4


async def test_time_is_measured_from_each_request() -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        for byte in (b"%d" % number for number in range(9)):
            await asyncio.sleep(0.02)
            writer.write(byte)

    async with client_of(behave) as (client, raw):
        for _ in range(2):
            # Nine silences, none of which is too long, though they are together.
            assert await asked(client, stall_s=0.15) == b"012345678"
        assert raw.connections == 1
        with pytest.raises(http1.StalledError):
            await asked(client, stall_s=0.001)
        response = await client.ask("POST", "/", {}, within_s=0.05)
        with pytest.raises(http1.LateError):
            await response.read(100)
        response.close()


async def test_who_does_not_read_holds_the_server_back() -> None:
    size = 64 * 2**20
    sent = 0

    async def behave(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // 2**16):
            writer.write(b"x" * 2**16)
            await writer.drain()
            sent += 2**16

    async with client_of(behave) as (client, _):
        response = await client.ask("POST", "/", {}, within_s=30.0)
        await eventually(lambda: sent > 0)
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.05)
        assert sent < size // 2
        assert len(await response.read(size)) == size
        response.close()


async def test_a_server_that_is_not_there_is_told() -> None:
    client = http1.HttpServer("http://127.0.0.1:9", most=1, connect_timeout_s=1.0)
    for _ in range(2):
        with pytest.raises(http1.NoConnectionError):
            await client.ask("GET", "/", {}, within_s=5.0)


async def test_over_tls_the_server_must_be_who_it_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    server = await asyncio.start_server(Raw(says(OK)).serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]

    async def ask() -> bytes:
        client = http1.HttpServer(f"https://localhost:{port}", most=1, connect_timeout_s=5.0)
        try:
            return await asked(client)
        finally:
            await client.close()

    try:
        with pytest.raises(http1.NoConnectionError):
            await ask()
        authority.cert_pem.write_to_path(tmp_path / "authority.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        assert await ask() == b"ok"
    finally:
        server.close()
