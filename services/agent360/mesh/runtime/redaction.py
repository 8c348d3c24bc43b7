"""Takes secrets out of what is stored or logged, by the names they go by and by how they look."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from agent360.mesh.runtime.settings import RedactionSettings

REDACTED: Final = "[redacted]"
"""What stands in place of a secret."""

_MAX_DEPTH: Final = 8
_MAY_NAME_ONE: Final = re.compile(r"[=:]")
_USER_INFO: Final = re.compile(r"(?<=://)([^/\s:@]*):[^/\s@]+@")
_BEARER: Final = re.compile(r"(?i)\b(bearer)\s+[\w.~+/=-]{8,}")
_ASSIGNED_TO: Final = re.compile(r"(?<![\w-])([\w-]++)[\"']?\s*+[=:]\s*+")
_VALUE: Final = re.compile(
    r"(?:bearer |basic )?+"
    r"(?:\"(?:[^\"\\]|\\.)*+(?:\"|\\?$)|'(?:[^'\\]|\\.)*+(?:'|\\?$)|[^\s,;&\"'#]+)",
    re.IGNORECASE | re.DOTALL,
)
"""A value, quoted or not; the closing quote is missing where the text was cut."""
_WORD_BREAK: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]+")


class Redactor:
    """Replaces secrets; keeps everything else as it is.

    Example:
        >>> redactor = Redactor(RedactionSettings())
        >>> redactor.named("api_key", "k-123")
        '[redacted]'
        >>> redactor.text("GET /plans?token=abc&page=2")
        'GET /plans?token=[redacted]&page=2'
    """

    def __init__(self, settings: RedactionSettings) -> None:
        """Prepares the patterns.

        Args:
            settings: which names and texts are secrets.
        """
        names = [_as_regex(name) for name in settings.names]
        self._name = re.compile("|".join(names) or r"(?!)", re.IGNORECASE)
        self._looks = re.compile("|".join(settings.values) or r"(?!)")
        self._known_names: dict[str, bool] = {}

    def is_secret(self, name: str) -> bool:
        """Whether a field of that name holds a secret."""
        known = self._known_names.get(name)
        if known is None:
            plain = _WORD_BREAK.sub("_", name)
            known = self._name.fullmatch(plain) is not None
            if len(self._known_names) < _MAX_NAMES:
                self._known_names[name] = known
        return known

    def named(self, name: str, value: str) -> str:
        """A field's value, without what is secret in it."""
        return REDACTED if self.is_secret(name) else self.text(value)

    def text(self, text: str) -> str:
        """A text without the secrets in it: assigned to their names, in URLs, or by their looks."""
        if _MAY_NAME_ONE.search(text) is not None:
            text = _USER_INFO.sub(rf"\1:{REDACTED}@", text)
            text = self._without_assigned(text)
        text = _BEARER.sub(rf"\1 {REDACTED}", text)
        return self._looks.sub(REDACTED, text)

    def _without_assigned(self, text: str) -> str:
        """The text without what is assigned to names of secrets; in time linear in its length."""
        parts: list[str] = []
        done = place = 0
        while (name := _ASSIGNED_TO.search(text, place)) is not None:
            place = name.end()
            if self._name.fullmatch(name[1]) is None:
                continue
            value = _VALUE.match(text, place)
            if value is not None:
                parts += (text[done:place], REDACTED)
                done = place = value.end()
        return "".join((*parts, text[done:])) if parts else text

    def value(self, value: Any, depth: int = 0) -> Any:
        """A value of JSON without the secrets in it; what is nested too deeply is left out."""
        if isinstance(value, str):
            return self.text(value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if depth >= _MAX_DEPTH:
            return "..."
        if isinstance(value, Mapping):
            return {
                key: REDACTED if self.is_secret(str(key)) else self.value(inner, depth + 1)
                for key, inner in value.items()
            }
        if isinstance(value, list | tuple | set | frozenset):
            return [self.value(inner, depth + 1) for inner in value]
        return self.text(str(value))


_MAX_NAMES: Final = 10_000


def _as_regex(name: str) -> str:
    """A pattern of names: ``*`` is any part of one, and words may be joined by anything."""
    parts = (re.escape(part).replace("_", "[_-]?") for part in name.split("*"))
    return r"[\w-]*".join(parts)
