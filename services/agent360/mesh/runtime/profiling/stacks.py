"""Profiles as weighted stacks, in the JSON of speedscope."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple

JSON_TYPE: Final = "application/json"
"""Media type of speedscope's JSON."""

HTML_TYPE: Final = "text/html; charset=utf-8"
"""Media type of a page."""

Unit = Literal["seconds", "bytes", "none"]

_SCHEMA: Final = "https://www.speedscope.app/file-format-schema.json"


class Profile(NamedTuple):
    """A finished profile."""

    content_type: str
    """Its media type."""
    content: bytes
    """The file."""


class Frame(NamedTuple):
    """A function in a stack."""

    name: str
    file: str = ""
    line: int = 0


class Stack(NamedTuple):
    """What a stack weighs."""

    frames: tuple[Frame, ...]
    """From the outermost to the innermost."""
    weight: float
    """In the profile's unit."""


def speedscope(name: str, parts: Iterable[tuple[str, Unit, Sequence[Stack]]]) -> Profile:
    """The JSON that speedscope opens (its file format specification, version 0.0.1).

    Args:
        name: of the whole.
        parts: name, unit and stacks of each profile in the file.
    """
    places: dict[Frame, int] = {}
    profiles: list[dict[str, Any]] = []
    for title, unit, stacks in parts:
        total = sum(stack.weight for stack in stacks)
        profiles.append(
            {
                "type": "sampled",
                "name": title,
                "unit": unit,
                "startValue": 0,
                "endValue": total,
                "samples": [
                    [places.setdefault(frame, len(places)) for frame in stack.frames]
                    for stack in stacks
                ],
                "weights": [stack.weight for stack in stacks],
            }
        )
    frames = [
        {"name": frame.name} | ({"file": frame.file, "line": frame.line} if frame.file else {})
        for frame in places
    ]
    document = {
        "$schema": _SCHEMA,
        "name": name,
        "exporter": "agent360-mesh",
        "activeProfileIndex": 0,
        "shared": {"frames": frames},
        "profiles": profiles,
    }
    return Profile(JSON_TYPE, json.dumps(document, separators=(",", ":")).encode())
