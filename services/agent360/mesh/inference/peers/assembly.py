"""Connects the inference service to the other services of the mesh, as the settings say."""

from __future__ import annotations

from typing import NamedTuple

import structlog
from prometheus_client import CollectorRegistry

from agent360.client import Mesh
from agent360.mesh.inference.peers.answer_cache import MeshAnswerCache, NoAnswerCache
from agent360.mesh.inference.peers.meter import MeshMeter
from agent360.mesh.inference.peers.quota import MeshQuota, NoQuota
from agent360.mesh.inference.peers.usage_log import usage_log
from agent360.mesh.inference.ports import AnswerCache, Meter, Quota
from agent360.mesh.inference.settings import InferenceSettings


class Peers(NamedTuple):
    """The other services, as ports."""

    cache: AnswerCache
    quota: Quota
    meter: Meter


def connect_peers(
    mesh: Mesh,
    settings: InferenceSettings,
    registry: CollectorRegistry,
    log: structlog.stdlib.BoundLogger,
) -> Peers:
    """The other services as the settings say: asked, or done without."""
    cache: AnswerCache = NoAnswerCache()
    if settings.cache.enabled:
        cache = MeshAnswerCache(mesh, settings.cache.timeout_s, log)
    quota: Quota = NoQuota()
    limits = settings.limits
    if limits.enabled:
        quota = MeshQuota(
            mesh,
            log,
            timeout_s=limits.timeout_s,
            when_away=limits.when_away,
            unlimited_s=limits.unlimited_s,
            slot_ttl_s=limits.slot_ttl_s,
        )
    meter = MeshMeter(mesh, registry, usage_log(mesh, settings.usage.records))
    return Peers(cache, quota, meter)
