"""Which requests go wrong and how: asked for by marker or header, or struck by a seeded rate."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from agent360.mesh.simulator.settings import SimulatorSettings

HEADER: Final = "X-Sim"
"""Request header with the same directives as the markers, separated by commas."""

_MARKER: Final = re.compile(r"\[\[sim:([a-z_]+)(?:=([^\]]{1,40}))?\]\]")
_DIRECTIVE: Final = re.compile(r"\s*([a-z_]+)(?:=([^,]{1,40}))?\s*")
_BREAK_WITHIN_TOKENS: Final = 12
_MAX_TOKENS: Final = 100_000
_MAX_STALL_S: Final = 3_600.0


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How one request is answered."""

    error: int = 0
    """HTTP status of a refusal; 0: none. ``[[sim:error=503]]``."""
    retry_after: float | None = None
    """Retry-After of the refusal, in seconds. ``[[sim:retry_after=2]]``."""
    stall_s: float = 0.0
    """How long nothing is said. ``[[sim:stall=5]]``, after token 10: ``[[sim:stall=5@10]]``."""
    stall_after: int = 0
    """After how many tokens the stall comes."""
    break_after: int | None = None
    """After how many tokens the connection is cut. ``[[sim:break=10]]``."""
    tokens: int = 0
    """Length of the answer; 0: it follows from the prompt. ``[[sim:tokens=200]]``."""
    thoughts: int = 0
    """Tokens of thoughts before the answer, as reasoning models have them. ``[[sim:think=20]]``."""
    first_token_s: float | None = None
    """Time to the first token instead of the settings'. ``[[sim:ttft=0.5]]``."""
    inter_token_s: float | None = None
    """Time between tokens instead of the settings'. ``[[sim:itl=0.01]]``."""
    usage: bool = True
    """False: the answer does not say how many tokens it took. ``[[sim:no_usage]]``."""
    malformed_after: int | None = None
    """After how many tokens something that is not JSON is sent. ``[[sim:malformed=3]]``."""


class DirectiveError(ValueError):
    """A marker or header asks for something that the simulator does not know."""


class Faults:
    """Decides how each request is answered.

    Example:
        >>> faults = Faults(SimulatorSettings(error_rate=0.1, seed=7))
        >>> faults.behaviour("Plan a trip [[sim:break=10]]", "").break_after
        10
    """

    def __init__(self, settings: SimulatorSettings) -> None:
        self._settings = settings
        self._random = random.Random(settings.seed)
        self._to_fail = settings.error_first

    def behaviour(self, prompt: str, header: str) -> Behaviour:
        """How to answer a request; what it asks for goes before the rates.

        Raises:
            DirectiveError: a directive is unknown or malformed.
        """
        chosen = self._struck()
        if "[[sim:" in prompt:
            for name, value in _MARKER.findall(prompt):
                chosen = _apply(chosen, name, value)
        if header:
            for part in header.split(","):
                found = _DIRECTIVE.fullmatch(part)
                if found is None:
                    raise DirectiveError(f"{HEADER}: {part!r} is not name or name=value")
                chosen = _apply(chosen, found[1], found[2] or "")
        return chosen

    def _struck(self) -> Behaviour:
        settings = self._settings
        if self._to_fail:
            self._to_fail -= 1
            return Behaviour(error=settings.error_status, retry_after=settings.error_retry_after_s)
        if not (settings.error_rate or settings.stall_rate or settings.break_rate):
            return _NORMAL
        # One draw a fault and request, whatever the others give: the rates stay independent.
        error, stall, cut = (self._random.random() for _ in range(3))
        where = self._random.randrange(1, _BREAK_WITHIN_TOKENS)
        return Behaviour(
            error=settings.error_status if error < settings.error_rate else 0,
            retry_after=settings.error_retry_after_s,
            stall_s=settings.stall_s if stall < settings.stall_rate else 0.0,
            break_after=where if cut < settings.break_rate else None,
        )


_NORMAL: Final = Behaviour()


def _apply(behaviour: Behaviour, name: str, value: str) -> Behaviour:
    try:
        return replace(behaviour, **_changes(name, value))
    except ValueError as error:
        raise DirectiveError(f"sim:{name}={value} is not understood: {error}") from error


def _changes(name: str, value: str) -> Mapping[str, Any]:
    match name:
        case "error":
            return {"error": _number(value, 400, 599)}
        case "retry_after":
            return {"retry_after": _seconds(value)}
        case "stall":
            seconds, _, after = value.partition("@")
            return {"stall_s": _seconds(seconds), "stall_after": _number(after or "0", 0)}
        case "break":
            return {"break_after": _number(value or "0", 0)}
        case "tokens":
            return {"tokens": _number(value, 1)}
        case "think":
            return {"thoughts": _number(value, 1)}
        case "ttft":
            return {"first_token_s": _seconds(value)}
        case "itl":
            return {"inter_token_s": _seconds(value)}
        case "no_usage":
            return {"usage": False}
        case "malformed":
            return {"malformed_after": _number(value or "0", 0)}
        case _:
            raise ValueError("there is no such directive")


def _number(value: str, low: int, high: int = _MAX_TOKENS) -> int:
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"must be {low} to {high}")
    return number


def _seconds(value: str) -> float:
    seconds = float(value)
    if not (math.isfinite(seconds) and 0 <= seconds <= _MAX_STALL_S):
        raise ValueError(f"must be 0 to {_MAX_STALL_S:g} seconds")
    return seconds
