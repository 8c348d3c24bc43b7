"""Notifications in the format of Alertmanager's webhook, version 4, and the way out to it.

See https://prometheus.io/docs/alerting/latest/configuration/#webhook_config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, Protocol

import aiohttp

from agent360.mesh.metrics.alerts.lifecycle import Alert, AlertState
from agent360.mesh.metrics.alerts.rules import Labels

RECEIVER: Final = "agent360-mesh"

_NOT_ENDED: Final = "0001-01-01T00:00:00Z"
_OK: Final = range(200, 300)


class Notification(NamedTuple):
    """What a receiver is told of a group of alerts."""

    key: str
    """Names the group; the same each time."""
    group: Labels
    """The labels that its alerts share and that made the group."""
    alerts: Sequence[Alert]
    """Firing, or resolved since the notification before."""


class NotDeliveredError(Exception):
    """The receiver did not take a notification; the text says why."""


class Receiver(Protocol):
    """Who is told of alerts."""

    async def deliver(self, notification: Notification) -> None:
        """Tells it.

        Raises:
            NotDeliveredError: it may not know; it is to be told again.
        """


class Webhook:
    """Posts notifications to a URL.

    Example:
        >>> webhook = Webhook("https://hooks.example.com/mesh", {}, timeout_s=10.0)
        >>> await webhook.deliver(notification)
        >>> await webhook.close()
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        timeout_s: float,
        external_url: str = "",
        max_alerts: int = 100,
    ) -> None:
        """Prepares a receiver.

        Args:
            url: where notifications are posted.
            headers: sent with them, such as ``Authorization``.
            timeout_s: how long an answer is waited for.
            external_url: where people find out more; part of notifications.
            max_alerts: in one notification; it says how many were left out.
        """
        self._url = url
        self._headers = dict(headers)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._external_url = external_url
        self._max_alerts = max_alerts
        self._session: aiohttp.ClientSession | None = None

    async def deliver(self, notification: Notification) -> None:
        """See ``Receiver.deliver``."""
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout, headers=self._headers)
        body = payload(notification, self._external_url, self._max_alerts)
        try:
            async with self._session.post(self._url, json=body, allow_redirects=False) as response:
                if response.status not in _OK:
                    raise NotDeliveredError(f"the webhook answered {response.status}")
        except TimeoutError as error:
            raise NotDeliveredError("the webhook did not answer in time") from error
        except aiohttp.ClientError as error:
            # Its text may hold the URL, which is a secret.
            raise NotDeliveredError(f"no connection: {type(error).__name__}") from error

    async def close(self) -> None:
        """Closes its connections."""
        if self._session is not None:
            await self._session.close()


def payload(notification: Notification, external_url: str, max_alerts: int) -> dict[str, Any]:
    """The body of a notification, as JSON has it."""
    told = notification.alerts[:max_alerts]
    firing = any(each.state is AlertState.FIRING for each in notification.alerts)
    return {
        "version": "4",
        "groupKey": notification.key,
        "truncatedAlerts": len(notification.alerts) - len(told),
        "status": "firing" if firing else "resolved",
        "receiver": RECEIVER,
        "groupLabels": dict(notification.group),
        "commonLabels": _shared([each.labels for each in notification.alerts]),
        "commonAnnotations": _shared([each.annotations for each in notification.alerts]),
        "externalURL": external_url,
        "alerts": [
            {
                "status": "firing" if each.state is AlertState.FIRING else "resolved",
                "labels": dict(each.labels),
                "annotations": dict(each.annotations),
                "startsAt": _time(each.fired_s),
                "endsAt": _NOT_ENDED if each.state is AlertState.FIRING else _time(each.resolved_s),
                "generatorURL": "",
                "fingerprint": each.fingerprint,
            }
            for each in told
        ],
    }


def _shared(texts: Sequence[Labels]) -> dict[str, str]:
    first, *others = (dict(each) for each in texts)
    return {k: v for k, v in first.items() if all(each.get(k) == v for each in others)}


def _time(unix_s: float) -> str:
    moment = datetime.fromtimestamp(unix_s, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
