"""Profiles of a running service on demand: where time and memory go, and what is waited for."""

from agent360.mesh.runtime.profiling.service import ProfilingServicer

__all__ = ["ProfilingServicer"]
