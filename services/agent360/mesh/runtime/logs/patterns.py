"""Patterns of log messages: the message without what varies."""

from __future__ import annotations

import re
from typing import Final

from agent360.mesh.runtime.redaction import Redactor

OTHER: Final = "other"
"""The pattern of messages beyond those that are told apart."""

_MAX_BYTES: Final = 200
_VARIES: Final = re.compile(
    r"'[^']*'|\"[^\"]*\"|\b0x[0-9a-fA-F]+|\b[0-9a-fA-F]{8}-[0-9a-fA-F-]{27}\b|"
    r"\b(?=[a-f]*\d)[0-9a-f]{12,}\b|\d+(?:[.:]\d+)*"
)
_KNOWN_TEXTS: Final = 4_096


class Patterns:
    """Finds the pattern of a message; only so many are told apart.

    Example:
        >>> Patterns(500, redactor).of("took 17.5 s for 'acme'")
        'took * s for *'
    """

    def __init__(self, limit: int, redactor: Redactor) -> None:
        """Begins without any.

        Args:
            limit: how many are told apart; then all others are ``other``.
            redactor: takes secrets out of them.
        """
        self._limit = limit
        self._redactor = redactor
        self._patterns: set[str] = set()
        self._by_text: dict[str, str] = {}

    def of(self, text: str) -> str:
        """The pattern of a message."""
        found = self._by_text.get(text)
        if found is None:
            found = self._admitted(self._redactor.text(text))
            if len(self._by_text) >= _KNOWN_TEXTS:
                self._by_text.clear()
            self._by_text[text] = found
        return found

    def _admitted(self, text: str) -> str:
        lines = text[: 8 * _MAX_BYTES].splitlines()
        pattern = _VARIES.sub("*", lines[0] if lines else "")
        pattern = pattern.encode(errors="replace")[:_MAX_BYTES].decode(errors="ignore").strip()
        if pattern not in self._patterns:
            if len(self._patterns) >= self._limit:
                return OTHER
            self._patterns.add(pattern)
        return pattern
