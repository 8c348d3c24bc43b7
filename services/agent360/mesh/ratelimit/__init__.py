"""The ratelimit service: rates and token budgets, charged to all limits that apply or to none."""

from agent360.mesh.ratelimit.servicer import RateLimitServicer
from agent360.mesh.ratelimit.settings import RateLimitSettings

__all__ = ["RateLimitServicer", "RateLimitSettings"]
