"""What backends are asked to do: to answer a prompt, or to make vectors."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol, TypeVar

from agent360.mesh.inference import tokens
from agent360.mesh.inference.answers import Ending, Usage
from agent360.mesh.inference.conversation import EmbeddingInputs, Prompt
from agent360.mesh.inference.ports import Backend, Sink
from agent360.mesh.inference.settings import ModelSettings

Kind = Literal["stream", "whole", "vectors"]
"""Kinds of work; the times of each are measured apart."""

T = TypeVar("T")


class Vectors(NamedTuple):
    """What a backend made of texts."""

    vectors: Sequence[array[float]]
    usage: Usage | None


class Job(Protocol[T]):
    """Work that can be given to any backend of a model, more than once."""

    @property
    def kind(self) -> Kind:
        """Which kind of work."""

    @property
    def sink(self) -> Sink | None:
        """Gets what the try that speaks first says; None: the result is all there is."""

    @property
    def inferences(self) -> int:
        """How many prompts or texts it is."""

    async def run(self, backend: Backend, model: ModelSettings, hear: Sink) -> T:
        """Lets a backend do it, within the limits of a model."""

    def input_tokens(self) -> int:
        """Tokens that a backend reads, estimated."""

    def usage(self, result: T) -> Usage | None:
        """What the backend says that it used; None: it does not say."""


class Generation:
    """Answering a prompt."""

    __slots__ = ("_prompt", "kind", "sink")

    inferences: int = 1

    def __init__(self, prompt: Prompt, sink: Sink, *, streamed: bool) -> None:
        self._prompt = prompt
        self.sink = sink
        self.kind: Kind = "stream" if streamed else "whole"

    async def run(self, backend: Backend, model: ModelSettings, hear: Sink) -> Ending:
        """See ``Job.run``."""
        prompt, most = self._prompt, model.limits.max_output_tokens
        if most and (prompt.sampling.max_tokens or math.inf) > most:
            # Bound, if at all, by what the model that failed says: the caller asked for no more.
            prompt = replace(prompt, sampling=replace(prompt.sampling, max_tokens=most))
        streamed = self.kind == "stream"
        return await backend.generate(prompt, model.upstream_name, hear, streamed=streamed)

    def input_tokens(self) -> int:
        """See ``Job.input_tokens``."""
        return tokens.estimate_prompt(self._prompt)

    def usage(self, result: Ending) -> Usage | None:
        """See ``Job.usage``."""
        return result.usage


class Embedding:
    """Making vectors."""

    __slots__ = ("_request",)

    kind: Kind = "vectors"
    sink: Sink | None = None

    def __init__(self, request: EmbeddingInputs) -> None:
        self._request = request

    @property
    def inferences(self) -> int:
        """See ``Job.inferences``."""
        return len(self._request.inputs)

    async def run(self, backend: Backend, model: ModelSettings, hear: Sink) -> Vectors:  # noqa: ARG002
        """See ``Job.run``; vectors come whole, so nothing is heard before."""
        return Vectors(*await backend.embed(self._request, model.upstream_name))

    def input_tokens(self) -> int:
        """See ``Job.input_tokens``."""
        return tokens.estimate_inputs(self._request.inputs)

    def usage(self, result: Vectors) -> Usage | None:
        """See ``Job.usage``."""
        return result.usage
