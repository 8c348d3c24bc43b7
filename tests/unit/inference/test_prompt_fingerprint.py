"""Two requests have one name exactly if they ask the same of the same model."""

from dataclasses import replace

import pytest

from agent360.mesh.inference.conversation import (
    AnyJson,
    CacheControl,
    EmbeddingInputs,
    Hints,
    ImagePart,
    Message,
    Prompt,
    Sampling,
    SchemaJson,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)
from agent360.mesh.inference.fingerprint import of_inputs, of_prompt
from agent360.mesh.inference.settings import ModelSettings

MODEL = ModelSettings(name="m")
BASE = Prompt(model="auto", messages=(Message("user", "Hi"),))


@pytest.mark.parametrize(
    "same",
    [
        replace(BASE, model="m"),
        replace(BASE, user="somebody"),
        replace(BASE, hints=Hints(task_class="complex")),
        replace(BASE, cache=CacheControl(ttl_s=5, no_cache=True)),
    ],
)
def test_what_does_not_shape_the_answer_is_left_out(same):
    assert of_prompt(same, MODEL) == of_prompt(BASE, MODEL)


@pytest.mark.parametrize(
    "other",
    [
        replace(BASE, messages=(Message("user", "Hi "),)),
        replace(BASE, messages=(Message("system", "Hi"),)),
        replace(BASE, messages=(Message("user", "Hi", name="ann"),)),
        replace(BASE, messages=(Message("user", parts=(TextPart("Hi"),)),)),
        replace(BASE, messages=(Message("user", parts=(ImagePart("Hi"),)),)),
        replace(BASE, messages=(*BASE.messages, *BASE.messages)),
        replace(BASE, messages=(Message("assistant", tool_calls=(ToolCall("1", "a", "{}"),)),)),
        replace(BASE, tools=(Tool("look"),)),
        replace(BASE, tool_choice=ToolChoice("none")),
        replace(BASE, response_format=AnyJson()),
        replace(BASE, response_format=SchemaJson("s", {})),
        replace(BASE, sampling=Sampling(temperature=0.0)),
        replace(BASE, sampling=Sampling(max_tokens=5)),
        replace(BASE, sampling=Sampling(stop=("x",))),
        replace(BASE, sampling=Sampling(logprobs=True)),
        replace(BASE, sampling=Sampling(top_logprobs=2)),
    ],
)
def test_what_shapes_the_answer_changes_the_name(other):
    assert of_prompt(other, MODEL) != of_prompt(BASE, MODEL)


def test_the_model_changes_the_name():
    assert of_prompt(BASE, MODEL) != of_prompt(BASE, ModelSettings(name="n"))


def test_the_order_of_a_schemas_fields_does_not_matter():
    one = replace(BASE, tools=(Tool("t", parameters={"a": 1, "b": {"c": 2, "d": 3}}),))
    other = replace(BASE, tools=(Tool("t", parameters={"b": {"d": 3, "c": 2}, "a": 1}),))
    assert of_prompt(one, MODEL) == of_prompt(other, MODEL)


def test_borders_between_texts_to_embed_count():
    one, other = EmbeddingInputs("m", ("ab", "c")), EmbeddingInputs("m", ("a", "bc"))
    assert of_inputs(one, MODEL) != of_inputs(other, MODEL)
