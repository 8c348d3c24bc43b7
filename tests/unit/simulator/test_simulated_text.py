"""What the simulator says follows from the prompt alone and has the shape asked for."""

import json

import pytest
from pydantic import ValidationError

from agent360.mesh.simulator import text
from agent360.mesh.simulator.faults import Behaviour
from agent360.mesh.simulator.script import write_script
from agent360.mesh.simulator.settings import SimulatedModel, SimulatorSettings

SETTINGS = SimulatorSettings()
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
                "unit": {"enum": ["C", "F"]},
            },
        },
    },
}


def body(content: str = "Plan a trip to Rome", **more: object) -> dict[str, object]:
    return {"model": "sim-small", "messages": [{"role": "user", "content": content}], **more}


def script(request: dict[str, object], behaviour: Behaviour | None = None):
    return write_script(request, SETTINGS, behaviour or Behaviour())


def test_the_same_request_gets_the_same_answer_and_another_another():
    assert script(body()) == script(body())
    assert script(body()).pieces != script(body("Plan a trip to Oslo")).pieces


def test_an_answer_says_that_no_model_made_it():
    said = "".join(script(body()).pieces)
    assert said.startswith("This is a simulated answer, made without a model, about Plan a trip")
    assert SETTINGS.min_tokens <= len(script(body()).pieces) <= SETTINGS.max_tokens


def test_max_tokens_ends_an_answer_by_length():
    short = script(body(max_tokens=5))
    assert len(short.pieces) == 5
    assert short.finish_reason == "length"
    assert short.usage["completion_tokens"] == 5


def test_a_stop_text_ends_an_answer_before_it():
    said = "".join(script(body(stop=["without"])).pieces)
    assert said == "This is a simulated answer, made "


def test_a_tool_is_called_with_arguments_that_follow_its_schema():
    called = script(body(tools=[WEATHER]))
    arguments = json.loads("".join(called.pieces))
    assert called.tool == "get_weather"
    assert called.finish_reason == "tool_calls"
    assert isinstance(arguments["city"], str)
    assert 1 <= arguments["days"] <= 7
    assert arguments["unit"] in ("C", "F")


def test_no_tool_is_called_when_one_has_just_answered_or_calls_are_forbidden():
    answered = body(tools=[WEATHER])
    answered["messages"] = [*answered["messages"], {"role": "tool", "content": "sunny"}]
    assert script(answered).tool == ""
    assert script(body(tools=[WEATHER], tool_choice="none")).tool == ""


def test_a_json_schema_shapes_the_answer():
    schema = {
        "type": "object",
        "properties": {
            "steps": {"type": "array", "minItems": 2, "items": {"type": "string"}},
            "done": {"type": "boolean"},
        },
    }
    shape = {"type": "json_schema", "json_schema": {"name": "plan", "schema": schema}}
    found = json.loads("".join(script(body(response_format=shape)).pieces))
    assert len(found["steps"]) == 2
    assert isinstance(found["done"], bool)


def test_cut_pieces_join_to_the_text():
    for sample in ('{"a": [1, 2]}', "  leading and trailing  ", "", "one"):
        assert "".join(text.cut(sample)) == sample


def test_vectors_of_texts_that_share_words_are_nearer():
    def near(one: str, other: str) -> float:
        pairs = zip(text.embedding(one, 256), text.embedding(other, 256), strict=True)
        return sum(a * b for a, b in pairs)

    assert near("book a flight to Rome", "book a flight to Rome") == pytest.approx(1.0, abs=1e-5)
    assert near("book a flight to Rome", "book a train to Rome") > near("book a flight", "xyz")


def test_a_model_that_is_not_named_as_simulated_is_refused():
    with pytest.raises(ValidationError):
        SimulatedModel(name="gpt-5")
