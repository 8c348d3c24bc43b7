"""Answers kept in the cache service."""

from __future__ import annotations

import grpc
import structlog

from agent360.client import Mesh
from agent360.client.errors import MeshError
from agent360.mesh.inference.peers.reachability import Reachability
from agent360.mesh.inference.ports import Claimed, Place


class MeshAnswerCache:
    """The port ``AnswerCache`` over the mesh's cache service, which keeps tenants apart.

    Whatever goes wrong is a miss: it is counted, the log is told once, and the model is run.
    """

    def __init__(self, mesh: Mesh, timeout_s: float, log: structlog.stdlib.BoundLogger) -> None:
        self._mesh = mesh
        self._timeout_s = timeout_s
        self._reach = Reachability("cache", "every request runs a model", log)

    def near(self, place: Place) -> bytes | None:
        """See ``AnswerCache.near``."""
        lookup = self._mesh.cache.peek(place.key, namespace=place.namespace, tenant=place.scope)
        return None if lookup is None else lookup.value

    async def get(self, place: Place) -> bytes | None:
        """See ``AnswerCache.get``."""
        if not self._reach.worth_asking():
            self._unanswered(place)
            return None
        try:
            lookup = await self._mesh.cache.get(
                place.key,
                namespace=place.namespace,
                timeout=self._timeout_s,
                tenant=place.scope,
            )
        except MeshError as error:
            self._failed(place, error)
            return None
        self._reach.answered()
        return lookup.value if lookup.hit else None

    async def claim(self, place: Place, wait_s: float) -> Claimed:
        """See ``AnswerCache.claim``."""
        if not self._reach.worth_asking():
            self._unanswered(place)
            return Claimed(None)
        try:
            claim = await self._mesh.cache.claim(
                place.key,
                namespace=place.namespace,
                fill_timeout=wait_s,
                timeout=wait_s,
                tenant=place.scope,
            )
        except MeshError as error:
            # Who waited for another's answer in vain has not found the cache service away.
            if error.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                self._failed(place, error)
            return Claimed(None)
        self._reach.answered()
        return Claimed(claim.lookup.value if claim.lookup.hit else None, claim.fill_token)

    async def put(self, place: Place, value: bytes, ttl_s: float, token: str = "") -> None:
        """See ``AnswerCache.put``."""
        if not self._reach.worth_asking():
            return
        try:
            if token:
                await self._mesh.cache.fill(
                    token,
                    place.key,
                    value,
                    namespace=place.namespace,
                    ttl=ttl_s,
                    timeout=self._timeout_s,
                    tenant=place.scope,
                )
            else:
                await self._mesh.cache.set(
                    place.key,
                    value,
                    namespace=place.namespace,
                    ttl=ttl_s,
                    timeout=self._timeout_s,
                    tenant=place.scope,
                )
        except MeshError as error:
            self._failed(place, error)
        else:
            self._reach.answered()

    async def abandon(self, place: Place, token: str, error: MeshError) -> None:
        """See ``AnswerCache.abandon``."""
        try:
            await self._mesh.cache.fail(token, error, timeout=self._timeout_s, tenant=place.scope)
        except MeshError as failure:
            self._failed(place, failure)

    def _failed(self, place: Place, error: MeshError) -> None:
        self._reach.failed(error)
        self._unanswered(place)

    def _unanswered(self, place: Place) -> None:
        self._mesh.metrics.count("inference_cache_unanswered_total", tenant=place.scope)


class NoAnswerCache:
    """The port ``AnswerCache`` where nothing is kept."""

    def near(self, place: Place) -> bytes | None:  # noqa: ARG002
        """See ``AnswerCache.near``."""
        return None

    async def get(self, place: Place) -> bytes | None:  # noqa: ARG002
        """See ``AnswerCache.get``."""
        return None

    async def claim(self, place: Place, wait_s: float) -> Claimed:  # noqa: ARG002
        """See ``AnswerCache.claim``."""
        return Claimed(None)

    async def put(self, place: Place, value: bytes, ttl_s: float, token: str = "") -> None:
        """See ``AnswerCache.put``."""

    async def abandon(self, place: Place, token: str, error: MeshError) -> None:
        """See ``AnswerCache.abandon``."""
