"""What can be set of kept and shared answers, with its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from pydantic import Field, model_validator

from agent360.mesh.inference.conversation import TaskClass
from agent360.mesh.runtime.settings import Settings

ANSWERS: Final = "inference.generate"
"""The cache namespace of answers."""
VECTORS: Final = "inference.embed"
"""The cache namespace of vectors."""

Billing = Literal["leader", "each", "split"]


class AnswerCacheSettings(Settings):
    """How answers are kept in the cache service."""

    enabled: bool = True
    """Whether answers are kept."""
    ttl_s: float = Field(default=3600.0, gt=0)
    """How long an answer is kept where neither the request nor its task class says, in seconds."""
    ttl_by_task_class: Mapping[TaskClass, float] = {}
    """How long answers of a task class are kept, in seconds."""
    embeddings_ttl_s: float = Field(default=86_400.0, gt=0)
    """How long vectors are kept where the request does not say, in seconds."""
    max_ttl_s: float = Field(default=86_400.0, gt=0)
    """A longer time is cut to this, in seconds."""
    timeout_s: float = Field(default=0.25, gt=0)
    """How long the cache service is waited for before the model is run, in seconds."""
    near_entries: int = Field(default=10_000, ge=0)
    """Answers of which a copy is held in this process, so that nobody need be asked; 0: none."""
    near_bytes: int = Field(default=64 * 2**20, gt=0)
    """Most bytes of these copies."""
    near_tenants: int = Field(default=256, gt=0)
    """Tenants of which copies are held at a time; each costs a stream to the cache service."""
    sharing_tenants: tuple[str, ...] = ()
    """Tenants whose requests may share answers where both say ``share``; ``*`` stands for all."""
    shared_tenant: str = Field(default="shared-answers", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """The tenant under which the cache holds shared answers. It is nobody's: requests in its name
    are refused, and so are API keys that are bound to it; another name than this one has to be
    among the cache service's ``tenants.reserved``. A cache with strict tenants must know it."""

    @model_validator(mode="after")
    def _times_are_positive(self) -> AnswerCacheSettings:
        for task_class, ttl_s in self.ttl_by_task_class.items():
            if not ttl_s > 0:
                raise ValueError(f"ttl_by_task_class: {task_class} must be above zero")
        if self.shared_tenant in self.sharing_tenants:
            raise ValueError("sharing_tenants: shared_tenant must not be one of them")
        return self


class CoalescingSettings(Settings):
    """How identical requests in flight share one call of a model."""

    enabled: bool = True
    """Whether they do, within a tenant or among those who share answers."""
    billing: Billing = "leader"
    """Who is charged: the one whose request began the call, each as if alone, or all in equal
    parts."""
    across_replicas: bool = False
    """Whether replicas of this service share calls too, for answers that are not streamed: the
    cache service then says which of them runs the model, and the others wait for its answer."""
    across_replicas_s: float = Field(default=60.0, gt=0)
    """How long another replica's answer is waited for before the model is run here, in seconds."""
