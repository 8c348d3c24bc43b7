"""Counts the tokens of a prompt with the best that is at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from agent360.client.errors import MeshError
from agent360.mesh.inference import tokens
from agent360.mesh.inference.conversation import Prompt
from agent360.mesh.inference.counting.tokenizers import Tokenizers
from agent360.mesh.inference.members import Member
from agent360.mesh.inference.settings import ModelSettings

Means = Literal["tokenizer", "backend", "bytes"]


class Count(NamedTuple):
    """Tokens, and how they were counted."""

    tokens: int
    """How many."""
    estimated: bool
    """Whether it is an estimate."""
    by: Means
    """The model's own tokenizer, its backend, or an estimate from the length in bytes."""


class TokenCounter:
    """Counts by the model's own tokenizer, else by its backend, else estimates.

    Example:
        >>> count = await counter.count(model, prompt)
        >>> count.tokens, count.estimated, count.by
        (12, False, 'tokenizer')
    """

    def __init__(
        self, tokenizers: Tokenizers, members: Callable[[ModelSettings], Sequence[Member]]
    ) -> None:
        """Makes a counter.

        Args:
            tokenizers: those of the models.
            members: the backends of a model.
        """
        self._tokenizers = tokenizers
        self._members = members

    async def at_hand(self, model: ModelSettings, prompt: Prompt) -> Count:
        """Tokens of a prompt, without asking any server; for limits."""
        if model.tokenizer is not None:
            tokenizer = self._tokenizers.loaded(model.tokenizer)
            if tokenizer is not None:
                counted, exact = await tokenizer.count_prompt(prompt)
                return Count(counted, not exact, "tokenizer")
        return Count(tokens.estimate_prompt(prompt), True, "bytes")

    async def of_inputs(self, model: ModelSettings, texts: Sequence[str]) -> Count:
        """Tokens of texts to be embedded, as ``at_hand``."""
        if model.tokenizer is not None:
            tokenizer = self._tokenizers.loaded(model.tokenizer)
            if tokenizer is not None:
                return Count(await tokenizer.count_texts(texts), False, "tokenizer")
        return Count(tokens.estimate_inputs(texts), True, "bytes")

    async def count(self, model: ModelSettings, prompt: Prompt) -> Count:
        """Tokens of a prompt, as exactly as anybody can say."""
        own: Count | None = None
        if model.tokenizer is not None and await self._tokenizers.load(model.tokenizer):
            own = await self.at_hand(model, prompt)
            if not own.estimated:
                return own
        counted = await self._ask_backend(model, prompt)
        if counted is not None:
            return Count(counted, False, "backend")
        return own or await self.at_hand(model, prompt)

    async def _ask_backend(self, model: ModelSettings, prompt: Prompt) -> int | None:
        """What the healthiest backend of a model counts; None: it does not say, or not now."""
        members = self._members(model)
        if not members:
            return None
        member = min(members, key=lambda each: each.rank(model))
        try:
            return await member.backend.count_tokens(prompt, model.upstream_name)
        except MeshError:
            return None
