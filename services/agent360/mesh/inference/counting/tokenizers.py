"""The models' own tokenizers, read from files by the ``tokenizers`` library."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from agent360.mesh.inference import tokens
from agent360.mesh.inference.conversation import Prompt
from agent360.mesh.inference.counting.chat_template import ChatTemplate, read_template

_MAX_ON_LOOP_BYTES: Final = 4_096
"""A longer text is counted on another thread: tokenizing takes about a millisecond for 10 kB."""


class ModelTokenizer:
    """The tokenizer of a model and, where it is known, the form it gives to conversations."""

    def __init__(self, encoder: Any, template: ChatTemplate | None) -> None:
        self._encoder = encoder
        self._template = template

    async def count_prompt(self, prompt: Prompt) -> tuple[int, bool]:
        """Tokens of a prompt, and whether that is exact: not so without the model's template."""
        if self._template is None or tokens.has_images(prompt):
            texts, overhead = tokens.texts_of(prompt)
            return overhead + await self.count_texts(texts, special=False), False
        # The template writes the special tokens itself.
        return await self.count_texts([self._template.render(prompt)], special=False), True

    async def count_texts(self, texts: Sequence[str], *, special: bool = True) -> int:
        """Tokens of texts, each on its own.

        Args:
            texts: to count.
            special: whether each gets the tokens that the model wants around a text.
        """
        if sum(map(len, texts)) <= _MAX_ON_LOOP_BYTES:
            return self._count(texts, special)
        return await asyncio.to_thread(self._count, texts, special)

    def _count(self, texts: Sequence[str], special: bool) -> int:
        encoded = self._encoder.encode_batch_fast(list(texts), add_special_tokens=special)
        return sum(len(each) for each in encoded)


class Tokenizers:
    """Tokenizers by path, read once, on another thread.

    One that cannot be read is told to the log once, and its model's tokens are estimated.

    Example:
        >>> tokenizers = Tokenizers(log)
        >>> await tokenizers.load(Path("models/small/tokenizer.json"))
        >>> tokenizers.loaded(Path("models/small/tokenizer.json"))
    """

    def __init__(self, log: structlog.stdlib.BoundLogger) -> None:
        self._log = log
        self._reading: dict[Path, asyncio.Task[ModelTokenizer | None]] = {}

    def loaded(self, path: Path) -> ModelTokenizer | None:
        """The tokenizer if it has been read; else it will be, and None is returned."""
        task = self._task(path)
        return task.result() if task.done() else None

    async def load(self, path: Path) -> ModelTokenizer | None:
        """The tokenizer; None if it cannot be read."""
        return await asyncio.shield(self._task(path))

    def _task(self, path: Path) -> asyncio.Task[ModelTokenizer | None]:
        task = self._reading.get(path)
        if task is None:
            task = self._reading[path] = asyncio.ensure_future(self._read(path))
        return task

    async def _read(self, path: Path) -> ModelTokenizer | None:
        try:
            return await asyncio.to_thread(_read, path)
        except Exception as error:  # noqa: BLE001 - the library raises plain Exceptions
            self._log.warning(
                "a tokenizer cannot be read: tokens of its models are estimated",
                path=str(path),
                error=f"{type(error).__name__}: {error}",
            )
            return None


def _read(path: Path) -> ModelTokenizer:
    """Reads a tokenizer, and the template beside it if ``path`` is a directory.

    Raises:
        ImportError: the extra ``tokenizers`` is not installed.
        Exception: the files are not there, or are not what they should be.
    """
    from tokenizers import Tokenizer  # noqa: PLC0415 - an optional dependency

    if path.is_dir():
        encoder = Tokenizer.from_file(str(path / "tokenizer.json"))
        return ModelTokenizer(encoder, read_template(path))
    return ModelTokenizer(Tokenizer.from_file(str(path)), None)
