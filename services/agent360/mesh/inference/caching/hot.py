"""Requests that were answered from a near copy before, by their very bytes."""

from __future__ import annotations

import hashlib
from typing import Final

from agent360.mesh.inference.answers import Answer
from agent360.mesh.inference.codec import decode_answer
from agent360.mesh.inference.ports import AnswerCache, Payer, Place
from agent360.mesh.inference.routing import Route

MAX_REQUEST_BYTES: Final = 16 * 2**10
"""Larger requests are not remembered: reading them is not what they cost most."""
_MAX_REQUESTS: Final = 10_000
_MAX_BYTES: Final = 32 * 2**20
_FORMS: Final = 3
"""An answer is held as it was kept, as it was read, and as it is given out."""
_DIGEST_BYTES: Final = 16


class Hot:
    """What a request led to the last time."""

    __slots__ = ("answer", "data", "form", "payer", "place", "route")

    def __init__(self, route: Route, payer: Payer, place: Place) -> None:
        self.route = route
        self.payer = payer
        self.place = place
        self.data: bytes | None = None
        """The copy that ``answer`` was read from."""
        self.answer: Answer | None = None
        self.form: object = None
        """The answer in the form in which the caller of this module gives it out; None: not yet."""


class HotAnswers:
    """Spares known requests their reading, routing and naming.

    Only requests that name their model are remembered, so that the same bytes of the same tenant
    mean the same place in the cache as long as the model is the same.

    Example:
        >>> hot = answers.find("acme", request_bytes)
        >>> if hot is not None and answers.refresh(hot):
        ...     return hot.answer
    """

    def __init__(self, cache: AnswerCache) -> None:
        self._cache = cache
        self._known: dict[tuple[str, bytes], Hot] = {}
        self._bytes = 0

    def find(self, tenant: str, asked: bytes) -> Hot | None:
        """What the same request of the same tenant led to."""
        if not self._known or len(asked) > MAX_REQUEST_BYTES:
            return None
        return self._known.get((tenant, _digest(asked)))

    def refresh(self, hot: Hot) -> bool:
        """Takes the present copy of the answer; False: there is none near."""
        data = self._cache.near(hot.place)
        if data is None:
            return False
        if data is not hot.data:
            self._bytes += _FORMS * (len(data) - len(hot.data or b""))
            hot.data, hot.answer, hot.form = data, decode_answer(data), None
            while self._bytes > _MAX_BYTES and len(self._known) > 1:
                self._drop(next(iter(self._known)))
        return hot.answer is not None

    def remember(self, tenant: str, asked: bytes, hot: Hot) -> None:
        """Notes what a request led to; the oldest note gives way when there are too many."""
        if len(asked) > MAX_REQUEST_BYTES:
            return
        key = tenant, _digest(asked)
        self._drop(key)
        if len(self._known) >= _MAX_REQUESTS:
            self._drop(next(iter(self._known)))
        self._known[key] = hot

    def forget(self, tenant: str, asked: bytes) -> None:
        """Drops a note that does not hold any more."""
        self._drop((tenant, _digest(asked)))

    def _drop(self, key: tuple[str, bytes]) -> None:
        hot = self._known.pop(key, None)
        if hot is not None and hot.data is not None:
            self._bytes -= _FORMS * len(hot.data)


def _digest(asked: bytes) -> bytes:
    return hashlib.blake2b(asked, digest_size=_DIGEST_BYTES).digest()
