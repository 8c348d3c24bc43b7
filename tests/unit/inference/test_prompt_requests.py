"""Requests on the wire: every fault is found and named; what is good arrives unchanged."""

import math

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct

from agent360.client.errors import InvalidRequestError
from agent360.inference.v1 import inference_pb2 as pb
from agent360.mesh.inference.conversation import (
    CacheControl,
    ImagePart,
    Message,
    SchemaJson,
    TextPart,
    ToolCall,
    ToolChoice,
)
from agent360.mesh.inference.wire.requests import read_inputs, read_prompt

MAX_BYTES = 4 * 2**20


def request(**more: object) -> pb.GenerateRequest:
    user = pb.Message(role=pb.ROLE_USER, content="Hi")
    return pb.GenerateRequest(**{"model": "m", "messages": [user], **more})


def faults(wire: pb.GenerateRequest | pb.EmbedRequest) -> list[str]:
    read = read_inputs if isinstance(wire, pb.EmbedRequest) else read_prompt
    with pytest.raises(InvalidRequestError) as caught:
        read(wire, MAX_BYTES)
    return [violation.field for violation in caught.value.violations]


def struct(**fields: object) -> Struct:
    made = Struct()
    made.update(fields)
    return made


def test_all_faults_of_a_request_are_named_together():
    wire = pb.GenerateRequest(
        messages=[
            pb.Message(content="no role"),
            pb.Message(role=pb.ROLE_USER),
            pb.Message(role=pb.ROLE_TOOL, content="whose?"),
            pb.Message(role=pb.ROLE_USER, tool_calls=[pb.ToolCall(id="1", name="a b")]),
            pb.Message(role=pb.ROLE_USER, content="x", parts=[pb.ContentPart(image_url="file:/")]),
        ],
        tools=[pb.Tool(name="same"), pb.Tool(name="same"), pb.Tool(name="")],
        tool_choice=pb.ToolChoice(tool_name="other"),
        sampling=pb.Sampling(temperature=3, top_p=math.nan, max_tokens=0, stop=[""]),
        hints=pb.RoutingHints(task_class=9, max_cost_usd=-1, max_latency=Duration(seconds=-1)),
        cache_control=pb.CacheControl(ttl=Duration(seconds=-5)),
        response_format=pb.ResponseFormat(json_schema=pb.JsonSchemaFormat(name="!")),
        user="u" * 300,
    )
    assert set(faults(wire)) == {
        "model",
        "user",
        "messages[0].role",
        "messages[1].content",
        "messages[2].tool_call_id",
        "messages[3].tool_calls",
        "messages[3].tool_calls[0].name",
        "messages[4].content",
        "messages[4].parts[0].image_url",
        "tools[1].name",
        "tools[2].name",
        "tool_choice.tool_name",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.max_tokens",
        "sampling.stop[0]",
        "hints.task_class",
        "hints.max_cost_usd",
        "hints.max_latency",
        "cache_control.ttl",
        "response_format.json_schema.name",
        "response_format.json_schema.schema",
    }


def test_a_prompt_beyond_the_bound_is_refused_by_its_messages():
    wire = request(messages=[pb.Message(role=pb.ROLE_USER, content="x" * (10 * 2**20))])
    assert faults(wire) == ["messages"]


def test_too_many_messages_and_none_are_refused():
    many = [pb.Message(role=pb.ROLE_USER, content="x")] * 1_001
    assert faults(request(messages=many)) == ["messages"]
    assert faults(request(messages=[])) == ["messages"]


def test_a_tool_may_not_be_chosen_where_there_is_none():
    choice = pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED)
    assert faults(request(tool_choice=choice)) == ["tool_choice"]
    none = pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_NONE)
    assert read_prompt(request(tool_choice=none), MAX_BYTES).tool_choice is None


def test_a_full_request_arrives_as_it_was_sent():
    wire = request(
        messages=[
            pb.Message(role=pb.ROLE_SYSTEM, content="Be brief."),
            pb.Message(
                role=pb.ROLE_USER,
                parts=[pb.ContentPart(text="What?"), pb.ContentPart(image_url="data:image/png,x")],
            ),
            pb.Message(
                role=pb.ROLE_ASSISTANT,
                tool_calls=[pb.ToolCall(id="c1", name="look", arguments="{}")],
            ),
            pb.Message(role=pb.ROLE_TOOL, content="a cat", tool_call_id="c1"),
        ],
        tools=[
            pb.Tool(name="look", parameters=struct(type="object", maxProperties=3), strict=True)
        ],
        tool_choice=pb.ToolChoice(tool_name="look"),
        sampling=pb.Sampling(temperature=0, seed=-1, max_tokens=10, stop=["END"]),
        response_format=pb.ResponseFormat(
            json_schema=pb.JsonSchemaFormat(name="s", schema=struct(minimum=0.5, n=5))
        ),
        cache_control=pb.CacheControl(ttl=Duration(nanos=500_000_000), no_store=True),
    )
    prompt = read_prompt(wire, MAX_BYTES)
    assert prompt.messages[1] == Message(
        "user", parts=(TextPart("What?"), ImagePart("data:image/png,x"))
    )
    assert prompt.messages[2].tool_calls == (ToolCall("c1", "look", "{}"),)
    assert prompt.messages[3].tool_call_id == "c1"
    assert prompt.tools[0].parameters == {"type": "object", "maxProperties": 3}
    assert isinstance(prompt.tools[0].parameters["maxProperties"], int)
    assert prompt.tool_choice == ToolChoice("required", "look")
    assert (prompt.sampling.temperature, prompt.sampling.seed) == (0.0, -1)
    assert prompt.sampling.top_p is None
    assert prompt.response_format == SchemaJson("s", {"minimum": 0.5, "n": 5})
    assert prompt.cache == CacheControl(0.5, no_cache=False, no_store=True)


def test_faults_of_an_embedding_request_are_named():
    wire = pb.EmbedRequest(inputs=["good", ""], dimensions=100_000)
    assert set(faults(wire)) == {"model", "inputs[1]", "dimensions"}
    assert faults(pb.EmbedRequest(model="m")) == ["inputs"]
    assert faults(pb.EmbedRequest(model="m", inputs=["x" * (5 * 2**20)])) == ["inputs"]
