"""Domain values as answers of the contract, filled in place."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from agent360.inference.v1 import inference_pb2 as pb
from agent360.mesh.inference.answers import (
    Answer,
    Delta,
    Embeddings,
    FinishReason,
    Source,
    TokenLogprob,
    Usage,
)
from agent360.mesh.inference.failover.breaker import Breakers, State
from agent360.mesh.inference.fleet import Fleet
from agent360.mesh.inference.members import Health, Member
from agent360.mesh.inference.ride import Answered, Timing
from agent360.mesh.inference.routing import Route
from agent360.mesh.inference.settings import CapabilityName, ModelSettings
from agent360.mesh.runtime.validation import set_duration

_FINISH: Final[Mapping[FinishReason, pb.FinishReason.ValueType]] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
    "content_filter": pb.FINISH_REASON_CONTENT_FILTER,
}
_SOURCE: Final[Mapping[Source, pb.AnswerSource.ValueType]] = {
    Source.MODEL: pb.ANSWER_SOURCE_MODEL,
    Source.CACHE: pb.ANSWER_SOURCE_CACHE,
    Source.COALESCED: pb.ANSWER_SOURCE_COALESCED,
}
_CAPABILITY: Final[Mapping[CapabilityName, pb.Capability.ValueType]] = {
    "chat": pb.CAPABILITY_CHAT,
    "tools": pb.CAPABILITY_TOOLS,
    "json_schema": pb.CAPABILITY_JSON_SCHEMA,
    "embeddings": pb.CAPABILITY_EMBEDDINGS,
    "images": pb.CAPABILITY_IMAGES,
}
_TASK_CLASS: Final = {"simple": pb.TASK_CLASS_SIMPLE, "complex": pb.TASK_CLASS_COMPLEX}
_HEALTH: Final[Mapping[Health, pb.ModelHealth.ValueType]] = {
    Health.UNKNOWN: pb.MODEL_HEALTH_UNSPECIFIED,
    Health.READY: pb.MODEL_HEALTH_READY,
    Health.DEGRADED: pb.MODEL_HEALTH_DEGRADED,
    Health.UNAVAILABLE: pb.MODEL_HEALTH_UNAVAILABLE,
    Health.WARMING: pb.MODEL_HEALTH_WARMING,
}
_BREAKER: Final[Mapping[State, pb.BreakerState.ValueType]] = {
    State.CLOSED: pb.BREAKER_STATE_CLOSED,
    State.HALF_OPEN: pb.BREAKER_STATE_HALF_OPEN,
    State.OPEN: pb.BREAKER_STATE_OPEN,
}


def write_answer(
    target: pb.GenerateResponse, answered: Answered[Answer], *, with_text: bool
) -> None:
    """Fills in an answer; without its text where that was streamed."""
    answer = answered.answer
    message = target.message
    message.role = pb.ROLE_ASSISTANT
    if with_text:
        message.content = answer.content
        message.reasoning = answer.reasoning
        _write_logprobs(target.logprobs, answer.logprobs)
    for call in answer.tool_calls:
        added = message.tool_calls.add()
        added.id, added.name, added.arguments = call.id, call.name, call.arguments
    target.finish_reason = _FINISH[answer.finish_reason]
    write_usage(target.usage, answer.usage, answered.cost_usd)
    target.source = _SOURCE[answered.source]
    write_routing(target.routing, answered.route, answer.backend)
    _write_timing(target.timing, answered.timing)


def cached_answer(answer: Answer, route: Route) -> pb.GenerateResponse:
    """An answer as it is given again and again from the cache, in less time than can be told."""
    target = pb.GenerateResponse()
    answered = Answered(answer, Source.CACHE, route, 0.0, Timing(0.0, None, 0.0))
    write_answer(target, answered, with_text=True)
    return target


def write_delta(target: pb.Delta, delta: Delta) -> None:
    """Fills in a piece of an answer."""
    target.content = delta.content
    if delta.reasoning:
        target.reasoning = delta.reasoning
    for piece in delta.tool_calls:
        added = target.tool_calls.add()
        added.index, added.id = piece.place, piece.id
        added.name, added.arguments = piece.name, piece.arguments
    if delta.logprobs:
        _write_logprobs(target.logprobs, delta.logprobs)


def write_embeddings(
    target: pb.EmbedResponse, found: Embeddings, source: Source, route: Route, cost_usd: float
) -> None:
    """Fills in vectors."""
    for vector in found.vectors:
        target.embeddings.add().values.extend(vector)
    write_usage(target.usage, found.usage, cost_usd)
    target.source = _SOURCE[source]
    write_routing(target.routing, route, found.backend)


def write_usage(target: pb.Usage, usage: Usage, cost_usd: float) -> None:
    """Fills in what an answer took."""
    target.input_tokens = usage.input_tokens
    target.output_tokens = usage.output_tokens
    target.cached_input_tokens = usage.cached_input_tokens
    target.estimated = usage.estimated
    target.cost_usd = cost_usd


def write_routing(target: pb.Routing, route: Route, backend: str) -> None:
    """Fills in who answered and why."""
    target.model, target.backend, target.rule = route.model.name, backend, route.rule
    target.because, target.policy = route.because, route.policy


def write_model(
    target: pb.Model, model: ModelSettings, conditions: Fleet, breakers: Breakers, queued: int
) -> None:
    """Fills in a model of the catalogue and how it is doing."""
    target.name = model.name
    target.backends.extend(model.backends)
    target.capabilities.extend(_CAPABILITY[each] for each in model.capabilities)
    target.context_tokens = model.context_tokens
    target.input_usd_per_million = model.input_usd_per_million
    target.output_usd_per_million = model.output_usd_per_million
    target.quantization = model.quantization
    target.weight, target.policy = model.weight or 0.0, model.policy
    target.fallbacks.extend(model.fallbacks)
    target.max_prompt_tokens = model.limits.max_prompt_tokens
    target.max_output_tokens = model.limits.max_output_tokens
    target.task_classes.extend(_TASK_CLASS[each] for each in model.task_classes)
    target.health = _HEALTH[conditions.health(model)]
    target.queued = queued
    load = conditions.load(model.name)
    target.running = load.running
    p50, p90 = load.latency_s(0.5, 0.9)
    if p50 is not None and p90 is not None:
        set_duration(target.latency_p50, p50)
        set_duration(target.latency_p90, p90)
    for member in conditions.known_members(model):
        _write_backend(target.backend_states.add(), model, member, breakers)


def _write_backend(
    target: pb.ModelBackend, model: ModelSettings, member: Member, breakers: Breakers
) -> None:
    target.name = member.name
    target.health = _HEALTH[member.health_of(model)]
    target.weight = model.weight_of(member.name)
    target.running, target.outstanding_tokens = member.running, member.outstanding_tokens
    latency_s = member.latency_s(time.monotonic())
    if latency_s is not None:
        set_duration(target.latency, latency_s)
    target.breaker = _BREAKER[breakers.of(member.name).state]
    rest_s = breakers.allowed_at(member.name, model.name) - time.monotonic()
    if 0 < rest_s < math.inf:
        target.resting_until.FromNanoseconds(time.time_ns() + round(rest_s * 1e9))


def _write_timing(target: pb.Timing, timing: Timing) -> None:
    set_duration(target.queue, timing.queue_s)
    set_duration(target.total, timing.total_s)
    if timing.first_token_s is not None:
        set_duration(target.first_token, timing.first_token_s)


def _write_logprobs(target: Any, logprobs: Iterable[TokenLogprob]) -> None:
    for each in logprobs:
        added = target.add(token=each.token, logprob=each.logprob, token_bytes=each.token_bytes)
        _write_logprobs(added.alternatives, each.alternatives)
