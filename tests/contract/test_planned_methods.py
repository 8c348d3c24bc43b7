"""Every RPC of the contract is served: by its body, or by saying which feature will bring it."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from support.servers import running

from agent360.client.channel import open_channel
from agent360.client.errors import MeshError, from_rpc_error, from_status
from agent360.mesh.runtime.server import Server
from agent360.mesh.services import NAMES

METADATA = (("x-agent360-tenant", "acme"),)


@pytest.fixture(params=NAMES)
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    settings = {"backends": ()} if request.param == "inference" else {}
    async with running(request.param, **settings) as server:
        yield server


def services(server: Server) -> list[ServiceDescriptor]:
    return [definition.descriptor for definition in server._servicer.definitions]


def planned(server: Server) -> set[str]:
    """Full names of the RPCs without a body."""
    return {
        f"/{definition.descriptor.full_name}/{name}"
        for definition in server._servicer.definitions
        for name in definition.planned
    }


async def asked(channel: grpc.aio.Channel, path: str, method: MethodDescriptor) -> Any:
    """The first answer to an empty request, or the error."""
    request_class = GetMessageClass(method.input_type)
    serializers: dict[str, Any] = {
        "request_serializer": request_class.SerializeToString,
        "response_deserializer": GetMessageClass(method.output_type).FromString,
    }
    try:
        if method.client_streaming:
            call = channel.stream_stream(path, **serializers)(metadata=METADATA, timeout=5)
            await call.done_writing()
            return await call.read()
        if method.server_streaming:
            call = channel.unary_stream(path, **serializers)(
                request_class(), metadata=METADATA, timeout=0.5
            )
            return await call.read()
        rpc = channel.unary_unary(path, **serializers)
        return await rpc(request_class(), metadata=METADATA, timeout=5)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)


async def test_an_rpc_without_a_body_names_its_feature_and_every_other_has_one(
    server: Server,
) -> None:
    async with open_channel(server.address) as channel:
        for service in services(server):
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                found = await asked(channel, path, method)
                unimplemented = (
                    isinstance(found, MeshError) and found.code is grpc.StatusCode.UNIMPLEMENTED
                )
                assert unimplemented is (path in planned(server)), (path, found)
                if unimplemented:
                    assert found.reason == "FEATURE_NOT_IMPLEMENTED"
                    assert found.metadata["feature"]
                    assert found.metadata["feature"] in found.message


async def test_an_item_without_a_body_is_refused_alone(server: Server) -> None:
    async with open_channel(server.address) as channel:
        for service in services(server):
            if "Pipeline" not in service.methods_by_name:
                continue
            method = service.methods_by_name["Pipeline"]
            request_class = GetMessageClass(method.input_type)
            item = method.input_type.fields_by_name["items"].message_type
            fields = [field.name for field in item.oneofs_by_name["operation"].fields]
            rpc: Any = channel.stream_stream(
                f"/{service.full_name}/Pipeline",
                request_serializer=request_class.SerializeToString,
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            call = rpc(timeout=10)
            timeout = {"nanos": 500_000_000}
            request = request_class(context={"tenant": "acme", "timeout": timeout})
            for number, field in enumerate(fields, start=1):
                getattr(request.items.add(id=number), field).SetInParent()
            await call.write(request)
            codes: dict[str, grpc.StatusCode] = {}
            while len(codes) < len(fields):
                for result in (await call.read()).results:
                    error = from_status(result.error) if result.HasField("error") else None
                    codes[fields[result.id - 1]] = error.code if error else grpc.StatusCode.OK
            for field, code in codes.items():
                path = f"/{service.full_name}/{field.title().replace('_', '')}"
                unimplemented = code is grpc.StatusCode.UNIMPLEMENTED
                assert unimplemented is (path in planned(server)), (path, code)
