"""What can be set of the simulator, with its defaults."""

from __future__ import annotations

from typing import Final

from pydantic import Field, SecretStr, model_validator

from agent360.mesh.runtime.settings import Settings

DEFAULT_PORT: Final = 8370


class SimulatedModel(Settings):
    """A model that the simulator pretends to have."""

    name: str = Field(pattern=r"^sim-[a-z0-9.-]+$")
    """Its name; begins with ``sim-`` so that nobody takes its answers for a model's."""
    slowness: float = Field(default=1.0, gt=0)
    """Its delays are the simulator's, times this."""
    embeddings: bool = False
    """True: it makes vectors. False: it chats."""


class SimulatorSettings(Settings):
    """How the simulated server behaves. Delays are in seconds, rates are shares of requests."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535)
    """HTTP port; 0: chosen by the operating system."""
    models: tuple[SimulatedModel, ...] = (
        SimulatedModel(name="sim-small"),
        SimulatedModel(name="sim-large", slowness=2.0),
        SimulatedModel(name="sim-embed", embeddings=True),
    )
    """The models it pretends to have."""
    api_key: SecretStr = SecretStr("")
    """The bearer token that requests must show; empty: none."""
    first_token_s: float = Field(default=0.05, ge=0)
    """Time to the first token of a lone request."""
    first_token_growth: float = Field(default=0.02, ge=0)
    """Share by which each further concurrent request lengthens the time to the first token."""
    inter_token_s: float = Field(default=0.005, ge=0)
    """Time between the tokens of a lone request."""
    inter_token_growth: float = Field(default=0.01, ge=0)
    """Share by which each further concurrent request lengthens the time between tokens."""
    min_tokens: int = Field(default=16, gt=0)
    """Length of the shortest answers."""
    max_tokens: int = Field(default=96, gt=0)
    """Length of the longest answers, unless a request asks for more."""
    max_concurrent: int = Field(default=0, ge=0)
    """Requests beyond this many at a time are refused with 429; 0: none are."""
    counts_tokens: bool = True
    """Whether it has ``/tokenize`` beside the OpenAI API, in the form of vLLM."""
    text_s: float = Field(default=0.0, ge=0)
    """Time that each text of an embeddings request takes beside the time to the first token."""
    embedding_workers: int = Field(default=0, ge=0)
    """Embeddings requests that are worked on at a time, while others wait; 0: all are."""
    dimensions: int = Field(default=64, gt=0, le=4096)
    """Length of embedding vectors."""
    seed: int = 0
    """Chooses which requests the rates below strike; the same seed strikes the same ones."""
    error_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of requests answered with ``error_status``."""
    error_status: int = Field(default=503, ge=400, le=599)
    """The HTTP status of those errors."""
    error_first: int = Field(default=0, ge=0)
    """So many requests at the start are answered with ``error_status`` too."""
    error_retry_after_s: float | None = Field(default=None, ge=0)
    """Retry-After of those errors, in seconds; None: they have none."""
    stall_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of requests that stall for ``stall_s`` before their first token."""
    stall_s: float = Field(default=5.0, ge=0)
    """How long a stall lasts."""
    break_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of requests whose connection is cut in the middle of the answer."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> SimulatorSettings:
        if self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens must not be above max_tokens")
        if len({model.name for model in self.models}) < len(self.models):
            raise ValueError("models must have different names")
        return self
