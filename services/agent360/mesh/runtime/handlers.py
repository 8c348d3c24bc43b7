"""gRPC handlers made from service definitions and the contract's descriptors."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from agent360.client.errors import unimplemented
from agent360.mesh.runtime.call import Call
from agent360.mesh.runtime.pipeline import Operation, Pipeline, PipelineStream
from agent360.mesh.runtime.policies import Policies
from agent360.mesh.runtime.service import ServiceDefinition
from agent360.mesh.runtime.settings import ServerSettings
from agent360.mesh.runtime.single import current_group, streaming_from_batch, unary_from_batch

_PIPELINE: Final = "Pipeline"


@dataclass(slots=True)
class OpenStreams:
    """The Pipeline streams that are open now."""

    streams: set[PipelineStream] = field(default_factory=set)
    """All of them."""

    def drain(self, reason: str, grace_s: float) -> None:
        """Asks all callers to go on elsewhere."""
        for stream in list(self.streams):
            stream.drain(reason, grace_s)


class HandlerFactory:
    """Makes the handlers of one process."""

    def __init__(
        self, settings: ServerSettings, policies: Policies, log: structlog.stdlib.BoundLogger
    ) -> None:
        self._settings = settings
        self._policies = policies
        self._log = log
        self.open_streams = OpenStreams()
        """Filled while the handlers serve."""

    def generic_handler(self, definition: ServiceDefinition) -> grpc.GenericRpcHandler:
        """All RPCs of one service.

        Raises:
            ValueError: an RPC of the contract has no handler and is not planned.
        """
        handlers = {
            method.name: self._handler(definition, method)
            for method in definition.descriptor.methods
        }
        return grpc.method_handlers_generic_handler(definition.descriptor.full_name, handlers)

    def _handler(self, definition: ServiceDefinition, method: MethodDescriptor) -> Any:
        name = method.name
        request_class = GetMessageClass(method.input_type)
        response_class = GetMessageClass(method.output_type)
        serializers: dict[str, Any] = {
            "request_deserializer": request_class.FromString,
            "response_serializer": response_class.SerializeToString,
        }
        if name in definition.planned:
            behave = _planned(definition.planned[name], method.server_streaming)
        elif name == _PIPELINE:
            behave = self._pipeline(definition, method)
        elif name in definition.batch and method.server_streaming:
            behave = streaming_from_batch(definition.batch[name], response_class)
        elif name in definition.batch:
            behave = unary_from_batch(definition.batch[name], response_class)
        elif name in definition.unary:
            behave = _with_call(definition.unary[name])
        elif name in definition.streaming:
            behave = _streaming_with_call(definition.streaming[name])
        elif name in definition.bidirectional:
            behave = _streaming_with_call(definition.bidirectional[name])
        else:
            raise ValueError(f"{method.full_name} has no handler and is not planned")
        return _ARITIES[method.client_streaming, method.server_streaming](behave, **serializers)

    def _pipeline(
        self, definition: ServiceDefinition, method: MethodDescriptor
    ) -> Callable[[Any, Any], Awaitable[None]]:
        item: Any = method.input_type.fields_by_name["items"].message_type
        result: Any = method.output_type.fields_by_name["results"].message_type
        service = definition.descriptor
        operations = {}
        for operation in item.oneofs_by_name["operation"].fields:
            rpc = camel_case(operation.name)
            operations[operation.name] = Operation(
                operation.name,
                f"/{service.full_name}/{rpc}",
                definition.batch.get(rpc)
                or _planned_batch(definition.planned.get(rpc, operation.name)),
                GetMessageClass(result.fields_by_name[operation.name].message_type),
            )
        settings = self._settings
        pipeline = Pipeline(
            operations=operations,
            response_class=GetMessageClass(method.output_type),
            has_credits="more" in result.fields_by_name,
            policies=self._policies,
            settings=settings.stream,
            compression_min_bytes=settings.compression_min_bytes
            if settings.compression != "none"
            else None,
            log=self._log,
        )
        streams = self.open_streams.streams

        async def behave(_: Any, context: Any) -> None:
            if pipeline.compression_min_bytes is not None:
                context.set_compression(grpc.Compression.Gzip)
            stream = PipelineStream(pipeline, context, current_group.get().call.principal)
            streams.add(stream)
            try:
                await stream.run()
            finally:
                streams.discard(stream)

        return behave


def camel_case(field_name: str) -> str:
    """``return_lease`` -> ``ReturnLease``."""
    return re.sub(r"(?:^|_)(.)", lambda match: match[1].upper(), field_name)


_ARITIES: Final = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _with_call(handler: Callable[[Call, Any], Awaitable[Any]]) -> Callable[[Any, Any], Any]:
    async def behave(request: Any, _: Any) -> Any:
        return await handler(current_group.get().call, request)

    return behave


def _streaming_with_call(
    handler: Callable[[Call, Any], AsyncIterator[Any]],
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def behave(request: Any, _: Any) -> AsyncIterator[Any]:
        async for response in handler(current_group.get().call, request):
            yield response

    return behave


def _planned(feature: str, streaming: bool) -> Callable[[Any, Any], Any]:
    async def unary(_: Any, __: Any) -> Any:
        raise unimplemented(feature)

    async def stream(_: Any, __: Any) -> AsyncIterator[Any]:
        raise unimplemented(feature)
        yield  # makes this a generator

    return stream if streaming else unary


def _planned_batch(feature: str) -> Any:
    async def handler(items: Any, emit: Any) -> None:
        for item in items:
            emit.fail(item, unimplemented(feature))

    return handler
