"""Keeps answers and vectors in the cache, each under the name of whoever may see it."""

from __future__ import annotations

import grpc

from agent360.client.errors import MeshError
from agent360.mesh.inference.answers import Answer, Embeddings
from agent360.mesh.inference.caching.settings import ANSWERS, VECTORS, AnswerCacheSettings
from agent360.mesh.inference.codec import (
    decode_answer,
    decode_vectors,
    encode_answer,
    encode_vectors,
)
from agent360.mesh.inference.conversation import CacheControl, TaskClass
from agent360.mesh.inference.ports import AnswerCache, Place


class Keeper:
    """Finds and keeps complete answers.

    A place is found by scope and key. The scope is the tenant or, where the request and the
    settings of its tenant agree to share, the one tenant under which shared answers are held; so
    what was not shared is never seen by another tenant, and a request that shares sees only what
    was shared.

    Example:
        >>> place = keeper.place("acme", control, fingerprint.of_prompt(prompt, model))
        >>> answer = await keeper.find(place)
    """

    def __init__(self, cache: AnswerCache, settings: AnswerCacheSettings) -> None:
        self._cache = cache
        self._settings = settings
        self._sharing = frozenset(settings.sharing_tenants)

    def refuse_reserved(self, tenant: str) -> None:
        """Refuses requests in the name under which shared answers are held.

        Raises:
            MeshError: PERMISSION_DENIED, TENANT_RESERVED.
        """
        if tenant == self._settings.shared_tenant:
            raise MeshError(
                grpc.StatusCode.PERMISSION_DENIED,
                "TENANT_RESERVED",
                f"{tenant} holds shared answers and makes no requests: call as another tenant, or "
                "change cache.shared_tenant of the inference service",
                metadata={"tenant": tenant},
            )

    def scope(self, tenant: str, control: CacheControl) -> str:
        """The tenant in whose name an answer is kept and looked for."""
        if control.share and (tenant in self._sharing or "*" in self._sharing):
            return self._settings.shared_tenant
        return tenant

    def answer_place(self, scope: str, key: str) -> Place:
        """Where an answer is kept."""
        return Place(scope, ANSWERS, key)

    def vectors_place(self, scope: str, key: str) -> Place:
        """Where vectors are kept."""
        return Place(scope, VECTORS, key)

    def near_answer(self, place: Place) -> Answer | None:
        """The answer if a copy of it is in this process."""
        data = self._cache.near(place)
        return None if data is None else decode_answer(data)

    async def find_answer(self, place: Place) -> Answer | None:
        """The answer kept there, or None."""
        data = await self._cache.get(place)
        return None if data is None else decode_answer(data)

    async def claim_answer(self, place: Place, wait_s: float) -> tuple[Answer | None, str]:
        """The answer kept there or about to be; or None and the token of a claim, if it was given.

        Args:
            place: of the answer.
            wait_s: how long to wait for the answer of another process, in seconds.
        """
        claimed = await self._cache.claim(place, wait_s)
        answer = None if claimed.value is None else decode_answer(claimed.value)
        return answer, claimed.token

    async def keep_answer(
        self,
        place: Place,
        answer: Answer,
        control: CacheControl,
        task_class: TaskClass | None,
        token: str = "",
    ) -> None:
        """Keeps an answer, for as long as its request, its task class or the settings say.

        Args:
            place: where.
            answer: a complete one.
            control: of its request.
            task_class: of its request; None: none was found.
            token: of a claim.
        """
        ttl_s = self._answer_ttl_s(control, task_class)
        await self._cache.put(place, encode_answer(answer), ttl_s, token)

    async def find_vectors(self, place: Place) -> Embeddings | None:
        """The vectors kept there, or None."""
        data = await self._cache.get(place)
        return None if data is None else decode_vectors(data)

    async def keep_vectors(self, place: Place, found: Embeddings, control: CacheControl) -> None:
        """Keeps vectors."""
        settings = self._settings
        ttl_s = min(control.ttl_s or settings.embeddings_ttl_s, settings.max_ttl_s)
        await self._cache.put(place, encode_vectors(found), ttl_s)

    def _answer_ttl_s(self, control: CacheControl, task_class: TaskClass | None) -> float:
        settings = self._settings
        of_class = settings.ttl_by_task_class.get(task_class) if task_class else None
        return min(control.ttl_s or of_class or settings.ttl_s, settings.max_ttl_s)
