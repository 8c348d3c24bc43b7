"""TLS: who is proven to whom, and what is said where that fails."""

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.servers import running

from agent360.client import Mesh, Tls, UnavailableError

Authority = tuple[trustme.CA, Path]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority, and the file that says to trust it."""
    return make_authority(tmp_path_factory.mktemp("authority"))


def make_authority(directory: Path) -> Authority:
    made = trustme.CA()
    file = directory / "ca.pem"
    made.cert_pem.write_to_path(file)
    return made, file


def issued(authority: Authority, directory: Path, *names: str) -> dict[str, Path]:
    """Files of a certificate and its key."""
    certificate = authority[0].issue_cert(*names)
    files = {"certificate": directory / f"{names[0]}.pem", "key": directory / f"{names[0]}.key"}
    with files["certificate"].open("wb") as file:
        for pem in certificate.cert_chain_pems:
            file.write(pem.bytes())
    certificate.private_key_pem.write_to_path(files["key"])
    return files


async def served(address: str, tls: Tls | None) -> bool:
    async with Mesh.connect(cache=address, tenant="acme", api_key="", tls=tls) as mesh:
        return (await mesh.cache.set("k", b"v", timeout=5)).stored


async def refused(address: str, tls: Tls | None) -> UnavailableError:
    started = time.monotonic()
    async with Mesh.connect(cache=address, tenant="acme", api_key="", tls=tls) as mesh:
        with pytest.raises(UnavailableError) as caught:
            await mesh.cache.set("k", b"v", timeout=1.0)
    assert time.monotonic() - started < 3.0
    assert address in caught.value.message
    return caught.value


async def test_a_client_that_trusts_the_authority_is_served(
    authority: Authority, tmp_path: Path
) -> None:
    tls = issued(authority, tmp_path, "127.0.0.1")
    async with running("cache", tls=tls) as server:
        assert await served(server.address, Tls(ca=authority[1]))


async def test_a_server_that_is_not_proven_gets_no_call(
    authority: Authority, tmp_path: Path
) -> None:
    files = issued(authority, tmp_path, "127.0.0.1")
    _, other = make_authority(tmp_path)
    plaintext, system = None, Tls()
    another_name = Tls(ca=authority[1], server_name="elsewhere.example")
    async with running("cache", tls=files) as server:
        for tls in (plaintext, system, Tls(ca=other), another_name):
            error = await refused(server.address, tls)
            assert error.reason == "UNREACHABLE"


async def test_a_server_known_by_another_name_is_proven_by_that_name(
    authority: Authority, tmp_path: Path
) -> None:
    files = issued(authority, tmp_path, "cache.mesh.example")
    async with running("cache", tls=files) as server:
        ca = authority[1]
        assert await served(server.address, Tls(ca=ca, server_name="cache.mesh.example"))
        await refused(server.address, Tls(ca=ca))


async def test_where_clients_must_prove_themselves_only_those_of_the_authority_are_served(
    authority: Authority, tmp_path: Path
) -> None:
    files: dict[str, Any] = issued(authority, tmp_path, "127.0.0.1")
    own = issued(authority, tmp_path, "planner.example")
    strange = issued(make_authority(tmp_path), tmp_path, "stranger.example")
    ca = authority[1]
    async with running("cache", tls={**files, "client_ca": ca}) as server:
        assert await served(server.address, Tls(ca=ca, **own))
        await refused(server.address, Tls(ca=ca))
        await refused(server.address, Tls(ca=ca, **strange))


async def test_services_reach_each_other_over_tls(authority: Authority, tmp_path: Path) -> None:
    files = issued(authority, tmp_path, "127.0.0.1")
    (tmp_path / "limits.toml").write_text(
        '[[limits]]\nid = "gets"\nname = "agent360.cache.v1.CacheService/Set"\namount = 1\n'
        'period = "10h"\n'
    )
    async with (
        running("ratelimit", tls=files, limits=tmp_path / "limits.toml") as limiter,
        running(
            "cache",
            tls=files,
            quota={"enabled": True, "when_away": "closed"},
            mesh={"ratelimit": limiter.address, "ca": authority[1]},
        ) as server,
    ):
        assert await served(server.address, Tls(ca=authority[1]))


async def test_the_health_command_asks_over_tls(authority: Authority, tmp_path: Path) -> None:
    from agent360.mesh.cli.prober import probe

    files = issued(authority, tmp_path, "127.0.0.1")
    ask: Callable[..., Awaitable[tuple[str, bool]]] = probe
    async with running("cache", tls=files) as server:
        assert await ask(server.address, ca=authority[1]) == ("SERVING", True)
        status, serving = await ask(server.address)
        assert not serving
        assert "UNAVAILABLE" in status
