"""Which of the models that can answer is preferred: readiness, latency, cost, weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from agent360.mesh.inference.answers import Usage
from agent360.mesh.inference.catalogue import cost_usd
from agent360.mesh.inference.conversation import Prompt
from agent360.mesh.inference.members import Health, ModelLoad
from agent360.mesh.inference.rendezvous import score
from agent360.mesh.inference.settings import ClassParameters, ModelSettings

_SPREAD_BY: Final = 1_024
"""Letters of a request, from its end, that tell it from others where models share requests."""
_UNREADINESS: Final = {Health.WARMING: 1, Health.UNAVAILABLE: 2}


class Conditions(Protocol):
    """How models are doing; ``fleet.Fleet`` knows."""

    def health(self, model: ModelSettings) -> Health:
        """Whether a model can be used now."""

    def load(self, model: str) -> ModelLoad:
        """What a model is doing."""


class NoConditions:
    """Nothing is known of any model."""

    def health(self, _: ModelSettings) -> Health:
        """See ``Conditions``."""
        return Health.UNKNOWN

    def load(self, _: str) -> ModelLoad:
        """See ``Conditions``."""
        return ModelLoad()


@dataclass(frozen=True, slots=True)
class Wish:
    """A request, as far as it bears on which model is preferred."""

    prompt: Prompt
    tokens: int
    """Of the prompt, estimated."""
    parameters: ClassParameters
    """Those of its class."""


class Ranking:
    """Puts models in order for a request.

    Example:
        >>> ranking = Ranking(fleet, expected_output=512)
        >>> best, *others = ranking.in_order(wish, ranking.affordable(wish, models))
    """

    def __init__(self, conditions: Conditions, expected_output: int) -> None:
        """Takes what it goes by.

        Args:
            conditions: how models are doing.
            expected_output: tokens of an answer whose length has no bound.
        """
        self._conditions = conditions
        self._expected_output = expected_output

    def expected_cost(self, wish: Wish, model: ModelSettings) -> float:
        """What a model's answer would cost at most, in US dollars, as far as that is known."""
        output = (
            wish.prompt.sampling.max_tokens
            or wish.parameters.max_tokens
            or model.max_tokens
            or self._expected_output
        )
        return cost_usd(model, Usage(wish.tokens, output))

    def affordable(self, wish: Wish, models: Sequence[ModelSettings]) -> list[ModelSettings]:
        """The models within the request's cost ceiling, if it has one."""
        ceiling = wish.prompt.hints.max_cost_usd
        if not ceiling:
            return list(models)
        return [model for model in models if self.expected_cost(wish, model) <= ceiling]

    def in_order(self, wish: Wish, models: list[ModelSettings]) -> list[ModelSettings]:
        """The models, the best first.

        Those that are up come first; with a latency target those that meet it, as measured; then
        the cheapest. Equal ones that have a weight share the requests by it, one that is repeated
        always meeting the same one; those without follow in the order of the catalogue.
        """
        if len(models) == 1:
            return models
        prompt = wish.prompt
        spread_by = prompt.hints.session_id or prompt.messages[-1].content[-_SPREAD_BY:]

        def rank(model: ModelSettings) -> tuple[int, int, float, float, float]:
            unready = _UNREADINESS.get(self._conditions.health(model), 0)
            lateness, latency_s = self._lateness(prompt, model)
            cost = self.expected_cost(wish, model)
            share = score(spread_by, model.name, model.weight) if model.weight else 0.0
            return unready, lateness, latency_s, cost, -share

        return sorted(models, key=rank)

    def latency_note(self, prompt: Prompt, model: ModelSettings) -> str:
        """What is known of a model's latency, for a request with a target; else empty."""
        target = prompt.hints.max_latency_s
        if target is None:
            return ""
        p50, p90 = self._conditions.load(model.name).latency_s(0.5, 0.9)
        if p50 is None or p90 is None:
            return f"; latency not measured, {target:g} s wanted"
        return f"; latency {p50:.3g} s, p90 {p90:.3g} s, {target:g} s wanted"

    def _lateness(self, prompt: Prompt, model: ModelSettings) -> tuple[int, float]:
        """How badly a model misses the target: 0 not at its p90, 1 not at its median, 2 unknown.

        The second number tells those that miss it apart; those that meet it are equal.
        """
        target = prompt.hints.max_latency_s
        if target is None:
            return 0, 0.0
        p50, p90 = self._conditions.load(model.name).latency_s(0.5, 0.9)
        if p50 is None or p90 is None:
            return 2, 0.0
        if p90 <= target:
            return 0, 0.0
        return (1, 0.0) if p50 <= target else (3, p50)
