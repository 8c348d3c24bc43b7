"""What can be set of alerts, with its defaults."""

from __future__ import annotations

from pydantic import Field, SecretStr

from agent360.mesh.runtime.settings import Settings


class WebhookSettings(Settings):
    """Who is told of alerts: a receiver of Alertmanager's webhook format, version 4."""

    url: SecretStr = SecretStr("")
    """Where notifications are posted; empty: nobody is told."""
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Sent with them, such as ``Authorization``."""
    timeout_s: float = Field(default=10.0, gt=0)
    """How long an answer is waited for; then it is tried again, at growing intervals."""
    max_alerts: int = Field(default=100, gt=0)
    """Alerts in one notification, which says how many were left out."""
    external_url: str = ""
    """Where people find out more; part of notifications."""


class SloSettings(Settings):
    """The rules that come with the service: how fast each service uses up its error budget.

    A rule fires while the last hour and the last 5 minutes burn it 14.4 times too fast (2% of the
    budget of 30 days in an hour), or the last 6 hours and the last 30 minutes 6 times.
    """

    enabled: bool = True
    """False: there are no such rules."""
    availability: float = Field(default=0.999, gt=0, lt=1)
    """The share of calls that shall not fail by the service's fault."""
    latency_s: float = Field(default=1.0, gt=0)
    """Calls that take longer are slow. Those of inference last as long as models do:
    ``inference_latency_s``."""
    inference_latency_s: float = Field(default=30.0, gt=0)
    """The same for the inference service."""
    fast: float = Field(default=0.99, gt=0, lt=1)
    """The share of calls that shall not be slow."""
    at_least: float = Field(default=100.0, ge=0)
    """Windows with fewer calls are left out: one failure of ten calls wakes nobody."""


class AlertSettings(Settings):
    """Alerts."""

    enabled: bool = True
    """False: rules are kept, but not evaluated here."""
    evaluate_every_s: float = Field(default=15.0, gt=0)
    """Seconds between evaluations."""
    max_rules: int = Field(default=200, gt=0)
    """Rules that a tenant may have."""
    webhook: WebhookSettings = WebhookSettings()
    """Who is told."""
    group_by: tuple[str, ...] = ("alertname",)
    """Alerts of a tenant with the same values of these labels are told of together."""
    group_wait_s: float = Field(default=30.0, ge=0)
    """How long the first notification of a group waits for more alerts."""
    group_interval_s: float = Field(default=300.0, gt=0)
    """How long after a notification the next tells of changes."""
    repeat_interval_s: float = Field(default=4 * 3_600.0, gt=0)
    """How long after a notification it is repeated if nothing changed."""
    slo: SloSettings = SloSettings()
    """The rules that come with the service."""
