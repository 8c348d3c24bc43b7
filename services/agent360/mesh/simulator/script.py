"""What the simulator answers to one chat request: the pieces of its message and how it ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent360.mesh.simulator import text
from agent360.mesh.simulator.faults import Behaviour
from agent360.mesh.simulator.settings import SimulatorSettings


@dataclass(frozen=True, slots=True)
class Script:
    """An answer, before any of it is sent."""

    pieces: Sequence[str]
    """Its tokens; joined they are the text, or the arguments of the tool call."""
    tool: str
    """The tool that is called; empty: the answer is text."""
    finish_reason: str
    """As in the OpenAI API: stop, length or tool_calls."""
    prompt_tokens: int
    """Tokens of the prompt."""
    thoughts: Sequence[str] = ()
    """Tokens of what it pretends to think before."""

    @property
    def usage(self) -> dict[str, Any]:
        """The usage object of the OpenAI API."""
        generated = len(self.thoughts) + len(self.pieces)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


def write_script(
    body: Mapping[str, Any], settings: SimulatorSettings, behaviour: Behaviour
) -> Script:
    """The answer to a request; the same for the same request.

    Args:
        body: a chat completion request whose ``messages`` are a non-empty list of objects.
        settings: bounds of the length.
        behaviour: may ask for a length.
    """
    messages = body["messages"]
    subject, seed = text.subject_of(messages), text.seed_of(body)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    tool = _tool_to_call(body)
    if tool is not None:
        schema = tool.get("parameters") or {}
        arguments = text.instance_of({"type": "object", **schema}, subject, seed)
        pieces, finish = text.cut(json.dumps(arguments)), "tool_calls"
    else:
        pieces, finish = _text(body, subject, seed, settings, behaviour, limit), "stop"
    if limit and len(pieces) > limit:
        pieces, finish = pieces[:limit], "length"
    return Script(
        pieces=pieces,
        tool=str(tool["name"]) if tool is not None else "",
        finish_reason=finish,
        prompt_tokens=text.prompt_tokens(messages),
        thoughts=text.prose(subject, seed + 1, behaviour.thoughts) if behaviour.thoughts else (),
    )


def _text(
    body: Mapping[str, Any],
    subject: str,
    seed: int,
    settings: SimulatorSettings,
    behaviour: Behaviour,
    limit: int | None,
) -> list[str]:
    shape = body.get("response_format") or {}
    if shape.get("type") == "json_schema":
        schema = shape.get("json_schema", {}).get("schema", {})
        return text.cut(json.dumps(text.instance_of(schema, subject, seed)))
    if shape.get("type") == "json_object":
        return text.cut(json.dumps({"simulated": True, "subject": subject[:200]}))
    span = settings.max_tokens - settings.min_tokens
    length = behaviour.tokens or settings.min_tokens + seed % (span + 1)
    stop = body.get("stop")
    # One more than the limit shows that there is more.
    most = None if stop or not limit else limit + 1
    return _stopped(text.prose(subject, seed, length, most), stop)


def _stopped(pieces: list[str], stop: object) -> list[str]:
    """The pieces before the first stop text."""
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    if not stops:
        return pieces
    whole = "".join(pieces)
    ends = [whole.find(each) for each in stops if each and each in whole]
    if not ends:
        return pieces
    kept, room = [], min(ends)
    for piece in pieces:
        if room <= 0:
            break
        kept.append(piece[:room])
        room -= len(piece)
    return kept


def _tool_to_call(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The function to call: the one asked for, else the first, unless a tool has just answered."""
    functions: list[Mapping[str, Any]] = [tool["function"] for tool in body.get("tools") or ()]
    choice = body.get("tool_choice")
    if not functions or choice == "none":
        return None
    if isinstance(choice, dict):
        name = choice.get("function", {}).get("name")
        return next((each for each in functions if each["name"] == name), functions[0])
    if choice != "required" and body["messages"][-1].get("role") == "tool":
        return None
    subject = text.subject_of(body["messages"])
    return next((each for each in functions if each["name"] in subject), functions[0])
