"""The four services by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from agent360.mesh.runtime.server import ServicerFactory
from agent360.mesh.runtime.settings import ServerSettings

NAMES: Final = ("ratelimit", "cache", "metrics", "inference")
"""All services, in the order in which they are best started."""

_CLASSES: Final[Mapping[str, str]] = {
    "ratelimit": "RateLimit",
    "cache": "Cache",
    "metrics": "Metrics",
    "inference": "Inference",
}


class ServiceKind(NamedTuple):
    """What makes a service."""

    settings: type[ServerSettings]
    """Its settings."""
    servicer: ServicerFactory
    """Makes its servicer."""


def service_kind(name: str) -> ServiceKind:
    """The service of a name; its package is imported only now.

    Raises:
        KeyError: there is no such service.
    """
    stem = _CLASSES[name]
    package: Any = importlib.import_module(f"agent360.mesh.{name}")
    return ServiceKind(getattr(package, f"{stem}Settings"), getattr(package, f"{stem}Servicer"))
