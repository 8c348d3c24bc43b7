"""Answers kept in the cache service."""

from __future__ import annotations

import structlog

from agent360.client import Mesh
from agent360.client.errors import MeshError
from agent360.mesh.inference.peers.reachability import Reachability


class MeshAnswerCache:
    """The port ``AnswerCache`` over the mesh's cache service, which keeps tenants apart.

    Whatever goes wrong is a miss: it is counted, the log is told once, and the model is run.
    """

    def __init__(self, mesh: Mesh, timeout_s: float, log: structlog.stdlib.BoundLogger) -> None:
        self._mesh = mesh
        self._timeout_s = timeout_s
        self._reach = Reachability("cache", "every request runs a model", log)

    async def get(self, tenant: str, namespace: str, key: str) -> bytes | None:
        """See ``AnswerCache.get``."""
        if not self._reach.worth_asking():
            self._unanswered(tenant)
            return None
        try:
            lookup = await self._mesh.cache.get(
                key, namespace=namespace, timeout=self._timeout_s, tenant=tenant
            )
        except MeshError as error:
            self._reach.failed(error)
            self._unanswered(tenant)
            return None
        self._reach.answered()
        return lookup.value if lookup.hit else None

    async def put(self, tenant: str, namespace: str, key: str, value: bytes, ttl_s: float) -> None:
        """See ``AnswerCache.put``."""
        if not self._reach.worth_asking():
            return
        try:
            await self._mesh.cache.set(
                key, value, namespace=namespace, ttl=ttl_s, timeout=self._timeout_s, tenant=tenant
            )
        except MeshError as error:
            self._reach.failed(error)
            self._unanswered(tenant)
        else:
            self._reach.answered()

    def _unanswered(self, tenant: str) -> None:
        self._mesh.metrics.count("inference_cache_unanswered_total", tenant=tenant)


class NoAnswerCache:
    """The port ``AnswerCache`` where nothing is kept."""

    async def get(self, tenant: str, namespace: str, key: str) -> bytes | None:  # noqa: ARG002
        """See ``AnswerCache.get``."""
        return None

    async def put(self, tenant: str, namespace: str, key: str, value: bytes, ttl_s: float) -> None:
        """See ``AnswerCache.put``."""
