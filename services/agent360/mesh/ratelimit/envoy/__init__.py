"""Envoy's rate limit service (RLS v3), served beside our own."""

from agent360.mesh.ratelimit.envoy.service import EnvoyService

__all__ = ["EnvoyService"]
