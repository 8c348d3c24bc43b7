"""Asks a model server how many tokens a prompt has, as vLLM and llama.cpp can say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal

import grpc

from agent360.client.errors import MeshError
from agent360.mesh.inference.backends import openai_format as form
from agent360.mesh.inference.conversation import Prompt

Post = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
"""Sends a JSON body to a path of the server, counted from its root, and reads the answer."""

_NOT_NOW: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


class TokenCounts:
    """Counts by ``/tokenize``, whose two forms are told apart by the first answer.

    vLLM takes messages and answers with ``count``; llama.cpp takes a text, which its
    ``/apply-template`` makes of messages, and answers with ``tokens``. A server that knows neither
    is not asked again.

    Example:
        >>> counts = TokenCounts(post)
        >>> await counts.of_prompt(prompt, "llama")
        12
    """

    def __init__(self, post: Post) -> None:
        self._post = post
        self._kind: Literal["unknown", "vllm", "llama.cpp", "none"] = "unknown"

    async def of_prompt(self, prompt: Prompt, model: str) -> int | None:
        """Tokens of a prompt; None: the server does not say.

        Raises:
            MeshError: the server does not answer now.
        """
        if self._kind == "none":
            return None
        try:
            if self._kind == "llama.cpp":
                return await self._by_text(prompt)
            counted, takes_text = await self._by_messages(prompt, model)
            return await self._by_text(prompt) if takes_text else counted
        except MeshError as error:
            if error.code in _NOT_NOW:
                raise
            if self._kind == "unknown":
                self._kind = "none"
            return None

    async def _by_messages(self, prompt: Prompt, model: str) -> tuple[int | None, bool]:
        """What vLLM counts, and whether this is llama.cpp, which counts texts."""
        body = {"model": model, "add_generation_prompt": True, **_asked(prompt)}
        found = await self._post("/tokenize", body)
        count = found.get("count")
        if isinstance(count, int):
            self._kind = "vllm"
            return count, False
        takes_text = isinstance(found.get("tokens"), list)
        self._kind = "llama.cpp" if takes_text else "none"
        return None, takes_text

    async def _by_text(self, prompt: Prompt) -> int | None:
        text = (await self._post("/apply-template", _asked(prompt))).get("prompt")
        if not isinstance(text, str):
            return None
        body = {"content": text, "add_special": True, "parse_special": True}
        found = (await self._post("/tokenize", body)).get("tokens")
        return len(found) if isinstance(found, list) else None


def _asked(prompt: Prompt) -> dict[str, Any]:
    """The parts of a chat request that become tokens of the prompt."""
    body = form.chat_body(prompt, "", streamed=False, max_tokens_field="max_tokens")
    return {name: body[name] for name in ("messages", "tools", "tool_choice") if name in body}
