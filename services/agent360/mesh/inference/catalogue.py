"""The models that can be asked for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import grpc

from agent360.client.errors import MeshError, UnavailableError
from agent360.mesh.inference.answers import Usage
from agent360.mesh.inference.settings import MAX_MODEL_NAME, CapabilityName, ModelSettings
from agent360.mesh.runtime.validation import PRINTABLE

_NAMES_IN_ERROR = 20


class Catalogue:
    """The models by name; those of the settings, or those that were discovered."""

    def __init__(self, models: Iterable[ModelSettings] = ()) -> None:
        self._models: dict[str, ModelSettings] = {model.name: model for model in models}

    def get(self, name: str, tenant: str) -> ModelSettings:
        """The model of that name.

        Raises:
            MeshError: NOT_FOUND, if there is none that the tenant may use; UNAVAILABLE, if there
                are no models at all.
        """
        if not self._models:
            raise UnavailableError(
                "there are no models: no backend has listed any yet", reason="NO_MODELS"
            )
        model = self._models.get(name)
        if model is None or not _may_use(model, tenant):
            raise self._unknown(name, tenant)
        return model

    def find(self, name: str, tenant: str) -> ModelSettings | None:
        """The model of that name; None: there is none that the tenant may use."""
        model = self._models.get(name)
        return model if model is not None and _may_use(model, tenant) else None

    def usable(self, tenant: str) -> list[ModelSettings]:
        """The models that a tenant may use, in the order of the settings."""
        return [model for model in self._models.values() if _may_use(model, tenant)]

    @property
    def models(self) -> Collection[ModelSettings]:
        """All models, in the order of the settings."""
        return self._models.values()

    def replace(self, models: Iterable[ModelSettings]) -> None:
        """Puts other models in the place of all; requests under way keep theirs."""
        known = self._models
        self._models = {
            model.name: model if model != known.get(model.name) else known[model.name]
            for model in models
        }

    def discovered(self, by_backend: Mapping[str, Iterable[str]]) -> None:
        """Replaces the catalogue by what the backends list.

        A model whose name holds ``embed`` is taken to make vectors, any other to chat.
        """
        backends: dict[str, list[str]] = {}
        for backend, names in by_backend.items():
            for name in names:
                backends.setdefault(name, []).append(backend)
        self._models = {
            name: ModelSettings(
                name=name, backends=tuple(found), capabilities=_capabilities_by_name(name)
            )
            for name, found in backends.items()
            if name != "auto" and len(name) <= MAX_MODEL_NAME and re.match(PRINTABLE, name)
        }

    def _unknown(self, name: str, tenant: str) -> MeshError:
        known = sorted(model.name for model in self.usable(tenant))
        shown = ", ".join(known[:_NAMES_IN_ERROR]) + (", ..." if known[_NAMES_IN_ERROR:] else "")
        return MeshError(
            grpc.StatusCode.NOT_FOUND,
            "MODEL_UNKNOWN",
            f"there is no model {name[:256]!r}; there are: {shown or 'none'}",
            metadata={"model": name[:256], "known": shown},
        )


def cost_usd(model: ModelSettings, usage: Usage) -> float:
    """What an answer of a model costs, in US dollars."""
    return (
        usage.input_tokens * model.input_usd_per_million
        + usage.output_tokens * model.output_usd_per_million
    ) / 1e6


def _may_use(model: ModelSettings, tenant: str) -> bool:
    return "*" in model.tenants or tenant in model.tenants


def _capabilities_by_name(name: str) -> tuple[CapabilityName, ...]:
    return ("embeddings",) if "embed" in name.lower() else ("chat", "tools", "json_schema")
