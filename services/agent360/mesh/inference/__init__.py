"""The inference service: answers prompts by a model, limited, cached, coalesced and metered."""

from agent360.mesh.inference.servicer import InferenceServicer
from agent360.mesh.inference.settings import InferenceSettings

__all__ = ["InferenceServicer", "InferenceSettings"]
