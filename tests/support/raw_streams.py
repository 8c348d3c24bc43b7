"""Pipeline streams as a stranger drives them: no client library, only stubs."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Self

import grpc

from agent360.cache.v1 import cache_pb2
from agent360.client.errors import MeshError, from_rpc_error
from agent360.inference.v1 import inference_pb2

CACHE = ("agent360.cache.v1.CacheService", cache_pb2)
INFERENCE = ("agent360.inference.v1.InferenceService", inference_pb2)
ACME = {"tenant": "acme"}


class RawStream:
    """One Pipeline stream. What is read is collected by id.

    Attributes:
        call: the open call.
        results: results by id, in the order they came; a streamed answer has several.
        drain: the notice to open a new stream, once it has come.
    """

    def __init__(self, channel: grpc.aio.Channel, service: tuple[str, Any] = CACHE) -> None:
        """Opens a stream.

        Args:
            channel: to the service.
            service: full name and messages of the service.
        """
        name, self._messages = service
        rpc: Any = channel.stream_stream(
            f"/{name}/Pipeline",
            request_serializer=self._messages.PipelineRequest.SerializeToString,
            response_deserializer=self._messages.PipelineResponse.FromString,
        )
        self.call = rpc()
        self.results: dict[int, list[Any]] = {}
        self.drain: Any = None

    @classmethod
    async def opened(
        cls, channel: grpc.aio.Channel, service: tuple[str, Any] = CACHE, **content: Any
    ) -> Self:
        """Opens a stream and sends its first message."""
        stream = cls(channel, service)
        await stream.send(**content)
        return stream

    async def send(self, **content: Any) -> None:
        """Sends one PipelineRequest."""
        await self.call.write(self._messages.PipelineRequest(**content))

    async def read(self) -> bool:
        """Reads one message; returns whether there was one."""
        message = await self.call.read()
        if message is grpc.aio.EOF:
            return False
        if message.HasField("drain"):
            self.drain = message.drain
        for result in message.results:
            self.results.setdefault(result.id, []).append(result)
        return True

    async def read_until_answered(self, *ids: int) -> None:
        """Reads until all these ids have their final answer."""
        while not all(self.final(each) is not None for each in ids):
            assert await self.read(), "the stream ended before everything was answered"

    async def read_to_the_end(self) -> MeshError | None:
        """Reads until the stream ends; returns the error it ended with, if any."""
        try:
            while await self.read():
                pass
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)
        return None

    def final(self, item_id: int) -> Any:
        """The final answer of an id; None if it has not come."""
        found = self.results.get(item_id)
        return found[-1] if found and not getattr(found[-1], "more", False) else None

    def chunks(self, item_id: int) -> int:
        """Pieces of a streamed answer that have come, without the final one."""
        return sum(result.more for result in self.results.get(item_id, ()))

    def answers(self) -> Counter[int]:
        """How often each id has been answered finally."""
        return Counter(
            {
                item_id: sum(not getattr(result, "more", False) for result in found)
                for item_id, found in self.results.items()
            }
        )


class Reading:
    """Reads a stream in the background for as long as it is entered."""

    def __init__(self, stream: RawStream) -> None:
        self._stream = stream

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._stream.read_to_the_end())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait((self._task,))
