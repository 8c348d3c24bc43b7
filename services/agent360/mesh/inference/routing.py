"""Which model answers a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import grpc

from agent360.client.errors import MeshError
from agent360.mesh.inference.answers import Usage
from agent360.mesh.inference.catalogue import Catalogue, cost_usd
from agent360.mesh.inference.conversation import ImagePart, Prompt, SchemaJson, TaskClass
from agent360.mesh.inference.settings import AutoSettings, CapabilityName, ModelSettings
from agent360.mesh.inference.tokens import estimate_prompt

AUTO: Final = "auto"
EXPLICIT: Final = "explicit"


@dataclass(frozen=True, slots=True)
class Route:
    """A model and why it was chosen."""

    model: ModelSettings
    rule: str
    """Such as ``explicit`` or ``auto:simple``."""
    because: str = ""
    """What decided it, for the log: ``hint``, ``tools``, ``schema``, ``length``, ``turns``."""


class Router:
    """Chooses models by name or, for ``auto``, by how demanding the request is.

    ``auto``: the hint decides if there is one; else tools, a JSON schema, a long prompt or a long
    conversation make a request complex. Among the models of its class that can do what the request
    needs and fit its cost ceiling, the one with the lowest expected cost is taken.
    """

    def __init__(self, catalogue: Catalogue, settings: AutoSettings, expected_output: int) -> None:
        self._catalogue = catalogue
        self._settings = settings
        self._expected_output = expected_output

    def choose(self, prompt: Prompt, tenant: str) -> Route:
        """The model for a request.

        Raises:
            MeshError: NOT_FOUND, if there is no such model; FAILED_PRECONDITION, if it cannot do
                what the request needs, or no model can.
        """
        needed = _needed(prompt)
        if prompt.model != AUTO:
            model = self._catalogue.get(prompt.model, tenant)
            missing = needed - set(model.capabilities)
            if missing:
                raise lacking(model.name, missing)
            return Route(model, EXPLICIT)
        task_class, because = self._classify(prompt)
        able = [
            model for model in self._catalogue.usable(tenant) if needed <= set(model.capabilities)
        ]
        if not able:
            raise _nothing_fits(f"no model can do: {', '.join(sorted(needed))}")
        # A catalogue that says nothing of task classes lets any able model answer.
        fitting = [model for model in able if task_class in model.task_classes] or able
        return Route(self._cheapest(prompt, fitting), f"auto:{task_class}", because)

    def _classify(self, prompt: Prompt) -> tuple[TaskClass, str]:
        settings = self._settings
        if prompt.hints.task_class is not None:
            return prompt.hints.task_class, "hint"
        if prompt.tools and settings.tools_are_complex:
            return "complex", "tools"
        if isinstance(prompt.response_format, SchemaJson):
            return "complex", "schema"
        if len(prompt.messages) >= settings.complex_messages:
            return "complex", "turns"
        if estimate_prompt(prompt) >= settings.complex_prompt_tokens:
            return "complex", "length"
        return "simple", "length"

    def _cheapest(self, prompt: Prompt, models: list[ModelSettings]) -> ModelSettings:
        tokens = estimate_prompt(prompt)

        def expected(model: ModelSettings) -> float:
            output = prompt.sampling.max_tokens or model.max_tokens or self._expected_output
            return cost_usd(model, Usage(tokens, output))

        cheapest = min(models, key=expected)
        ceiling = prompt.hints.max_cost_usd
        if ceiling and expected(cheapest) > ceiling:
            raise _nothing_fits(
                f"the cheapest fitting model, {cheapest.name}, is expected to cost "
                f"${expected(cheapest):.6f}; the ceiling is ${ceiling:.6f}"
            )
        return cheapest


def _needed(prompt: Prompt) -> set[CapabilityName]:
    needed: set[CapabilityName] = {"chat"}
    if prompt.tools:
        needed.add("tools")
    if isinstance(prompt.response_format, SchemaJson):
        needed.add("json_schema")
    if any(isinstance(part, ImagePart) for each in prompt.messages for part in each.parts):
        needed.add("images")
    return needed


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
