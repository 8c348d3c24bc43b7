"""Lines of a file of prompts: what they may say, and what is said of those that do not."""

import json
from pathlib import Path
from typing import Any

import pytest

from agent360.client import Message
from agent360.mesh.jobs.prompts import LineDefaults, PromptLine, PromptReader


def read(line: Any, index: int = 0, *, strict: bool = True, **defaults: Any) -> PromptLine:
    data = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
    return PromptReader(LineDefaults(**defaults), strict=strict).read(index, data)


def test_a_prompt_is_a_message_of_the_user() -> None:
    line = read({"prompt": "Hello", "temperature": 0.5, "stop": "."}, max_tokens=9)
    assert line.request is not None
    assert line.request.messages == "Hello"
    assert (line.request.model, line.request.max_tokens) == ("auto", 9)
    assert (line.request.temperature, line.request.stop) == (0.5, ["."])


def test_messages_tools_and_shapes_are_those_of_the_openai_api() -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    look = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    line = read(
        {
            "id": "q-1",
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "What?"}, image]},
            ],
            "tools": [look],
            "tool_choice": {"type": "function", "function": {"name": "look"}},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
            "agent360": {"hints": {"task_class": "simple"}, "cache": {"no_cache": True}},
            "metadata": {"expected": 7},
        }
    )
    request = line.request
    assert request is not None
    assert request.messages == [
        Message("system", "Be brief."),
        Message("user", "What?", images=("https://example.com/a.png",)),
    ]
    assert [tool.name for tool in request.tools] == ["look"]
    assert (request.tool_choice, request.json_schema) == ("look", {})
    assert (request.task_class, request.no_cache) == ("simple", True)
    assert (line.id, line.metadata) == ("q-1", {"expected": 7})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "cut', "line 5: is not JSON"),
        (b"[]\n", "line 5: Expected `object`"),
        (b'{"prompt": "\xff"}\n', "line 5: is not JSON"),
        ({}, "either a 'prompt' or 'messages'"),
        ({"prompt": "a", "messages": []}, "either a 'prompt' or 'messages'"),
        ({"prompt": "a", "temprature": 1}, "unknown field `temprature`"),
        ({"prompt": "a", "max_tokens": 0}, "`$.max_tokens`"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role must be one of"),
        ({"prompt": "a", "tool_choice": "perhaps"}, "tool_choice must be"),
        ({"prompt": "a", "response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_number(line: Any, said: str) -> None:
    found = read(line, index=4)
    assert found.request is None
    assert found.fault.startswith("line 5: ")
    assert said in found.fault


def test_unknown_fields_can_be_ignored() -> None:
    assert read({"prompt": "a", "category": "b"}, strict=False).request is not None


def test_a_key_follows_from_id_or_place_and_from_what_is_asked_alone() -> None:
    first = read({"id": "a", "prompt": "Hello", "metadata": 1})
    assert read({"metadata": 2, "prompt": "Hello", "id": "a"}, index=9).key == first.key
    assert read({"id": "b", "prompt": "Hello"}).key != first.key
    assert read({"id": "a", "prompt": "Hello!"}).key != first.key
    assert read({"id": "a", "prompt": "Hello"}, model="small").key != first.key
    assert read({"prompt": "Hello"}, index=1).key != read({"prompt": "Hello"}, index=2).key
    assert read(b"nonsense", index=1).key != read(b"other nonsense", index=1).key


async def test_a_file_is_read_without_its_blank_lines_and_its_mark(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b"}')
    reader = PromptReader(LineDefaults(), strict=True)
    lines = [line async for line in reader.lines(file)]
    assert [line.index for line in lines] == [0, 3]
    assert all(line.request is not None for line in lines)
