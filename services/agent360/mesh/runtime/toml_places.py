"""Where things stand in a TOML file: ``tomllib`` does not say, and an error should."""

from __future__ import annotations

import re
from pathlib import Path


class Places:
    """Places in a file with an array of tables, as ``FILE:LINE``."""

    def __init__(self, file: Path, text: str, entries: str) -> None:
        """Looks for the tables.

        Args:
            file: shown in places.
            text: the file's content.
            entries: name of the array of tables, as in ``[[entries]]``.
        """
        self._file = file
        self._lines = text.splitlines()
        header = re.compile(rf"\s*\[\[\s*{re.escape(entries)}\s*\]\]")
        self._heads = [at for at, line in enumerate(self._lines) if header.match(line)]

    def of(self, number: int, *fields: str) -> str:
        """Of the first of the fields that an entry, counted from 0, has; else of the entry."""
        if number >= len(self._heads):
            return str(self._file)
        first = self._heads[number]
        after = self._heads[number + 1] if number + 1 < len(self._heads) else len(self._lines)
        found = (self._find(field, first, after) for field in fields)
        return self._at(next((at for at in found if at is not None), first))

    def of_key(self, key: str) -> str:
        """Of a key or table."""
        found = self._find(key, 0, len(self._lines))
        return self._at(found) if found is not None else str(self._file)

    def _find(self, key: str, first: int, after: int) -> int | None:
        table = r"(\[+\s*(?:[\w-]+\s*\.\s*)*)?"
        there = re.compile(rf'\s*{table}["\']?{re.escape(key)}["\']?\s*[=.\]]')
        return next((at for at in range(first, after) if there.match(self._lines[at])), None)

    def _at(self, line: int) -> str:
        return f"{self._file}:{line + 1}"
