"""The services of Agent360 Mesh; ``embedded()`` runs all four in the caller's process."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent360.mesh.inprocess import embedded

__all__ = ["embedded"]


def __getattr__(name: str) -> Any:
    """Imports ``embedded`` when it is asked for: the rest of the package does not need it."""
    if name == "embedded":
        from agent360.mesh.inprocess import embedded  # noqa: PLC0415

        return embedded
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
