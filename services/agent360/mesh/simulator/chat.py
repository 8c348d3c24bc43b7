"""POST /v1/chat/completions of the simulator: pacing, streaming and faults."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from agent360.mesh.simulator.faults import Behaviour
from agent360.mesh.simulator.load import Load
from agent360.mesh.simulator.script import Script
from agent360.mesh.simulator.settings import SimulatedModel, SimulatorSettings

FINGERPRINT: Final = "simulator"
"""``system_fingerprint`` of every answer."""

_CREATED: Final = 0
_DONE: Final = b"data: [DONE]\n\n"
_GARBAGE: Final = b'data: {"choices": [{"delta": {"con\n\n'
_NEVER: Final = 1 << 60


@dataclass(frozen=True, slots=True)
class Turn:
    """One request to be answered."""

    number: int
    """Which request of the simulator this is."""
    model: SimulatedModel
    """The model that pretends to answer."""
    script: Script
    """What it says."""
    behaviour: Behaviour
    """What goes wrong."""
    include_usage: bool
    """Whether a stream ends with the usage."""
    alternatives: int | None = None
    """How many alternatives to tell beside the probability of each token; None: tell none."""

    @property
    def id(self) -> str:
        """Id of the answer."""
        return f"chatcmpl-sim-{self.number}"


class Pace:
    """How long a model takes now; slower the more requests there are.

    The delays are ``lone delay * slowness * (1 + growth * (running - 1))``.
    """

    def __init__(self, settings: SimulatorSettings, load: Load, turn: Turn) -> None:
        asked = turn.behaviour
        first, between = asked.first_token_s, asked.inter_token_s
        slowness = turn.model.slowness
        self._load = load
        self._settings = settings
        self._first_s = settings.first_token_s * slowness if first is None else first
        self._between_s = settings.inter_token_s * slowness if between is None else between

    def first_token_s(self) -> float:
        """Time to the first token."""
        return self._first_s * (1 + self._settings.first_token_growth * (self._load.running - 1))

    def inter_token_s(self) -> float:
        """Time to the next token."""
        return self._between_s * (1 + self._settings.inter_token_growth * (self._load.running - 1))


async def answer_whole(request: web.Request, turn: Turn, pace: Pace) -> web.StreamResponse:
    """Answers with one JSON object after the time that a stream would take."""
    script, behaviour = turn.script, turn.behaviour
    cut_at = _NEVER if behaviour.break_after is None else behaviour.break_after
    spoken = min(len(script.thoughts) + len(script.pieces), cut_at)
    delay = pace.first_token_s() + pace.inter_token_s() * max(spoken - 1, 0)
    await _wait(delay + behaviour.stall_s)
    body = _whole(turn)
    if behaviour.malformed_after is not None:
        return web.Response(body=body[: len(body) // 2], content_type="application/json")
    if cut_at < _NEVER:
        return await cut_in_body(request, body)
    return web.Response(body=body, content_type="application/json")


async def answer_in_pieces(request: web.Request, turn: Turn, pace: Pace) -> web.StreamResponse:
    """Streams server-sent events; tokens that are due at once share a write."""
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    )
    response.headers.update(request.app[RESPONSE_HEADERS])
    behaviour = turn.behaviour
    stall_at = behaviour.stall_after if behaviour.stall_s else _NEVER
    if stall_at == 0:
        await asyncio.sleep(behaviour.stall_s)
        stall_at = _NEVER
    await _wait(pace.first_token_s())
    await response.prepare(request)
    events = list(_events(turn))
    cut_at = _NEVER if behaviour.break_after is None else behaviour.break_after
    spoil_at = _NEVER if behaviour.malformed_after is None else behaviour.malformed_after
    clock = asyncio.get_running_loop().time
    sent, due = 0, clock()
    while sent < len(events):
        if sent >= cut_at:
            return _hang_up(request, response)
        if sent >= spoil_at:
            await response.write(_GARBAGE)
            spoil_at = _NEVER
        if sent >= stall_at:
            await asyncio.sleep(behaviour.stall_s)
            stall_at, due = _NEVER, clock()
        end, now = sent, clock()
        stop = min(len(events), cut_at, spoil_at, stall_at)
        while end < stop and due <= now:
            end += 1
            due += pace.inter_token_s()
        if end > sent:
            await response.write(b"".join(events[sent:end]))
            sent = end
        else:
            await asyncio.sleep(due - now)
    if cut_at < _NEVER:
        return _hang_up(request, response)
    await response.write(b"".join(_closing(turn)))
    await response.write_eof()
    return response


async def _wait(delay_s: float) -> None:
    if delay_s > 0:
        await asyncio.sleep(delay_s)


async def cut_in_body(request: web.Request, body: bytes) -> web.StreamResponse:
    """Sends half of a body and closes the connection."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.headers.update(request.app[RESPONSE_HEADERS])
    response.content_length = len(body)
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    return _hang_up(request, response)


RESPONSE_HEADERS: Final = web.AppKey("response_headers", dict[str, str])
"""Headers that every answer carries."""


def _whole(turn: Turn) -> bytes:
    script = turn.script
    said = "".join(script.pieces)
    message: dict[str, Any] = {"role": "assistant", "content": said}
    if script.thoughts:
        message["reasoning_content"] = "".join(script.thoughts)
    if script.tool:
        call = {"name": script.tool, "arguments": said}
        message["content"] = None
        message["tool_calls"] = [
            {"id": f"call_sim_{turn.number}", "type": "function", "function": call}
        ]
    body: dict[str, Any] = {
        "id": turn.id,
        "object": "chat.completion",
        "created": _CREATED,
        "model": turn.model.name,
        "system_fingerprint": FINGERPRINT,
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": _logprobs(script.pieces, turn.alternatives),
                "finish_reason": script.finish_reason,
            }
        ],
    }
    if turn.behaviour.usage:
        body["usage"] = script.usage
    return json.dumps(body).encode()


def _events(turn: Turn) -> Iterator[bytes]:
    """One event a token; the first also opens the message."""
    head, tail = _frame(turn)
    dumps = json.dumps
    for thought in turn.script.thoughts:
        yield f'{head}{{"reasoning_content":{dumps(thought)}}}{tail}'.encode()
    if turn.script.tool:
        yield from _tool_events(turn.script, turn.number, head, tail)
        return
    opening = f'{head}{{"role":"assistant","content":""}}{tail}'
    for place, piece in enumerate(turn.script.pieces):
        logprobs = _logprobs([piece], turn.alternatives)
        told = f'{{"content":{dumps(piece)}}}'
        if logprobs is not None:
            told += f',"logprobs":{dumps(logprobs)}'
        event = f"{head}{told}{tail}"
        yield (opening + event if place == 0 else event).encode()


def _logprobs(pieces: Sequence[str], alternatives: int | None) -> dict[str, Any] | None:
    """Made-up probabilities: each token half as probable as its place before, from 1/2."""
    if alternatives is None:
        return None
    content = []
    for piece in pieces:
        likely = [piece, *(f"{piece}~{place}" for place in range(1, alternatives))][:alternatives]
        top = [_logprob(each, place) for place, each in enumerate(likely)]
        content.append({**_logprob(piece, 0), "top_logprobs": top})
    return {"content": content}


def _logprob(token: str, place: int) -> dict[str, Any]:
    return {"token": token, "logprob": -(place + 1) * math.log(2), "bytes": list(token.encode())}


def _tool_events(script: Script, number: int, head: str, tail: str) -> Iterator[bytes]:
    opening = {
        "index": 0,
        "id": f"call_sim_{number}",
        "type": "function",
        "function": {"name": script.tool, "arguments": ""},
    }
    first = f"{head}{json.dumps({'role': 'assistant', 'tool_calls': [opening]})}{tail}"
    for place, piece in enumerate(script.pieces):
        delta = {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
        event = f"{head}{json.dumps(delta)}{tail}"
        yield (first + event if place == 0 else event).encode()


def _closing(turn: Turn) -> Sequence[bytes]:
    head, tail = _frame(turn)
    ending = tail.replace("null", json.dumps(turn.script.finish_reason), 1)
    events = [f"{head}{{}}{ending}".encode()]
    if turn.include_usage and turn.behaviour.usage:
        chunk = {
            "id": turn.id,
            "object": "chat.completion.chunk",
            "created": _CREATED,
            "model": turn.model.name,
            "system_fingerprint": FINGERPRINT,
            "choices": [],
            "usage": turn.script.usage,
        }
        events.append(f"data: {json.dumps(chunk)}\n\n".encode())
    return [*events, _DONE]


def _frame(turn: Turn) -> tuple[str, str]:
    """What stands before and after a delta; the first null of the latter is the finish reason."""
    head = (
        f'data: {{"id":"{turn.id}","object":"chat.completion.chunk","created":{_CREATED},'
        f'"model":"{turn.model.name}","system_fingerprint":"{FINGERPRINT}",'
        '"choices":[{"index":0,"delta":'
    )
    usage = ',"usage":null' if turn.include_usage else ""
    return head, f',"finish_reason":null}}]{usage}}}\n\n'


def _hang_up(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Closes the connection after what was written, without the end of the answer."""
    if request.transport is not None:
        request.transport.close()
    return response
