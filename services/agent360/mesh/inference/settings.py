"""What can be set of the inference service, with its defaults."""

from __future__ import annotations

import os
from typing import ClassVar, Literal

from pydantic import Field, SecretStr, model_validator

from agent360.mesh.inference.conversation import TaskClass
from agent360.mesh.runtime.settings import DeadlineSettings, ServerSettings, Settings

CapabilityName = Literal["chat", "tools", "json_schema", "embeddings", "images"]


class BackendSettings(Settings):
    """A model server that speaks the OpenAI API."""

    name: str = Field(default="default", min_length=1, max_length=128)
    """Names the backend in answers, logs and metrics."""
    url: str = Field(default="http://127.0.0.1:8370/v1", pattern=r"^https?://")
    """Base URL of the API, such as http://127.0.0.1:8000/v1; the default is the simulator's."""
    api_key: SecretStr = SecretStr("")
    """Bearer token; empty: that of ``api_key_env``."""
    api_key_env: str = ""
    """Environment variable that holds the bearer token; empty: none is sent."""
    max_connections: int = Field(default=256, gt=0)
    """Connections, and so requests at a time; further ones wait."""
    connect_timeout_s: float = Field(default=5.0, gt=0)
    """How long a connection may take to open, in seconds."""
    stall_timeout_s: float = Field(default=60.0, gt=0)
    """How long the server may say nothing while it answers, in seconds."""
    try_timeout_s: float = Field(default=300.0, gt=0)
    """How long one request may take in all, in seconds."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the bound of an answer's length."""
    probe: bool = True
    """Whether the server is asked for its models to see if it is there."""

    def key(self) -> str:
        """The bearer token; empty: none."""
        own = self.api_key.get_secret_value()
        return own or (os.environ.get(self.api_key_env, "") if self.api_key_env else "")


class ModelSettings(Settings):
    """A model of the catalogue."""

    name: str = Field(min_length=1, max_length=256)
    """Its name in requests; not ``auto``."""
    backends: tuple[str, ...] = ("default",)
    """The backends that run it; the least busy one that works is taken."""
    upstream_model: str = ""
    """Its name at the backends; empty: the same."""
    capabilities: tuple[CapabilityName, ...] = ("chat", "tools", "json_schema")
    """What it can do."""
    task_classes: tuple[TaskClass, ...] = ()
    """Tasks that ``auto`` gives to it."""
    context_tokens: int = Field(default=0, ge=0)
    """Most tokens of prompt and answer together; 0: not known."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Bound of an answer's length where a request names none; None: the backend's own."""
    input_usd_per_million: float = Field(default=0.0, ge=0)
    """US dollars for a million tokens of prompts."""
    output_usd_per_million: float = Field(default=0.0, ge=0)
    """US dollars for a million tokens of answers."""
    quantization: str = ""
    """How its weights are quantised; empty: not known."""
    tenants: tuple[str, ...] = ("*",)
    """The tenants that may use it; ``*`` stands for all."""

    @property
    def upstream_name(self) -> str:
        """Its name at the backends."""
        return self.upstream_model or self.name


class AutoSettings(Settings):
    """How ``auto`` tells complex requests from simple ones."""

    complex_prompt_tokens: int = Field(default=500, ge=0)
    """A prompt of this many (estimated) tokens is complex."""
    complex_messages: int = Field(default=8, ge=1)
    """A conversation of this many messages is complex."""
    tools_are_complex: bool = True
    """Whether a request with tools is complex."""


class AnswerCacheSettings(Settings):
    """How answers are kept in the cache service."""

    enabled: bool = True
    """Whether answers are kept."""
    ttl_s: float = Field(default=3600.0, gt=0)
    """How long an answer is kept where the request does not say, in seconds."""
    max_ttl_s: float = Field(default=86_400.0, gt=0)
    """A longer time is cut to this, in seconds."""
    timeout_s: float = Field(default=0.25, gt=0)
    """How long the cache service is waited for before the model is run, in seconds."""


class LimitSettings(Settings):
    """How the ratelimit service is asked about requests and tokens."""

    enabled: bool = True
    """Whether it is asked."""
    when_away: Literal["open", "closed"] = "open"
    """What happens while it is away: requests are served, or refused."""
    timeout_s: float = Field(default=0.25, gt=0)
    """How long it is waited for, in seconds."""
    expected_output_tokens: int = Field(default=512, gt=0)
    """Tokens set aside for an answer whose length has no bound."""


class InferenceSettings(ServerSettings):
    """What can be set of the inference service.

    Example:
        >>> InferenceSettings(
        ...     backends=(BackendSettings(name="gpu", url="http://gpu:8000/v1"),),
        ...     models=(ModelSettings(name="small", backends=("gpu",), task_classes=("simple",)),),
        ... )
    """

    service: ClassVar[str] = "inference"
    default_port: ClassVar[int] = 7360

    deadline: DeadlineSettings = DeadlineSettings(default_s=120.0)
    """How long a call may take."""
    backends: tuple[BackendSettings, ...] = (BackendSettings(),)
    """The model servers; with none the service starts, and has no models."""
    models: tuple[ModelSettings, ...] = ()
    """The catalogue; empty: every model that the backends list, under its own name."""
    auto: AutoSettings = AutoSettings()
    """How a model is chosen for ``auto``."""
    cache: AnswerCacheSettings = AnswerCacheSettings()
    """How answers are kept."""
    limits: LimitSettings = LimitSettings()
    """How limits are asked for."""
    coalesce: bool = True
    """Whether identical requests of one tenant that are in flight share one call of the model."""
    max_prompt_bytes: int = Field(default=4 * 2**20, gt=0)
    """Largest prompt."""
    max_answer_bytes: int = Field(default=4 * 2**20, gt=0)
    """Largest answer; a backend that says more is cut off."""
    probe_interval_s: float = Field(default=10.0, gt=0)
    """How often the backends are asked whether they are there, in seconds."""

    @model_validator(mode="after")
    def _names_agree(self) -> InferenceSettings:
        backends = [backend.name for backend in self.backends]
        models = [model.name for model in self.models]
        for what, names in (("backends", backends), ("models", models)):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{what}: more than one is named {', '.join(sorted(twice))}")
        if "auto" in models:
            raise ValueError("models: the name 'auto' has a meaning of its own")
        for model in self.models:
            unknown = set(model.backends) - set(backends)
            if unknown or not model.backends:
                missing = ", ".join(sorted(unknown)) or "none is named"
                raise ValueError(f"models: {model.name} has unknown backends: {missing}")
        return self
