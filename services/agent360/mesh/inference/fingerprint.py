"""Names requests so that two have the same name exactly if they ask the same of the same model."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

from agent360.mesh.inference.conversation import (
    AnyJson,
    EmbeddingInputs,
    ImagePart,
    Message,
    Prompt,
    SchemaJson,
    TextPart,
)
from agent360.mesh.inference.settings import ModelSettings

_DIGEST_BYTES: Final = 24
_canonical: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def of_prompt(prompt: Prompt, model: ModelSettings) -> str:
    """The name of a request to ``model``, as a cache key that begins with ``NAME@VERSION/``.

    What does not shape the answer is left out: hints, cache control, the end user. The tenant is
    left out too: the cache keeps tenants apart.
    """
    sampling = prompt.sampling
    choice = prompt.tool_choice
    return _named(
        model,
        [
            [_message(message) for message in prompt.messages],
            [[each.name, each.description, each.parameters, each.strict] for each in prompt.tools],
            [choice.mode, choice.tool_name] if choice else None,
            [
                sampling.temperature,
                sampling.top_p,
                sampling.top_k,
                sampling.frequency_penalty,
                sampling.presence_penalty,
                sampling.seed,
                sampling.stop,
                sampling.max_tokens,
                sampling.logprobs,
                sampling.top_logprobs,
            ],
            _response_format(prompt.response_format),
        ],
    )


def of_inputs(request: EmbeddingInputs, model: ModelSettings) -> str:
    """The name of a request for vectors, as a cache key; as ``of_prompt``."""
    return _named(model, [request.dimensions, request.inputs])


def _named(model: ModelSettings, asked: list[Any]) -> str:
    # The prefix is for people and invalidations; the digest alone tells all models apart.
    asked += [model.name, model.version, model.upstream_name, model.quantization]
    text = _canonical(asked)
    digest = hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()
    return f"{model.name}@{model.version}/{digest}"


def _message(message: Message) -> list[Any]:
    # Two texts in parts are not one text: models see part borders, so they stay in the name.
    content: Any = [_part(part) for part in message.parts] if message.parts else message.content
    calls = [[call.id, call.name, call.arguments] for call in message.tool_calls]
    return [message.role, content, calls, message.tool_call_id, message.name]


def _part(part: TextPart | ImagePart) -> list[str]:
    return ["text", part.text] if isinstance(part, TextPart) else ["image", part.url]


def _response_format(shape: AnyJson | SchemaJson | None) -> Any:
    if isinstance(shape, SchemaJson):
        return [shape.name, shape.schema, shape.strict]
    return None if shape is None else "json"
