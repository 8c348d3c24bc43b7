"""The client of the inference service."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Final

from msgspec import Struct

from agent360.client.chat import (
    Answer,
    GenerateRequest,
    TokenLogprob,
    fill_request,
    read_answer,
    read_logprobs,
    size_of_request,
)
from agent360.client.coalescer import Coalescer, Wire
from agent360.client.context import current_scope
from agent360.client.errors import MeshError, from_status
from agent360.client.many import Results
from agent360.client.operation import Facts, SingleOperation
from agent360.inference.v1 import inference_pb2

WIRE: Final = Wire(
    "agent360.inference.v1.InferenceService",
    inference_pb2.PipelineRequest,
    inference_pb2.PipelineItem,
    inference_pb2.PipelineResponse,
    inference_pb2.PipelineResult,
)

DEFAULT_TIMEOUT_S: Final = 120.0
"""Timeout of a generation that names none."""

_CREDITS: Final = 64
"""Pieces of a streamed answer that may be on their way before the reader has taken them."""


class Delta(Struct, frozen=True, gc=False):
    """A piece of an answer."""

    text: str
    """Text to append."""
    tool_calls: tuple[inference_pb2.ToolCallDelta, ...] = ()
    """Pieces of tool calls."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """How probable the tokens of this piece were, where that was asked for and is known."""
    reasoning: str = ""
    """Text to append to what the model thought before it answered."""


class Embeddings(Struct, frozen=True, gc=False):
    """Vectors, in the order of the texts."""

    vectors: tuple[tuple[float, ...], ...]
    """One for each text."""
    input_tokens: int
    """Tokens used."""
    model: str
    """The model that answered."""


class TokenCount(Struct, frozen=True, gc=False):
    """The number of tokens of a prompt."""

    input_tokens: int
    """Tokens of the prompt."""
    estimated: bool
    """True if the model's own tokenizer was not at hand."""
    tokenizer: str = ""
    """What counted: ``tokenizer``, ``backend`` or, for an estimate from the length, ``bytes``."""


class AnswerStream:
    """A streamed answer: iterate over its pieces; ``answer`` holds the whole afterwards.

    Leaving the iteration early withdraws the request.

    Example:
        >>> stream = mesh.inference.stream("Tell me a story.")
        >>> async for delta in stream:
        ...     print(delta.text, end="")
        >>> stream.answer.usage.output_tokens
    """

    def __init__(
        self,
        coalescer: Coalescer,
        request: GenerateRequest,
        timeout: float | None,
        tenant: str | None,
    ) -> None:
        self._coalescer = coalescer
        self._request = request
        self._timeout = timeout
        self._tenant = tenant
        self._answer: Answer | None = None
        self.batch_size = 0
        """Requests that went out in one message with this one, itself included; 0 before."""

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            RuntimeError: the stream has not been read to its end.
        """
        if self._answer is None:
            raise RuntimeError("read the stream to its end first")
        return self._answer

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Yields the pieces as they come.

        Raises:
            MeshError: generation failed; what was yielded before stands.
        """
        coalescer = self._coalescer
        operation = _StreamGenerate(self._request)
        coalescer.prepare(operation, self._timeout, self._tenant)
        await coalescer.take_turn(operation.deadline, 1)
        pieces: list[str] = []
        thoughts: list[str] = []
        logprobs: list[TokenLogprob] = []
        taken = 0
        try:
            coalescer.dispatch(operation)
            while (event := await operation.next_event()) is not None:
                if isinstance(event, MeshError):
                    raise event
                pieces.append(event.text)
                if event.logprobs:
                    logprobs += event.logprobs
                if event.reasoning:
                    thoughts.append(event.reasoning)
                taken += 1
                if taken % (_CREDITS // 2) == 0:
                    coalescer.give_credit(operation, operation.item_id, _CREDITS // 2)
                yield event
            self._answer = read_answer(
                operation.final, "".join(pieces), logprobs, "".join(thoughts)
            )
        finally:
            self.batch_size = operation.batch_size
            if not operation.ended:
                operation.close()
                coalescer.withdraw(operation)
            coalescer.note_ended(1)


class InferenceClient:
    """Generates text and embeddings.

    Example:
        >>> answer = await mesh.inference.generate("Name three rivers.", max_tokens=50)
        >>> answer.text
    """

    def __init__(self, coalescer: Coalescer) -> None:
        self._coalescer = coalescer

    async def generate(
        self,
        request: GenerateRequest | str,
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Answer:
        """Generates one answer and returns it whole.

        Args:
            request: what to answer; a text stands for one message of the user.
            model: name of a model; only with a text.
            max_tokens: most tokens to generate; only with a text.
            timeout: seconds; None: what remains in the current scope, or 120.
            tenant: on whose behalf; None: that of the current scope, or the Mesh's.

        Raises:
            MeshError: a limit denied it, the model failed, or the service could not be reached.
        """
        operation = _Generate(_request_of(request, model, max_tokens))
        return await self._coalescer.call(operation, _timeout(timeout), tenant)

    def stream(
        self,
        request: GenerateRequest | str,
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AnswerStream:
        """Generates one answer in pieces; see ``AnswerStream``; arguments as in ``generate``."""
        whole = _request_of(request, model, max_tokens)
        return AnswerStream(self._coalescer, whole, _timeout(timeout), tenant)

    def generate_many(
        self,
        requests: Iterable[GenerateRequest | str],
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Results[Answer]:
        """Generates many answers; see ``Results``."""
        return Results(
            self._coalescer,
            "generate",
            (_request_of(each, None, None) for each in requests),
            fill=fill_request,
            read=read_answer,
            size=size_of_request,
            timeout=_timeout(timeout),
            tenant=tenant,
        )

    async def embed(
        self,
        inputs: Sequence[str],
        *,
        model: str,
        dimensions: int = 0,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Embeddings:
        """Turns texts into vectors.

        Args:
            inputs: 1 to 1,000 texts.
            model: name of an embedding model.
            dimensions: length of the vectors, where the model can choose; 0: its own.
            timeout: as in ``generate``.
            tenant: as in ``generate``.
        """
        operation = _Embed(inputs, model, dimensions)
        return await self._coalescer.call(operation, _timeout(timeout), tenant)

    async def count_tokens(
        self,
        request: GenerateRequest | str,
        *,
        model: str | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> TokenCount:
        """Counts the tokens of a request without running it."""
        operation = _CountTokens(_request_of(request, model, None))
        return await self._coalescer.call(operation, timeout, tenant)

    async def list_models(
        self,
        *,
        page_size: int = 0,
        fields: Sequence[str] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[inference_pb2.Model]:
        """Yields the models that the tenant may use, in the order of their names."""
        request = inference_pb2.ListModelsRequest(page_size=page_size)
        request.read_mask.paths.extend(fields)
        while True:
            page = await self._coalescer.unary(
                "ListModels", request, inference_pb2.ListModelsResponse, timeout, tenant
            )
            for model in page.models:
                yield model
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def get_model(
        self, name: str, *, timeout: float | None = None, tenant: str | None = None
    ) -> inference_pb2.Model:
        """Reads one model."""
        request = inference_pb2.GetModelRequest(name=name)
        response = await self._coalescer.unary(
            "GetModel", request, inference_pb2.GetModelResponse, timeout, tenant
        )
        model: inference_pb2.Model = response.model
        return model


class _Generate(SingleOperation[Answer]):
    __slots__ = ("request",)
    field = "generate"

    def __init__(self, request: GenerateRequest) -> None:
        super().__init__(size_of_request(request))
        self.request = request

    def fill(self, request: Any) -> None:
        fill_request(request, self.request)

    def read(self, response: Any) -> Answer:
        return read_answer(response)


class _CountTokens(SingleOperation[TokenCount]):
    __slots__ = ("request",)
    field = "count_tokens"

    def __init__(self, request: GenerateRequest) -> None:
        super().__init__(size_of_request(request))
        self.request = request

    def fill(self, request: Any) -> None:
        fill_request(request.request, self.request)

    def read(self, response: Any) -> TokenCount:
        return TokenCount(response.input_tokens, response.estimated, response.tokenizer)


class _Embed(SingleOperation[Embeddings]):
    __slots__ = ("dimensions", "inputs", "model")
    field = "embed"

    def __init__(self, inputs: Sequence[str], model: str, dimensions: int) -> None:
        super().__init__(sum(map(len, inputs)) + 64)
        self.inputs = inputs
        self.model = model
        self.dimensions = dimensions

    def fill(self, request: Any) -> None:
        request.model = self.model
        request.inputs.extend(self.inputs)
        if self.dimensions:
            request.dimensions = self.dimensions

    def read(self, response: Any) -> Embeddings:
        vectors = tuple(tuple(each.values) for each in response.embeddings)
        return Embeddings(vectors, response.usage.input_tokens, response.routing.model)


class _StreamGenerate:
    """A streamed answer as an operation: events queue up until the reader takes them."""

    __slots__ = (
        "_closed",
        "_events",
        "_started",
        "_waiter",
        "batch_size",
        "deadline",
        "facts",
        "final",
        "item_id",
        "request",
        "size_bytes",
    )

    field = "stream_generate"
    item_count = 1
    counts_batch = True

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.size_bytes = size_of_request(request)
        self.item_id = 0
        self.batch_size = 0
        self.final: Any = None
        self.facts: Facts
        self.deadline: float
        self._events: deque[Delta | MeshError | None] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._started = False
        self._closed = False

    @property
    def repeatable(self) -> bool:
        """Only as long as nothing of the answer was seen."""
        return not self._started

    @property
    def ended(self) -> bool:
        """See ``Operation.ended``."""
        return self._closed

    def write(self, add: Any, first_id: int, ids: list[int]) -> None:
        """See ``Operation.write``."""
        item = add()
        item.id = self.item_id = first_id
        item.credits = _CREDITS
        ids.append(first_id)
        fill_request(item.stream_generate.request, self.request)

    def answered(self, result: Any) -> bool:
        """See ``Operation.answered``."""
        if result.HasField("error"):
            self.fail(from_status(result.error))
            return False
        self._started = True
        response = result.stream_generate
        if not result.more:
            self.final = response.final
            self._put(None)
            return False
        delta = response.delta
        logprobs = read_logprobs(delta.logprobs) if delta.logprobs else ()
        self._put(Delta(delta.content, tuple(delta.tool_calls), logprobs, delta.reasoning))
        return True

    def refuse(self, error: MeshError) -> None:
        """See ``Operation.refuse``."""
        self.fail(error)

    def fail(self, error: MeshError) -> None:
        """See ``Operation.fail``."""
        self._put(error)

    def ids(self) -> Sequence[int]:
        """See ``Operation.ids``."""
        return (self.item_id,)

    def close(self) -> None:
        """Nobody reads any more."""
        self._closed = True

    async def next_event(self) -> Delta | MeshError | None:
        """The next piece, an error, or None at the end."""
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        event = self._events.popleft()
        if not isinstance(event, Delta):
            self._closed = True
        return event

    def _put(self, event: Delta | MeshError | None) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _request_of(
    request: GenerateRequest | str, model: str | None, max_tokens: int | None
) -> GenerateRequest:
    if isinstance(request, str):
        return GenerateRequest(request, model=model or "auto", max_tokens=max_tokens)
    if model is not None or max_tokens is not None:
        raise ValueError("with a GenerateRequest, model and max_tokens belong into it")
    return request


def _timeout(timeout: float | None) -> float | None:
    if timeout is None and current_scope().deadline is None:
        return DEFAULT_TIMEOUT_S
    return timeout
