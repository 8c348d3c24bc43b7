"""The HTTP front beside everything that is not its API: stopping, TLS, policies, bad bytes."""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import trustme
import yarl
from support.openai_front import base_url, fronted, sdk
from support.polling import eventually, eventually_async
from support.servers import running

from agent360.client import Mesh
from agent360.mesh.inference import InferenceServicer, InferenceSettings
from agent360.mesh.runtime.server import Server
from agent360.mesh.simulator import Simulator, SimulatorSettings

HELLO: list[Any] = [{"role": "user", "content": "Name three rivers"}]
METHOD = "/agent360.inference.v1.InferenceService"


def asking(content: str) -> list[Any]:
    return [{"role": "user", "content": content}]


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    settings = SimulatorSettings(port=0, first_token_s=0.005, inter_token_s=0.0)
    async with Simulator(settings) as started:
        yield started


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


async def posted(
    session: aiohttp.ClientSession, server: Server, body: Any, **more: Any
) -> tuple[int, dict[str, Any], Any]:
    """Status, body and headers of a chat request, whatever its body is."""
    headers = {"content-type": "application/json", **more.pop("headers", {})}
    url = base_url(server) + "/chat/completions"
    async with session.post(url, data=body, headers=headers, **more) as answer:
        return answer.status, json.loads(await answer.read()), answer.headers


# -------------------------------------------------------------------- stopping


async def test_a_stop_lets_streams_end_and_refuses_new_requests(simulator: Simulator) -> None:
    async with fronted(simulator, grace_s=20.0) as server, sdk(server) as client:
        ask = asking("[[sim:tokens=60]][[sim:itl=0.01]] go on")
        stream = await client.chat.completions.create(model="small", messages=ask, stream=True)
        pieces = aiter(stream)
        await anext(pieces)
        stopping = asyncio.create_task(server.stop())
        await eventually(lambda: not server.ready)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="small", messages=HELLO)
        assert (caught.value.status_code, caught.value.code) == (503, "stopping")
        assert caught.value.response.headers["connection"] == "close"
        rest = [chunk async for chunk in pieces]
        assert rest[-1].choices[0].finish_reason == "stop"
        await stopping


async def test_the_end_of_the_grace_period_is_told_to_streams_that_go_on(
    simulator: Simulator,
) -> None:
    async with fronted(simulator, grace_s=0.2) as server, sdk(server) as client:
        ask = asking("[[sim:tokens=5000]][[sim:itl=0.01]] go on")
        stream = await client.chat.completions.create(model="small", messages=ask, stream=True)
        pieces = aiter(stream)
        await anext(pieces)
        began = time.monotonic()
        stopping = asyncio.create_task(server.stop())

        async def hear_all() -> None:
            async for _ in pieces:
                pass

        with pytest.raises(openai.APIError, match="stopping"):
            await hear_all()
        await stopping
        assert time.monotonic() - began < 5.0


async def test_requests_before_a_backend_answers_are_told_to_come_back(
    session: aiohttp.ClientSession,
) -> None:
    async with Simulator(SimulatorSettings(port=0)) as probe:
        url = probe.url
    settings = {"ephemeral_ports": True, "grace_s": 0.1, "backends": [{"url": url}]}
    server = Server(InferenceSettings.model_validate(settings), InferenceServicer)
    starting = asyncio.create_task(server.start())
    await eventually(lambda: server.http_port)
    body = json.dumps({"model": "small", "messages": HELLO})
    status, said, headers = await posted(session, server, body)
    assert (status, said["error"]["code"]) == (503, "starting")
    assert headers["retry-after"] == "1"
    starting.cancel()
    await asyncio.wait((starting,))
    await server.stop()


# -------------------------------------------------------------------- TLS


def issued(authority: trustme.CA, directory: Path) -> dict[str, Path]:
    """Files of a certificate of this host and its key."""
    certificate = authority.issue_cert("127.0.0.1")
    files = {"certificate": directory / "host.pem", "key": directory / "host.key"}
    certificate.cert_chain_pems[0].write_to_path(files["certificate"])
    certificate.private_key_pem.write_to_path(files["key"])
    return files


async def test_where_the_service_has_certificates_the_front_speaks_tls(
    simulator: Simulator, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    authority = trustme.CA()
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with fronted(simulator, tls=issued(authority, tmp_path)) as server:
        url = base_url(server, "https")
        async with session.get(f"{url}/models", ssl=trusting) as answer:
            assert len((await answer.json())["data"]) == 3
        with pytest.raises(aiohttp.ClientError):
            await session.get(f"{base_url(server)}/models")


async def test_client_certificates_are_asked_of_callers_but_not_of_probes(
    simulator: Simulator, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = {**issued(authority, tmp_path), "client_ca": tmp_path / "ca.pem"}
    stranger = ssl.create_default_context()
    authority.configure_trust(stranger)
    known = ssl.create_default_context()
    authority.configure_trust(known)
    authority.issue_cert("caller.example").configure_cert(known)
    async with fronted(simulator, tls=tls) as server:
        url = base_url(server, "https")
        async with session.get(url.replace("/v1", "/readyz"), ssl=stranger) as answer:
            assert answer.status == 200
        async with session.get(f"{url}/models", ssl=stranger) as answer:
            assert answer.status == 401
            assert (await answer.json())["error"]["code"] == "certificate_missing"
        async with session.get(f"{url}/models", ssl=known) as answer:
            assert answer.status == 200


# -------------------------------------------------------------------- policies


async def test_requests_count_as_calls_of_the_rpcs_they_stand_for(
    simulator: Simulator, session: aiohttp.ClientSession
) -> None:
    async with fronted(simulator) as server, sdk(server) as client:
        await client.chat.completions.create(model="small", messages=HELLO)
        stream = await client.chat.completions.create(model="small", messages=HELLO, stream=True)
        assert [chunk async for chunk in stream]
        await client.embeddings.create(model="embedder", input="text")
        assert (await posted(session, server, b"nonsense"))[0] == 400
        async with session.get(base_url(server).replace("/v1", "/metrics")) as answer:
            text = await answer.text()
    handled = [line for line in text.splitlines() if line.startswith("grpc_server_handled_total{")]

    def count(method: str, code: str) -> float:
        return sum(
            float(line.rpartition(" ")[2])
            for line in handled
            if f'grpc_method="{method}"' in line and f'grpc_code="{code}"' in line
        )

    assert count("Generate", "OK") == 1
    assert count("StreamGenerate", "OK") == 1
    assert count("Embed", "OK") == 1
    assert count("Generate", "InvalidArgument") == 1


async def test_the_quota_policy_is_asked_by_the_name_of_the_rpc(
    simulator: Simulator, tmp_path: Path
) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text(
        f'[[limits]]\nid = "one"\nname = "{METHOD[1:]}/Generate"\namount = 1\nperiod = "1h"\n'
    )
    async with (
        running("ratelimit", limits=limits) as limiter,
        fronted(
            simulator,
            quota={"enabled": True, "timeout_s": 5, "when_away": "closed"},
            mesh={"ratelimit": limiter.address},
        ) as server,
        sdk(server) as client,
    ):
        await client.chat.completions.create(model="small", messages=HELLO)
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model="small", messages=HELLO)


async def test_a_request_is_named_by_its_caller_or_by_the_service(
    simulator: Simulator, session: aiohttp.ClientSession, capsys: pytest.CaptureFixture[str]
) -> None:
    body = json.dumps({"model": "small", "messages": HELLO})
    async with fronted(simulator, log={"access": "all"}) as server:
        given = {"x-request-id": "step-7"}
        assert (await posted(session, server, body, headers=given))[2]["x-request-id"] == "step-7"
        odd = {"x-request-id": "x" * 500}
        assert len((await posted(session, server, body, headers=odd))[2]["x-request-id"]) == 36
        bad = {"x-agent360-tenant": "Über"}
        assert (await posted(session, server, body, headers=bad))[0] == 400
    assert "step-7" in capsys.readouterr().out


async def test_a_caller_that_hangs_up_is_charged_for_what_was_said_alone(
    simulator: Simulator, tmp_path: Path
) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text(
        '[[limits]]\nid = "tokens"\nname = "inference.tokens"\namount = 100_000\nperiod = "1h"\n'
    )
    async with (
        running("ratelimit", limits=limits) as limiter,
        fronted(
            simulator,
            limits={"enabled": True, "timeout_s": 5},
            mesh={"ratelimit": limiter.address},
        ) as server,
        sdk(server) as client,
        Mesh.connect(ratelimit=limiter.address, tenant="default", api_key="") as mesh,
    ):
        stream = await client.chat.completions.create(
            model="small",
            messages=asking("[[sim:itl=0.01]][[sim:tokens=5000]] go on"),
            max_tokens=5_000,
            stream=True,
        )
        async for _ in stream:
            break
        assert (await mesh.ratelimit.get_usage("tokens")).used > 5_000
        await stream.close()

        async def settled() -> bool:
            return 0 < (await mesh.ratelimit.get_usage("tokens")).used < 500

        await eventually_async(settled)


# -------------------------------------------------------------------- bad bytes


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'{"model": "small"',
        b'{"model": "small", "messages": "Hi"}',
        b'{"model": "small", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "\xff", "messages": []}',
        b'{"model": "small", "messages": [{"role": "user", "content": 7}]}',
        b'{"model": "small", "messages": [], "seed": 1e400}',
        b"[" * 100_000,
        b"\x00" * 1_000,
    ],
)
async def test_whatever_is_sent_is_answered_with_400(
    simulator: Simulator, session: aiohttp.ClientSession, body: bytes
) -> None:
    async with fronted(simulator) as server:
        status, said, _ = await posted(session, server, body)
    assert (status, said["error"]["type"]) == (400, "invalid_request_error")
    assert said["error"]["message"]


async def test_a_page_in_a_browser_cannot_spend_anything(
    simulator: Simulator, session: aiohttp.ClientSession
) -> None:
    body = json.dumps({"model": "small", "messages": HELLO})
    async with fronted(simulator) as server:
        simple = {"content-type": "text/plain", "origin": "https://evil.example"}
        status, said, _ = await posted(session, server, body, headers=simple)
        async with session.options(base_url(server) + "/chat/completions") as asking_first:
            await asking_first.read()
    assert (status, said["error"]["param"]) == (400, "header content-type")
    assert not [name for name in asking_first.headers if name.lower().startswith("access-control")]
    assert simulator.load.by_path["/v1/chat/completions"] == 0


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_body_that_is_not_encoded_as_it_says_is_refused(
    simulator: Simulator,
    session: aiohttp.ClientSession,
    caplog: pytest.LogCaptureFixture,
    encoding: str,
) -> None:
    body = json.dumps({"model": "small", "messages": HELLO})
    async with fronted(simulator) as server:
        status, said, headers = await posted(
            session, server, body, headers={"content-encoding": encoding}
        )
        assert (status, said["error"]["param"]) == (400, "body")
        assert headers["connection"] == "close"
        assert (await posted(session, server, body))[0] == 200
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


@pytest.mark.parametrize("place", ["tools", "response_format"])
async def test_a_number_that_no_protocol_carries_is_the_callers_mistake(
    simulator: Simulator, session: aiohttp.ClientSession, place: str
) -> None:
    schema = {"type": "object", "maximum": 10**400}
    asked = {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": schema}},
    }
    body = json.dumps({"model": "small", "messages": HELLO, place: asked[place]})
    async with fronted(simulator) as server:
        status, said, _ = await posted(session, server, body)
    assert status == 400
    assert said["error"]["param"].startswith(place)


@pytest.mark.parametrize("name", ["%ff", "%ED%A0%80", "a%00b", "..%2f..", "x" * 5_000])
async def test_odd_names_of_models_are_not_found_or_refused(
    simulator: Simulator, session: aiohttp.ClientSession, name: str
) -> None:
    async with fronted(simulator) as server:
        url = yarl.URL(f"{base_url(server)}/models/{name}", encoded=True)
        async with session.get(url) as answer:
            assert answer.status in {400, 404}
            assert (await answer.json())["error"]["message"]


async def test_a_body_that_does_not_arrive_is_not_waited_for(simulator: Simulator) -> None:
    async with fronted(simulator, front={"body_timeout_s": 0.2}) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: mesh\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        async with asyncio.timeout(5):
            status = await reader.readline()
        writer.close()
    assert status.split()[1] == b"504"


async def test_a_reader_that_stops_reading_holds_up_nobody_and_is_let_go(
    simulator: Simulator,
) -> None:
    async with (
        fronted(simulator, deadline={"default_s": 1.0}, grace_s=0.2) as server,
        sdk(server) as client,
    ):
        ask = "[[sim:tokens=90000]] go on"
        body = json.dumps({"model": "small", "messages": asking(ask), "stream": True}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", server.http_port, limit=2**10)
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: mesh\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        writer.write(head % len(body) + body)
        await eventually(lambda: simulator.load.running == 1)
        answers = await asyncio.gather(
            *(client.chat.completions.create(model="small", messages=HELLO) for _ in range(20))
        )
        assert all(answer.choices[0].message.content for answer in answers)
        await eventually(lambda: simulator.load.running == 0)
        writer.close()


async def test_it_can_be_switched_off(simulator: Simulator, session: aiohttp.ClientSession) -> None:
    async with fronted(simulator, front={"enabled": False}) as server:
        async with session.get(base_url(server) + "/models") as answer:
            assert answer.status == 404
        async with session.get(base_url(server).replace("/v1", "/healthz")) as answer:
            assert answer.status == 200
