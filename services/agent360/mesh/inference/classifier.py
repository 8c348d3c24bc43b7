"""How demanding a request is: the rules of the house, or a function of the operator's own."""

from __future__ import annotations

import importlib
from typing import NamedTuple, Protocol

import structlog

from agent360.mesh.inference.conversation import Prompt, SchemaJson, TaskClass
from agent360.mesh.inference.settings import AutoSettings
from agent360.mesh.inference.tokens import estimate_prompt
from agent360.mesh.runtime.settings import SettingError


class Verdict(NamedTuple):
    """The class of a request and what decided it."""

    task_class: TaskClass
    because: str
    """In a few words, such as ``tools`` or ``length: 812 tokens``; callers see it."""


class Classifier(Protocol):
    """Tells complex requests from simple ones. It runs on the event loop: it must not wait."""

    def __call__(self, prompt: Prompt) -> Verdict:
        """The class of a request."""


class Rules:
    """Tools, a JSON schema, many turns or a long prompt make a request complex.

    Example:
        >>> Rules(AutoSettings())(prompt)
        Verdict(task_class='simple', because='length: 12 tokens')
    """

    def __init__(self, settings: AutoSettings) -> None:
        self._settings = settings

    def __call__(self, prompt: Prompt) -> Verdict:
        """See ``Classifier``."""
        settings = self._settings
        if prompt.tools and settings.tools_are_complex:
            return Verdict("complex", "tools")
        if isinstance(prompt.response_format, SchemaJson):
            return Verdict("complex", "schema")
        if len(prompt.messages) >= settings.complex_messages:
            return Verdict("complex", f"turns: {len(prompt.messages)}")
        tokens = estimate_prompt(prompt)
        long = tokens >= settings.complex_prompt_tokens
        return Verdict("complex" if long else "simple", f"length: {tokens} tokens")


class _Guarded:
    """An operator's function; where it fails, the rules decide and the log says so."""

    def __init__(self, own: Classifier, rules: Rules, log: structlog.stdlib.BoundLogger) -> None:
        self._own = own
        self._rules = rules
        self._log = log

    def __call__(self, prompt: Prompt) -> Verdict:
        try:
            task_class, because = self._own(prompt)
            if task_class not in ("simple", "complex"):
                raise ValueError(f"it returned the class {task_class!r}")  # noqa: TRY301 - as any other
        except Exception:  # noqa: BLE001 - whatever a stranger's function raises
            self._log.exception("the classifier failed; the rules decide")
            return self._rules(prompt)
        return Verdict(task_class, str(because))


def classifier_of(settings: AutoSettings, log: structlog.stdlib.BoundLogger) -> Classifier:
    """The classifier that the settings name.

    Raises:
        SettingError: there is no such function.
    """
    rules = Rules(settings)
    if not settings.classifier:
        return rules
    module, _, name = settings.classifier.partition(":")
    try:
        own = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(
            f"auto.classifier: {settings.classifier!r} cannot be imported ({error}); "
            "expected package.module:name"
        ) from error
    if not callable(own):
        raise SettingError(f"auto.classifier: {settings.classifier!r} is not a function")
    return _Guarded(own, rules, log)
