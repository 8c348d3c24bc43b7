"""Who may call, and on whose behalf."""

import socket
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.raw_streams import RawStream
from support.servers import running
from support.skips import NO_OTHER_ADDRESS

from agent360.cache.v1 import cache_pb2 as pb
from agent360.client import InvalidRequestError, Mesh, MeshError
from agent360.client.channel import open_channel
from agent360.client.errors import from_rpc_error, from_status
from agent360.mesh.cache import CacheServicer, CacheSettings
from agent360.mesh.inference import InferenceSettings
from agent360.mesh.runtime.policies.authentication import hash_key
from agent360.mesh.runtime.server import Server

KEYS = {
    "one": {"tenants": ("acme",)},
    "two": {"tenants": ("acme", "globex")},
    "all": {"tenants": ("*",)},
    "none": {},
}
SETTINGS: dict[str, Any] = {
    "authentication": {
        "keys": [
            {"name": name, "sha256": hash_key(f"key-{name}"), **rights}
            for name, rights in KEYS.items()
        ]
    }
}


async def refused(address: str, key: str, tenant: str = "") -> MeshError:
    async with Mesh.connect(cache=address, tenant=tenant, api_key=key) as mesh:
        with pytest.raises(MeshError) as caught:
            await mesh.cache.get("k")
    return caught.value


async def unary(channel: grpc.aio.Channel, *metadata: tuple[str, str]) -> Any:
    rpc = channel.unary_unary(
        "/agent360.cache.v1.CacheService/Get",
        request_serializer=pb.GetRequest.SerializeToString,
        response_deserializer=pb.GetResponse.FromString,
    )
    try:
        return await rpc(pb.GetRequest(namespace="n", key="k"), metadata=metadata)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


async def test_a_key_speaks_for_the_tenants_it_is_bound_to() -> None:
    async with running("cache", **SETTINGS) as server:
        for key, tenant in (
            ("key-one", ""),
            ("key-one", "acme"),
            ("key-two", "globex"),
            ("key-all", "initech"),
        ):
            async with Mesh.connect(cache=server.address, tenant=tenant, api_key=key) as mesh:
                assert not (await mesh.cache.get("k")).hit


@pytest.mark.parametrize("key", ["key-one", "key-two", "key-none"])
async def test_a_key_speaks_for_no_other_tenant(key: str) -> None:
    async with running("cache", **SETTINGS) as server:
        error = await refused(server.address, key, "initech")
        assert (error.code, error.reason) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "TENANT_NOT_ALLOWED",
        )
        assert "initech" in error.message
        assert error.metadata["tenant"] == "initech"


@pytest.mark.parametrize(
    ("key", "reason"), [("", "API_KEY_MISSING"), ("key-unknown", "API_KEY_UNKNOWN")]
)
async def test_who_shows_no_known_key_is_refused_promptly(key: str, reason: str) -> None:
    async with running("cache", **SETTINGS) as server:
        error = await refused(server.address, key, "acme")
        assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)
        assert "key-" not in error.message, "a key is never repeated"


async def test_a_unary_call_is_authenticated_like_an_item() -> None:
    async with running("cache", **SETTINGS) as server, open_channel(server.address) as channel:
        answer = await unary(channel, ("authorization", "Bearer key-one"))
        assert answer.lookup.outcome == pb.OUTCOME_MISS
        await unary(channel, ("authorization", "bearer key-one"), ("x-agent360-tenant", "acme"))
        for metadata, reason in (
            ((), "API_KEY_MISSING"),
            ((("authorization", "Basic a2V5"),), "API_KEY_MALFORMED"),
            ((("authorization", "Bearer key-unknown"),), "API_KEY_UNKNOWN"),
        ):
            with pytest.raises(MeshError) as caught:
                await unary(channel, *metadata)
            assert caught.value.reason == reason


async def test_an_item_that_names_anothers_tenant_is_refused_and_its_neighbours_are_answered() -> (
    None
):
    async with running("cache", **SETTINGS) as server, open_channel(server.address) as channel:
        rpc: Any = channel.stream_stream(
            "/agent360.cache.v1.CacheService/Pipeline",
            request_serializer=pb.PipelineRequest.SerializeToString,
            response_deserializer=pb.PipelineResponse.FromString,
        )
        call = rpc(metadata=(("authorization", "Bearer key-one"),))
        request = {"namespace": "n", "key": "k"}
        items = [
            {"id": 1, "get": request},
            {"id": 2, "get": request, "context": {"tenant": "globex"}},
            {"id": 3, "get": request, "context": {"tenant": "acme"}},
        ]
        await call.write(pb.PipelineRequest(items=items))
        found: dict[int, Any] = {}
        while len(found) < 3:
            found |= {result.id: result for result in (await call.read()).results}
        assert from_status(found[2].error).reason == "TENANT_NOT_ALLOWED"
        assert not found[1].HasField("error")
        assert not found[3].HasField("error")


@pytest.mark.parametrize("tenant", ["", "Acme", "a" * 64, "-acme", "a/b", "ä", "a b"])
async def test_a_missing_or_malformed_tenant_is_named_with_the_rule(tenant: str) -> None:
    async with running("cache") as server, open_channel(server.address) as channel:
        stream = await RawStream.opened(
            channel,
            items=[{"id": 1, "get": {"namespace": "n", "key": "k"}}],
            context={"tenant": tenant},
        )
        await stream.read_until_answered(1)
        error = from_status(stream.final(1).error)
        assert isinstance(error, InvalidRequestError)
        assert [each.field for each in error.violations] == ["context.tenant"]
        assert "[a-z0-9][a-z0-9-]{0,62}" in error.violations[0].description
        if tenant.isascii():
            with pytest.raises(InvalidRequestError) as caught:
                await unary(channel, ("x-agent360-tenant", tenant))
            assert caught.value.violations[0].field == "metadata x-agent360-tenant"


async def test_what_a_key_of_one_tenant_measures_is_that_tenants() -> None:
    async with (
        running("metrics", **SETTINGS) as server,
        Mesh.connect(metrics=server.address, api_key="key-one") as mesh,
    ):
        mesh.metrics.count("plans", 3)
        await mesh.metrics.flush()
        assert [each.name async for each in mesh.metrics.list_series("plans")] == ["plans"]


async def test_a_key_of_several_tenants_must_say_which_it_means() -> None:
    async with running("cache", **SETTINGS) as server:
        error = await refused(server.address, "key-two")
        assert isinstance(error, InvalidRequestError)
        assert "is missing" in error.violations[0].description


@pytest.mark.parametrize(
    ("key", "tenant", "reason"),
    [
        ("key-one", "acme", ""),
        ("key-one", "", ""),
        ("key-one", "globex", "TENANT_NOT_ALLOWED"),
        ("key-two", "", "INVALID_REQUEST"),
        ("key-unknown", "acme", "API_KEY_UNKNOWN"),
    ],
)
async def test_a_watch_shows_nobody_anothers_changes(key: str, tenant: str, reason: str) -> None:
    async with running("cache", **SETTINGS) as server, open_channel(server.address) as channel:
        rpc = channel.unary_stream(
            "/agent360.cache.v1.CacheService/Watch",
            request_serializer=pb.WatchRequest.SerializeToString,
            response_deserializer=pb.WatchResponse.FromString,
        )
        metadata = [("authorization", f"Bearer {key}")]
        if tenant:
            metadata.append(("x-agent360-tenant", tenant))
        call = rpc(pb.WatchRequest(), metadata=metadata, timeout=10)
        if not reason:
            assert await call.read() is not grpc.aio.EOF
            return
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert from_rpc_error(caught.value).reason == reason


async def test_where_tenants_are_known_others_are_refused() -> None:
    tenants = {"strict": True, "known": ("acme",)}
    async with running("cache", tenants=tenants) as server:
        async with Mesh.connect(cache=server.address, tenant="acme", api_key="") as mesh:
            await mesh.cache.get("k")
        error = await refused(server.address, "", "globex")
        assert (error.code, error.reason) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "TENANT_UNKNOWN",
        )


async def test_a_reserved_tenant_is_for_services_and_operators_alone() -> None:
    keys = [
        {"name": "everyone's", "sha256": hash_key("key-all"), "tenants": ("*",)},
        {"name": "gateway", "sha256": hash_key("key-mesh"), "tenants": ("*",), "service": True},
        {"name": "operator", "sha256": hash_key("key-admin"), "tenants": ("*",), "admin": True},
    ]
    async with running("cache", authentication={"keys": keys}) as server:
        error = await refused(server.address, "key-all", "shared-answers")
        assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "TENANT_RESERVED")
        for key in ("key-mesh", "key-admin"):
            async with Mesh.connect(
                cache=server.address, tenant="shared-answers", api_key=key
            ) as mesh:
                assert not (await mesh.cache.get("k")).hit


@pytest.mark.parametrize(
    ("kind", "more", "tenant"),
    [
        (CacheSettings, {}, "shared-answers"),
        (CacheSettings, {"tenants": {"reserved": ("common",)}}, "common"),
        (InferenceSettings, {"cache": {"shared_tenant": "common"}}, "common"),
    ],
)
def test_no_key_can_be_bound_to_a_reserved_tenant(kind: Any, more: Any, tenant: str) -> None:
    key = {"name": "app", "sha256": hash_key("k"), "tenants": ("acme", tenant)}
    with pytest.raises(ValueError, match=f"app is bound to {tenant}, which "):
        kind.model_validate({"authentication": {"keys": [key]}, **more})
    own = {**key, "service": True}
    assert kind.model_validate({"authentication": {"keys": [own]}, **more})


async def test_health_is_told_to_everyone_and_channelz_to_callers_on_the_machine() -> None:
    async with running("cache", **SETTINGS) as server, open_channel(server.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        channelz: Any = channelz_pb2_grpc.ChannelzStub(channel)
        servers = await channelz.GetServers(channelz_pb2.GetServersRequest())
        assert len(servers.server) >= 1


async def test_reflection_is_told_to_everyone() -> None:
    async with running("cache", **SETTINGS) as server, open_channel(server.address) as channel:
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = [each async for each in reflection.ServerReflectionInfo(iter([request]))]
        names = {each.name for each in answer.list_services_response.service}
        assert "agent360.cache.v1.CacheService" in names


async def test_the_meshs_own_key_speaks_for_every_tenant() -> None:
    async with running("cache", mesh={"api_key": "key-mesh"}, **SETTINGS) as server:
        for tenant in ("acme", "initech"):
            async with Mesh.connect(
                cache=server.address, tenant=tenant, api_key="key-mesh"
            ) as mesh:
                assert not (await mesh.cache.get("k")).hit


def own_address() -> str:
    """This machine's address beyond loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip(NO_OTHER_ADDRESS)
        host = str(probe.getsockname()[0])
    if host.startswith("127."):
        pytest.skip(NO_OTHER_ADDRESS)
    return host


async def test_beyond_the_machine_channelz_is_told_to_admins_alone() -> None:
    operator = {"name": "operator", "sha256": hash_key("key-operator"), "admin": True}
    keys = [*SETTINGS["authentication"]["keys"], operator]
    async with (
        running("cache", host="0.0.0.0", insecure=True, authentication={"keys": keys}) as server,
        open_channel(f"{own_address()}:{server.port}") as channel,
    ):
        channelz: Any = channelz_pb2_grpc.ChannelzStub(channel)
        request = channelz_pb2.GetServersRequest()
        for key, code, reason in (
            ("key-operator", grpc.StatusCode.OK, ""),
            ("key-all", grpc.StatusCode.PERMISSION_DENIED, "ADMIN_ONLY"),
            ("key-unknown", grpc.StatusCode.UNAUTHENTICATED, "API_KEY_UNKNOWN"),
            ("", grpc.StatusCode.UNAUTHENTICATED, "API_KEY_MISSING"),
        ):
            metadata = (("authorization", f"Bearer {key}"),) if key else ()
            call = channelz.GetServers(request, metadata=metadata)
            assert await call.code() is code
            if reason:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert from_rpc_error(caught.value).reason == reason
            else:
                assert len((await call).server) >= 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_beyond_loopback_nobody_is_served_without_tls_and_keys(host: str) -> None:
    with pytest.raises(ValueError, match=r"tls\.certificate.*authentication\.keys"):
        Server(CacheSettings(host=host), CacheServicer)
    keys = SETTINGS["authentication"]
    with pytest.raises(ValueError, match=r"without tls\.certificate and tls\.key;"):
        Server(CacheSettings.model_validate({"host": host, "authentication": keys}), CacheServicer)
    Server(CacheSettings(host=host, insecure=True), CacheServicer)
