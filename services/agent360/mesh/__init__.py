"""The services of Agent360 Mesh; ``embedded()`` runs all four in the caller's process.

``embedded_sync()`` does so for code without an event loop.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent360.mesh.inprocess import embedded, embedded_sync

__all__ = ["embedded", "embedded_sync"]


def __getattr__(name: str) -> Any:
    """Imports them when they are asked for: the rest of the package does not need them."""
    if name in __all__:
        from agent360.mesh import inprocess  # noqa: PLC0415

        return getattr(inprocess, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
