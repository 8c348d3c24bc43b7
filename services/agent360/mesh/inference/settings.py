"""What can be set of the inference service, with its defaults."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, SecretStr, model_validator

from agent360.client import NearCache
from agent360.mesh.inference.batching.settings import BatchSettings
from agent360.mesh.inference.caching.settings import (
    ANSWERS,
    VECTORS,
    AnswerCacheSettings,
    CoalescingSettings,
)
from agent360.mesh.inference.conversation import TaskClass
from agent360.mesh.inference.failover.settings import (
    BreakerSettings,
    HedgeSettings,
    RetrySettings,
)
from agent360.mesh.inference.front.settings import FrontSettings
from agent360.mesh.inference.local.settings import LocalEngineSettings
from agent360.mesh.inference.metering.settings import LimitSettings, UsageSettings
from agent360.mesh.inference.queueing.settings import ConcurrencySettings, QueueSettings
from agent360.mesh.runtime.settings import DeadlineSettings, ServerSettings, Settings
from agent360.mesh.runtime.validation import PRINTABLE

CapabilityName = Literal["chat", "tools", "json_schema", "embeddings", "images"]
MAX_MODEL_NAME: Final = 256
"""Characters of a model's name, at most."""
BackendPolicy = Literal["least_tokens", "two_choices", "weights"]
SchemaForm = Literal["json_schema", "guided", "tgi"]
Affinity = Literal["none", "session", "prefix"]


class BackendSettings(Settings):
    """A model server that speaks the OpenAI API."""

    name: str = Field(default="default", pattern=PRINTABLE, max_length=128)
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
    """How long the server may say nothing while it streams, in seconds."""
    try_timeout_s: float = Field(default=300.0, gt=0)
    """How long one request may take in all, in seconds."""
    concurrency: ConcurrencySettings = ConcurrencySettings()
    """How many requests it gets at a time; further ones wait in the queues of their models."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the bound of an answer's length."""
    stream_usage: bool = True
    """Whether streams are asked to end with their usage; False for a server that does not know
    ``stream_options``."""
    schema_form: SchemaForm = "json_schema"
    """How it is told a JSON Schema: as OpenAI, vLLM, llama.cpp and Ollama know it, as a schema
    beside ``json_object`` (``guided``: older llama.cpp and its relatives), or as TGI has it."""
    embedding_encoding: Literal["base64", "float", ""] = "base64"
    """How it is asked to send vectors; empty: it is not told. Either form is understood."""
    breaker: BreakerSettings = BreakerSettings()
    """When it is left alone."""
    probe: bool = True
    """Whether the server is asked for its models to see if it is there."""

    def key(self) -> str:
        """The bearer token; empty: none."""
        own = self.api_key.get_secret_value()
        return own or (os.environ.get(self.api_key_env, "") if self.api_key_env else "")


class ModelLimits(Settings):
    """What one request may ask of a model; more is refused."""

    max_prompt_tokens: int = Field(default=0, ge=0)
    """Most (estimated) tokens of a prompt; 0: as many as the context has."""
    max_output_tokens: int = Field(default=0, ge=0)
    """Most tokens of an answer that a request may ask for; 0: as many as the context has."""


class ModelSettings(Settings):
    """A model of the catalogue."""

    name: str = Field(pattern=PRINTABLE, max_length=MAX_MODEL_NAME)
    """Its name in requests; not ``auto``."""
    backends: tuple[str, ...] = ("default",)
    """The backends that run it; which one is asked says ``policy``."""
    policy: BackendPolicy = "least_tokens"
    """How a backend is chosen: the fewest outstanding tokens; the better of two, by tokens and
    latency; or in turn, by weight."""
    weights: Mapping[str, Annotated[float, Field(gt=0)]] = {}
    """Capacity of its backends in proportion to each other; 1 for one that is not named."""
    affinity: Affinity = "session"
    """What goes to the same backend while that has room, before ``policy``: requests of a session;
    those too that begin alike (``prefix``), for a backend that keeps prefixes; or nothing."""
    affinity_prefix_bytes: int = Field(default=2_048, gt=0)
    """How much of a prompt's beginning tells whether requests begin alike."""
    affinity_load: float = Field(default=1.25, ge=1)
    """A backend that has this many times its share of the outstanding tokens is passed over."""
    fallbacks: tuple[str, ...] = ()
    """Models that are tried after it, in this order, where they can do what a request needs."""
    retry: RetrySettings | None = None
    """What follows when a try fails; None: as the service has it."""
    hedge: HedgeSettings | None = None
    """When a slow try gets a rival; None: as the service has it."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of ``auto`` among the models that fit equally well and have a weight; None: it
    comes after those, in the order of the catalogue."""
    warm_up: str = ""
    """A prompt that is run on a backend before it is ready, and after it came back; empty: none."""
    limits: ModelLimits = ModelLimits()
    """What one request may ask of it."""
    queue: QueueSettings = QueueSettings()
    """How requests wait for it."""
    batch: BatchSettings = BatchSettings()
    """How texts to be embedded are gathered into calls."""
    upstream_model: str = ""
    """Its name at the backends; empty: the same."""
    version: str = Field(default="", max_length=64)
    """Which version of it the backends run. Answers kept of another version are not used: change
    it with whatever changes what the model says."""
    tokenizer: Path | None = None
    """Its tokenizer: a ``tokenizer.json``, or a directory with one and, for exact counts, the
    model's ``tokenizer_config.json`` or ``chat_template.jinja``. Needs the extra ``tokenizers``."""
    concurrency_slots: bool = False
    """Whether a request holds a slot of limits named ``inference.concurrent`` while it runs."""
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

    def weight_of(self, backend: str) -> float:
        """The capacity of one of its backends in proportion to the others."""
        return self.weights.get(backend, 1.0)


class ClassParameters(Settings):
    """Parameters of requests of a task class, where a request names none itself."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    """How freely tokens are chosen; None: the model's own."""
    top_p: float | None = Field(default=None, ge=0, le=1)
    """Share of the likeliest tokens to choose from; None: the model's own."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Bound of the answer's length; None: the model's."""


class SessionSettings(Settings):
    """How long it is known that a session asked for more."""

    ttl_s: float = Field(default=3600.0, gt=0)
    """A session that says nothing for so long is forgotten, in seconds."""
    max_per_tenant: int = Field(default=10_000, gt=0)
    """Sessions kept for one tenant; beyond that the one that was silent longest is forgotten."""
    max_tenants: int = Field(default=1_000, gt=0)
    """Tenants with sessions that are kept; beyond that as above."""


class AutoSettings(Settings):
    """How ``auto`` tells complex requests from simple ones, and what it does with them."""

    classifier: str = ""
    """A function of your own that tells them apart, as ``package.module:name``; empty: the rules
    below. It takes a ``Prompt`` and returns a ``classifier.Verdict``."""
    simple: ClassParameters = ClassParameters()
    """Parameters of simple requests."""
    complex: ClassParameters = ClassParameters()
    """Parameters of complex requests."""
    sessions: SessionSettings = SessionSettings()
    """How sessions are remembered: one that was complex stays so."""

    complex_prompt_tokens: int = Field(default=500, ge=0)
    """A prompt of this many (estimated) tokens is complex."""
    complex_messages: int = Field(default=8, ge=1)
    """A conversation of this many messages is complex."""
    tools_are_complex: bool = True
    """Whether a request with tools is complex."""


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
    """The model servers; with none, and no engines, the service starts, and has no models."""
    engines: tuple[LocalEngineSettings, ...] = ()
    """Models that run in this process; to the catalogue each is a backend."""
    models: tuple[ModelSettings, ...] = ()
    """The catalogue; empty: every model that the backends list, under its own name."""
    models_file: Path | None = None
    """A TOML file with the catalogue instead, as ``[[models]]``; read again when it changes."""
    retry: RetrySettings = RetrySettings()
    """What follows when a try fails, for models that have no settings of their own."""
    hedge: HedgeSettings = HedgeSettings()
    """When a slow try gets a rival, for models that have no settings of their own."""
    auto: AutoSettings = AutoSettings()
    """How a model is chosen for ``auto``."""
    cache: AnswerCacheSettings = AnswerCacheSettings()
    """How answers are kept."""
    limits: LimitSettings = LimitSettings()
    """How limits are asked for."""
    front: FrontSettings = FrontSettings()
    """The OpenAI-compatible API on the HTTP port."""
    usage: UsageSettings = UsageSettings()
    """Where usage records go."""
    tenant_weights: Mapping[str, Annotated[float, Field(gt=0)]] = {}
    """Shares of tenants in proportion to each other where they wait for a model; 1 for one that is
    not named."""
    coalescing: CoalescingSettings = CoalescingSettings()
    """How identical requests in flight share one call of a model."""
    max_prompt_bytes: int = Field(default=4 * 2**20, gt=0)
    """Largest prompt."""
    max_answer_bytes: int = Field(default=4 * 2**20, gt=0)
    """Largest answer; a backend that says more is cut off."""
    probe_interval_s: float = Field(default=10.0, gt=0)
    """How often backends are asked whether they are there, in seconds; sooner after a failure."""
    probe_timeout_s: float = Field(default=5.0, gt=0)
    """How long that answer may take, in seconds."""

    @property
    def backend_names(self) -> list[str]:
        """The names that models may call their backends by."""
        return [*(each.name for each in self.backends), *(each.name for each in self.engines)]

    def near_cache(self) -> NearCache | None:
        """See ``ServerSettings.near_cache``: copies of answers and vectors."""
        cache = self.cache
        if not (cache.enabled and cache.near_entries):
            return None
        return NearCache(
            max_entries=cache.near_entries,
            max_bytes=cache.near_bytes,
            max_tenants=cache.near_tenants,
            namespaces=(ANSWERS, VECTORS),
        )

    @model_validator(mode="after")
    def _names_agree(self) -> InferenceSettings:
        self._refuse_keys_of((self.cache.shared_tenant,), "cache.shared_tenant")
        backends = self.backend_names
        twice = {name for name in backends if backends.count(name) > 1}
        if twice:
            same = ", ".join(sorted(twice))
            raise ValueError(f"backends and engines: more than one is named {same}")
        if self.models and self.models_file:
            raise ValueError("models and models_file: the catalogue is given twice; keep one")
        for _, field, fault in faults_of(self.models, backends):
            raise ValueError(f"models: {field}: {fault}")
        return self


def faults_of(
    models: Sequence[ModelSettings], backends: Collection[str]
) -> Iterator[tuple[int, str, str]]:
    """What is wrong with a catalogue: the place of a model in it, the field, the fault."""
    names = [model.name for model in models]
    for place, model in enumerate(models):
        if model.name in names[:place]:
            yield place, "name", f"more than one is named {model.name}"
        if model.name == "auto":
            yield place, "name", "the name 'auto' has a meaning of its own"
        unknown = set(model.backends) - set(backends)
        if unknown or not model.backends:
            missing = ", ".join(sorted(unknown)) or "none is named"
            known = ", ".join(sorted(backends)) or "none"
            yield (
                place,
                "backends",
                f"{model.name} has unknown backends: {missing}; there are: {known}",
            )
        strangers = set(model.weights) - set(model.backends)
        if strangers:
            yield place, "weights", f"not backends of {model.name}: {', '.join(sorted(strangers))}"
        missing_models = [name for name in model.fallbacks if name not in names]
        if missing_models:
            yield place, "fallbacks", f"there is no model {', '.join(missing_models)}"
        if model.name in model.fallbacks:
            yield place, "fallbacks", f"{model.name} cannot be its own fallback"
