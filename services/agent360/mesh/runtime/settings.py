"""What can be set of every service, with its defaults; a service adds its own fields."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from agent360.client import NearCache


class SettingError(ValueError):
    """What is set cannot be carried out; the message says what and why."""


class Settings(BaseModel):
    """A group of settings; unknown names are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


class TlsSettings(Settings):
    """Certificates of the gRPC port, and of the HTTP port where that serves an API."""

    certificate: Path | None = None
    """PEM file with the server's certificate chain; TLS is on if it is given."""
    key: Path | None = None
    """PEM file with the server's private key."""
    client_ca: Path | None = None
    """PEM file with the authorities whose client certificates are asked for and required."""


class ApiKey(Settings):
    """An API key and what it may do."""

    name: str
    """Names the key's holder in logs and audit events."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the key in hexadecimal, as printed by ``agent360-mesh keys hash``."""
    tenants: tuple[str, ...] = ()
    """The tenants the key may speak for; ``*`` stands for all."""
    service: bool = False
    """True for the mesh's own services: exempt from quotas."""
    admin: bool = False
    """True for operators."""


class AuthenticationSettings(Settings):
    """Who may call. Without keys everyone on loopback may speak for every tenant."""

    keys: tuple[ApiKey, ...] = ()
    """The accepted API keys."""


class TenantSettings(Settings):
    """Which tenants there are."""

    strict: bool = False
    """True: only ``known`` tenants are served."""
    known: tuple[str, ...] = ()
    """Names of tenants."""
    reserved: tuple[str, ...] = ("shared-answers",)
    """Tenants that are nobody's: only keys of the mesh's own services and of operators may speak
    for them. In the name of this one the inference service keeps answers that tenants share."""


class DeadlineSettings(Settings):
    """How long a call may take."""

    default_s: float = Field(default=10.0, gt=0)
    """Deadline of a call that names none, in seconds."""
    maximum_s: float = Field(default=600.0, gt=0)
    """A longer deadline is cut to this, in seconds."""


class StreamSettings(Settings):
    """Bounds of a Pipeline stream."""

    max_in_flight: int = Field(default=10_000, gt=0)
    """Items of one stream that may be open or waiting to be sent; beyond that nothing is read."""
    max_unsent_bytes: int = Field(default=32 * 2**20, gt=0)
    """Bytes of answers that may wait to be sent before handlers and the reader are held back."""
    max_message_items: int = Field(default=1_000, gt=0)
    """Answers in one message."""
    max_message_bytes: int = Field(default=2**20, gt=0)
    """Size at which a message is closed; one larger answer still goes out alone."""
    initial_credits: int = Field(default=64, gt=0)
    """Chunks of a streamed answer sent before the caller gives credit, unless the item says."""
    max_age_s: float = Field(default=1800.0, gt=0)
    """Age at which a stream is drained so that load spreads, in seconds; varied by 10%."""
    stalled_s: float = Field(default=60.0, gt=0)
    """A stream whose caller reads nothing for this long is cut, in seconds."""


class SheddingSettings(Settings):
    """When calls are refused to keep the others fast."""

    max_in_flight: int = Field(default=20_000, gt=0)
    """Calls worked on at a time; low priority is shed at 80% of it, normal at 90%."""


class MemorySettings(Settings):
    """How much memory the process may take. Without limits: 80% and 92% of the container's."""

    soft_bytes: int = Field(default=0, ge=0)
    """Above this caches shrink and garbage is collected; 0: from the container's limit."""
    hard_bytes: int = Field(default=0, ge=0)
    """Above this new calls are refused with RESOURCE_EXHAUSTED; 0: from the container's limit."""

    @model_validator(mode="after")
    def _soft_is_lower(self) -> MemorySettings:
        if self.soft_bytes and self.hard_bytes and self.soft_bytes > self.hard_bytes:
            raise ValueError("soft_bytes must not be above hard_bytes")
        return self


class QuotaSettings(Settings):
    """Whether the ratelimit service is asked before a call is served."""

    enabled: bool = False
    """True: every call is checked against limits named like its method."""
    when_away: Literal["open", "closed"] = "open"
    """What happens while the ratelimit service is away: calls are served, or refused."""
    timeout_s: float = Field(default=0.25, gt=0)
    """How long the ratelimit service is waited for, in seconds."""


class TracingSettings(Settings):
    """OpenTelemetry tracing."""

    endpoint: str = ""
    """OTLP gRPC endpoint such as http://localhost:4317; empty: no tracing."""
    sample_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of untraced unary calls that start a trace; sampled callers are always followed."""


class LogShippingSettings(Settings):
    """Which log records go to the metrics service."""

    enabled: bool = True
    """Whether any do: those of level warning and above, and a share of the others."""
    share: float = Field(default=0.05, ge=0, le=1)
    """Share of the records below warning."""
    max_waiting: int = Field(default=10_000, gt=0)
    """Records that may wait; further ones are dropped and counted."""


class LogSamplingSettings(Settings):
    """How often a pattern of log records is written."""

    first: int = Field(default=100, ge=1)
    """Records of a pattern in an interval that are all written."""
    then_every: int = Field(default=100, ge=1)
    """Of further ones, one of so many is."""
    interval_s: float = Field(default=10.0, gt=0)
    """The interval, in seconds."""
    max_patterns: int = Field(default=500, ge=1)
    """Patterns that are told apart; further ones count as ``other``."""


class LogSettings(Settings):
    """Logs."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least level that is written."""
    format: Literal["auto", "json", "console"] = "auto"
    """``auto`` writes JSON unless standard error is a terminal."""
    access: Literal["off", "errors", "all"] = "errors"
    """Which calls are logged: none, those that failed or were slow, or all."""
    slow_s: float = Field(default=5.0, gt=0)
    """A call that took this long is slow, in seconds."""
    sampling: LogSamplingSettings = LogSamplingSettings()
    """How often a pattern of records is written."""
    shipping: LogShippingSettings = LogShippingSettings()
    """Which records go to the metrics service."""


class RedactionSettings(Settings):
    """What is taken out of logs and audit events before they are written."""

    names: tuple[str, ...] = (
        "*password*",
        "*passwd*",
        "*passphrase*",
        "*secret*",
        "*api_key*",
        "*private_key*",
        "*credential*",
        "*authorization*",
        "token",
        "*_token",
        "cookie",
        "set_cookie",
    )
    """Names of fields, of parameters in URLs and of what texts assign; ``*`` is any part of a name,
    upper and lower case are the same, as are ``api_key``, ``api-key`` and ``apiKey``."""
    values: tuple[str, ...] = (r"\ba360_[\w-]{16,}", r"\bsk-[\w-]{16,}")
    """Regular expressions of what is secret wherever it stands."""

    @field_validator("values")
    @classmethod
    def _compile(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is not a regular expression: {error}") from error
        return values


class MeshAddresses(Settings):
    """Where the other services are; ``host:port``, several separated by commas."""

    inference: str = "127.0.0.1:7360"
    """The inference service."""
    cache: str = "127.0.0.1:7361"
    """The cache service."""
    ratelimit: str = "127.0.0.1:7362"
    """The ratelimit service."""
    metrics: str = "127.0.0.1:7363"
    """The metrics service."""
    api_key: SecretStr = SecretStr("")
    """The key that this service shows to the others."""
    ca: Path | None = None
    """PEM file with the authorities to trust; TLS is used if it is given."""


class ServerSettings(Settings):
    """What can be set of every service."""

    service: ClassVar[str]
    """The service's name: inference, cache, ratelimit or metrics."""
    default_port: ClassVar[int]
    """The service's gRPC port; its HTTP port is 1,000 above."""

    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback, TLS and API keys are required unless ``insecure``."""
    port: int = Field(default=0, ge=0, le=65535)
    """gRPC port; 0: the service's own (``agent360-mesh config`` shows it)."""
    http_port: int = Field(default=0, ge=0, le=65535)
    """HTTP port of /metrics, /healthz and /readyz, and of the service's HTTP API if it has one;
    0: the service's own."""
    ephemeral_ports: bool = False
    """True: ports of 0 are chosen by the operating system, for tests and embedding."""
    insecure: bool = False
    """True: listen beyond loopback without TLS or API keys all the same."""
    reflection: bool = True
    """Whether gRPC server reflection is served."""
    channelz: bool = True
    """Whether channelz is served to loopback callers and admins."""
    grace_s: float = Field(default=10.0, ge=0)
    """How long calls may go on after SIGTERM, in seconds."""
    max_message_bytes: int = Field(default=16 * 2**20, ge=2**16)
    """Largest gRPC message taken or sent."""
    compression: Literal["none", "gzip"] = "none"
    """How large answers are compressed for callers that accept it. Worth its CPU time across
    slow networks only."""
    compression_min_bytes: int = Field(default=16 * 2**10, ge=0)
    """Messages below this size are not compressed."""
    tls: TlsSettings = TlsSettings()
    """Certificates of the gRPC port, and of the HTTP port where that serves an API."""
    authentication: AuthenticationSettings = AuthenticationSettings()
    """Who may call."""
    tenants: TenantSettings = TenantSettings()
    """Which tenants there are."""
    deadline: DeadlineSettings = DeadlineSettings()
    """How long a call may take."""
    stream: StreamSettings = StreamSettings()
    """Bounds of a Pipeline stream."""
    shedding: SheddingSettings = SheddingSettings()
    """When calls are refused to keep the others fast."""
    memory: MemorySettings = MemorySettings()
    """How much memory the process may take."""
    quota: QuotaSettings = QuotaSettings()
    """Whether the ratelimit service is asked before a call is served."""
    tracing: TracingSettings = TracingSettings()
    """OpenTelemetry tracing."""
    log: LogSettings = LogSettings()
    """Logs."""
    redaction: RedactionSettings = RedactionSettings()
    """What is taken out of logs and audit events."""
    mesh: MeshAddresses = MeshAddresses()
    """Where the other services are."""

    @model_validator(mode="after")
    def _reserved_tenants_have_no_keys(self) -> ServerSettings:
        self._refuse_keys_of(self.tenants.reserved, "tenants.reserved")
        return self

    def _refuse_keys_of(self, reserved: Collection[str], setting: str) -> None:
        """Refuses keys that are bound to a tenant which is nobody's.

        Raises:
            ValueError: there is one.
        """
        for key in self.authentication.keys:
            taken = set() if key.service or key.admin else set(reserved).intersection(key.tenants)
            if taken:
                names = ", ".join(sorted(taken))
                raise ValueError(
                    f"authentication.keys: {key.name} is bound to {names}, which {setting} keeps "
                    "for the mesh itself; bind it to another tenant"
                )

    def near_cache(self) -> NearCache | None:
        """What the service keeps near of the cache service's entries; None: nothing."""
        return None
