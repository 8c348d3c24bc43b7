"""The four services of Agent360 Mesh, and ``embedded()``, which runs them in the caller's process."""

from agent360.mesh.embedded import embedded

__all__ = ["embedded"]
