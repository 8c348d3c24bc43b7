"""Which model answers a request, what may be tried after it, and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import grpc

from agent360.client.errors import MeshError
from agent360.mesh.inference.catalogue import Catalogue
from agent360.mesh.inference.classifier import Classifier, Rules, Verdict
from agent360.mesh.inference.conversation import ImagePart, Prompt, SchemaJson, TaskClass
from agent360.mesh.inference.ranking import Conditions, NoConditions, Ranking, Wish
from agent360.mesh.inference.selection import policy_of
from agent360.mesh.inference.sessions import Sessions
from agent360.mesh.inference.settings import (
    AutoSettings,
    CapabilityName,
    ClassParameters,
    ModelSettings,
)
from agent360.mesh.inference.tokens import estimate_prompt

AUTO: Final = "auto"
EXPLICIT: Final = "explicit"
_NO_PARAMETERS: Final = ClassParameters()
_MAX_FALLBACKS: Final = 8


@dataclass(frozen=True, slots=True)
class Route:
    """A model and why it was chosen."""

    model: ModelSettings
    rule: str
    """Such as ``explicit`` or ``auto:simple``."""
    because: str = ""
    """What decided it, such as ``tools`` or ``length: 812 tokens``; empty: the caller named it."""
    fallbacks: tuple[ModelSettings, ...] = ()
    """What can be tried after it, in this order; they can all do what the request needs, and it is
    within their limits."""
    task_class: TaskClass | None = None
    """The class that the request was given; None: the caller named the model."""
    parameters: ClassParameters = _NO_PARAMETERS
    """Those of the class, for a request that names none itself."""
    policy: str = ""
    """What chooses among the model's backends, as ``selection.policy_of`` has it."""

    def completed(self, prompt: Prompt) -> Prompt:
        """The prompt with the parameters of its class and the model where it names none."""
        sampling, parameters = prompt.sampling, self.parameters
        bounds = (
            parameters.max_tokens or self.model.max_tokens,
            self.model.limits.max_output_tokens,
        )
        if parameters is _NO_PARAMETERS and (sampling.max_tokens is not None or not any(bounds)):
            return prompt
        max_tokens = sampling.max_tokens
        if max_tokens is None:
            max_tokens = min((bound for bound in bounds if bound), default=None)
        completed = replace(
            sampling,
            temperature=_first(sampling.temperature, parameters.temperature),
            top_p=_first(sampling.top_p, parameters.top_p),
            max_tokens=max_tokens,
        )
        return prompt if completed == sampling else replace(prompt, sampling=completed)


class Router:
    """Chooses models by name or, for ``auto``, by how demanding the request is.

    ``auto``: the hint decides the class if there is one, else the classifier; a session that was
    complex stays complex. Of the models of the class that can do what the request needs, whose
    context holds it and whose expected cost is within its ceiling, the one ranked first is taken
    (``Ranking``); the others are its fallbacks, after those that it names itself.

    Example:
        >>> route = Router(catalogue, AutoSettings(), 512).choose(prompt, "acme")
        >>> route.model.name, route.rule, route.because
        ('small', 'auto:simple', 'length: 12 tokens')
    """

    def __init__(
        self,
        catalogue: Catalogue,
        settings: AutoSettings,
        expected_output: int,
        *,
        classifier: Classifier | None = None,
        conditions: Conditions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes what it chooses by.

        Args:
            catalogue: the models.
            settings: how ``auto`` decides.
            expected_output: tokens of an answer whose length has no bound.
            classifier: tells complex requests from simple ones; None: the rules of the settings.
            conditions: how models are doing; None: nothing is known.
            clock: seconds, for the sessions that are remembered.
        """
        self._catalogue = catalogue
        self._settings = settings
        self._classify = classifier or Rules(settings)
        self._ranking = Ranking(conditions or NoConditions(), expected_output)
        self._sessions = Sessions(settings.sessions, clock)

    def choose(self, prompt: Prompt, tenant: str) -> Route:
        """The model for a request.

        Raises:
            MeshError: NOT_FOUND, if there is no such model; FAILED_PRECONDITION, if it cannot do
                what the request needs, or no model can; INVALID_ARGUMENT, if the request is beyond
                the model's limits.
        """
        needed = _needed(prompt)
        if prompt.model != AUTO:
            model = self._catalogue.get(prompt.model, tenant)
            missing = needed - set(model.capabilities)
            if missing:
                raise lacking(model.name, missing)
            _check_limits(prompt, model)
            fallbacks = self._named(model, tenant, needed, prompt)
            return Route(model, EXPLICIT, fallbacks=fallbacks, policy=policy_of(model, prompt))
        return self._choose_by_class(prompt, tenant, needed)

    def stands(self, route: Route, tenant: str) -> bool:
        """Whether a request that names this route's model would get it now."""
        model = route.model
        return self._catalogue.find(model.name, tenant) is model

    def choose_embedder(self, name: str, tenant: str) -> Route:
        """The model for texts that are to be embedded.

        Raises:
            MeshError: NOT_FOUND, if there is no such model; FAILED_PRECONDITION, if it makes no
                vectors.
        """
        model = self._catalogue.get(name, tenant)
        if "embeddings" not in model.capabilities:
            raise lacking(model.name, {"embeddings"})
        fallbacks = self._named(model, tenant, {"embeddings"})
        policy = "only" if len(model.backends) == 1 else model.policy
        return Route(model, EXPLICIT, fallbacks=fallbacks, policy=policy)

    def _choose_by_class(self, prompt: Prompt, tenant: str, needed: set[CapabilityName]) -> Route:
        tokens = estimate_prompt(prompt)
        able = [
            model for model in self._catalogue.usable(tenant) if needed <= set(model.capabilities)
        ]
        if not able:
            raise _nothing_fits(f"no model can do: {', '.join(sorted(needed))}")
        able = [model for model in able if _within_limits(prompt, tokens, model)]
        if not able:
            raise _nothing_fits(f"a prompt of {tokens:,} tokens is beyond every model's limits")
        task_class, because = self._class_of(prompt, tenant)
        # A catalogue that says nothing of task classes lets any able model answer.
        fitting = [model for model in able if task_class in model.task_classes] or able
        parameters = self._settings.simple if task_class == "simple" else self._settings.complex
        wish = Wish(prompt, tokens, parameters)
        affordable = self._ranking.affordable(wish, fitting)
        if not affordable:
            raise self._too_dear(wish, fitting)
        model, *others = self._ranking.in_order(wish, affordable)
        named = self._named(model, tenant, needed, prompt)
        others = [each for each in others if each not in named][:_MAX_FALLBACKS]
        return Route(
            model,
            f"auto:{task_class}",
            because + self._ranking.latency_note(prompt, model),
            (*self._ranking.affordable(wish, named), *others),
            task_class,
            parameters,
            policy_of(model, prompt),
        )

    def _too_dear(self, wish: Wish, models: list[ModelSettings]) -> MeshError:
        costs = [(self._ranking.expected_cost(wish, model), model.name) for model in models]
        cost, cheapest = min(costs)
        return _nothing_fits(
            f"the cheapest fitting model, {cheapest}, is expected to cost "
            f"${cost:.6f}; the ceiling is ${wish.prompt.hints.max_cost_usd:.6f}"
        )

    def _class_of(self, prompt: Prompt, tenant: str) -> Verdict:
        hints = prompt.hints
        if hints.task_class is not None:
            verdict = Verdict(hints.task_class, "hint")
        else:
            verdict = self._classify(prompt)
        if hints.session_id:
            highest = self._sessions.highest(tenant, hints.session_id, verdict.task_class)
            if highest != verdict.task_class:
                return Verdict(highest, "session")
        return verdict

    def _named(
        self,
        model: ModelSettings,
        tenant: str,
        needed: set[CapabilityName],
        prompt: Prompt | None = None,
    ) -> tuple[ModelSettings, ...]:
        """The fallbacks that a model names, as far as they can do what is needed."""
        if not model.fallbacks:
            return ()
        usable = {each.name: each for each in self._catalogue.usable(tenant)}
        able = [
            usable[name]
            for name in model.fallbacks
            if name in usable and needed <= set(usable[name].capabilities)
        ]
        if prompt is not None and able:
            tokens = estimate_prompt(prompt)
            able = [each for each in able if _within_limits(prompt, tokens, each)]
        return tuple(able)


def _first(own: float | None, default: float | None) -> float | None:
    return default if own is None else own


def _needed(prompt: Prompt) -> set[CapabilityName]:
    needed: set[CapabilityName] = {"chat"}
    if prompt.tools:
        needed.add("tools")
    if isinstance(prompt.response_format, SchemaJson):
        needed.add("json_schema")
    if any(isinstance(part, ImagePart) for each in prompt.messages for part in each.parts):
        needed.add("images")
    return needed


def _within_limits(prompt: Prompt, tokens: int, model: ModelSettings) -> bool:
    limits, output = model.limits, prompt.sampling.max_tokens or 0
    return not (
        (limits.max_prompt_tokens and tokens > limits.max_prompt_tokens)
        or (limits.max_output_tokens and output > limits.max_output_tokens)
        or (model.context_tokens and tokens + output > model.context_tokens)
    )


def _check_limits(prompt: Prompt, model: ModelSettings) -> None:
    """Refuses what is beyond a model's limits; its context is the backend's to judge, exactly."""
    limits, output = model.limits, prompt.sampling.max_tokens or 0
    if limits.max_output_tokens and output > limits.max_output_tokens:
        raise _beyond(model, "sampling.max_tokens", output, limits.max_output_tokens)
    if limits.max_prompt_tokens:
        tokens = estimate_prompt(prompt)
        if tokens > limits.max_prompt_tokens:
            raise _beyond(model, "the prompt's tokens", tokens, limits.max_prompt_tokens)


def _beyond(model: ModelSettings, what: str, is_: int, most: int) -> MeshError:
    return MeshError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "MODEL_LIMIT_EXCEEDED",
        f"{what} may be at most {most:,} for {model.name}, are {is_:,}",
        metadata={"model": model.name},
    )


def lacking(model: str, missing: set[CapabilityName]) -> MeshError:
    """The error of a request for what a model cannot do."""
    what = ", ".join(sorted(missing))
    return MeshError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "MODEL_LACKS_CAPABILITY",
        f"{model} cannot do: {what}",
        metadata={"model": model, "missing": what},
    )


def _nothing_fits(why: str) -> MeshError:
    return MeshError(grpc.StatusCode.FAILED_PRECONDITION, "NO_MODEL_FITS", why)
