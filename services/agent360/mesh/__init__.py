"""The services of Agent360 Mesh; ``embedded()`` runs all four in the caller's process."""

from agent360.mesh.embedded import embedded

__all__ = ["embedded"]
