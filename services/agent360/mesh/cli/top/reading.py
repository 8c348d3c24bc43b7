"""Asks the metrics service for the figures of a board."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Final

from agent360.client import Mesh, MeshError, MetricGroup
from agent360.mesh.cli.top.board import AlertRow, Board, ModelRow, ServiceRow, TenantRow
from agent360.metrics.v1 import metrics_pb2 as pb

ALL_TENANTS: Final = "*"
"""Tenant of queries over all tenants, for admins."""

_BUCKET_S: Final = 10
_HOUR_S: Final = 3600.0
_QUANTILES: Final = (0.5, 0.95, 0.99)
_DENIED: Final = "RESOURCE_EXHAUSTED"
_CALLERS_FAULT: Final = frozenset(
    {
        "OK", "CANCELLED", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
        "UNAUTHENTICATED", "FAILED_PRECONDITION", "OUT_OF_RANGE", _DENIED,
    }
)  # fmt: skip

Sums = Mapping[tuple[str, ...], float]
"""A figure by the values of labels."""


class BoardReader:
    """Reads boards.

    Example:
        >>> reader = BoardReader(mesh, window_s=60)
        >>> board = await reader.read()
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        window_s: float,
        tenant: str = ALL_TENANTS,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Prepares a reader.

        Args:
            mesh: connected to the metrics service.
            window_s: rates are means over so many seconds.
            tenant: whose figures; ``*``: all tenants', for admins.
            wall: the time of day, Unix time.
        """
        self._mesh = mesh
        self._window_s = window_s
        self._tenant = tenant
        self._wall = wall

    async def read(self) -> Board:
        """A look at the window that ends now; what cannot be asked for is left out and named."""
        missing: list[str] = []
        by_tenant = "tenant" if self._tenant == ALL_TENANTS else ""
        sums = {
            subject: self._sums(name, labels, missing)
            for subject, (name, labels) in {
                "calls": ("mesh_requests", ("service", "code")),
                "tenants": ("mesh_requests", (by_tenant, "code")),
                "tokens": ("inference_tokens_total", ("model", "direction")),
                "tenant_tokens": ("inference_tokens_total", (by_tenant,)),
                "cost": ("inference_cost_usd_total", ("model",)),
                "tenant_cost": ("inference_cost_usd_total", (by_tenant,)),
                "answers": ("inference_answers_total", ("model", "source")),
                "lookups": ("cache_lookups_total", ("outcome",)),
            }.items()
        }
        found, durations, batches, alerts = await asyncio.gather(
            asyncio.gather(*sums.values()),
            self._quantiles("mesh_request_seconds", "service", missing),
            self._means("inference_batch_size", "model", missing),
            self._alerts(missing),
        )
        figures = dict(zip(sums, found, strict=True))
        return Board(
            services=_services(figures["calls"], durations, self._window_s),
            tenants=_tenants(
                figures["tenants"],
                figures["tenant_tokens"],
                figures["tenant_cost"],
                self._window_s,
                self._tenant,
            ),
            models=_models(
                figures["answers"], figures["tokens"], batches, figures["cost"], self._window_s
            ),
            cache_hits=_hits(figures["lookups"]),
            alerts=alerts,
            missing=tuple(dict.fromkeys(missing)),
        )

    def _query(self, name: str, aggregation: Any, labels: tuple[str, ...]) -> pb.QueryRequest:
        """One step that ends with the last bucket that is full."""
        end = int(self._wall()) // _BUCKET_S * _BUCKET_S
        request = pb.QueryRequest(name=name, aggregation=aggregation)
        request.start_time.FromNanoseconds(int((end - self._window_s) * 1e9))
        request.end_time.FromNanoseconds(int(end * 1e9))
        request.step.FromNanoseconds(int(self._window_s * 1e9))
        request.group_by.extend(label for label in labels if label)
        return request

    async def _groups(self, request: pb.QueryRequest, missing: list[str]) -> list[MetricGroup]:
        try:
            return [group async for group in self._mesh.metrics.query(request, tenant=self._tenant)]
        except MeshError as error:
            missing.append(f"{request.name}: {error.reason}: {error.message}")
            return []

    async def _sums(self, name: str, labels: tuple[str, ...], missing: list[str]) -> Sums:
        request = self._query(name, pb.AGGREGATION_SUM, labels)
        found: dict[tuple[str, ...], float] = defaultdict(float)
        for group in await self._groups(request, missing):
            key = tuple(group.labels.get(label, "") for label in labels)
            found[key] += sum(point.value for point in group.points)
        return found

    async def _means(self, name: str, label: str, missing: list[str]) -> Mapping[str, float]:
        request = self._query(name, pb.AGGREGATION_MEAN, (label,))
        groups = await self._groups(request, missing)
        return {
            group.labels.get(label, ""): group.points[-1].value for group in groups if group.points
        }

    async def _quantiles(
        self, name: str, label: str, missing: list[str]
    ) -> Mapping[str, tuple[float, ...]]:
        request = self._query(name, pb.AGGREGATION_QUANTILES, (label,))
        request.quantiles.extend(_QUANTILES)
        groups = await self._groups(request, missing)
        return {
            group.labels.get(label, ""): tuple(group.points[-1].quantiles)
            for group in groups
            if group.points
        }

    async def _alerts(self, missing: list[str]) -> tuple[AlertRow, ...]:
        try:
            found = [alert async for alert in self._mesh.metrics.list_alerts(tenant=self._tenant)]
        except MeshError as error:
            missing.append(f"alerts: {error.reason}: {error.message}")
            return ()
        rows = [
            AlertRow(
                alert.rule_id,
                dict(alert.labels),
                "firing" if alert.state == pb.ALERT_STATE_FIRING else "pending",
                alert.value,
                alert.annotations.get("summary", ""),
            )
            for alert in found
        ]
        return tuple(sorted(rows, key=lambda row: (row.state != "firing", row.rule)))


def _services(
    calls: Sums, durations: Mapping[str, tuple[float, ...]], window_s: float
) -> list[ServiceRow]:
    totals: dict[str, float] = defaultdict(float)
    errors: dict[str, float] = defaultdict(float)
    for (service, code), count in calls.items():
        totals[service] += count
        errors[service] += 0.0 if code in _CALLERS_FAULT else count
    return [
        ServiceRow(
            service,
            total / window_s,
            errors[service] / total if total else 0.0,
            *(durations.get(service) or (None, None, None)),
        )
        for service, total in sorted(totals.items(), key=lambda item: -item[1])
    ]


def _tenants(
    calls: Sums, tokens: Sums, cost: Sums, window_s: float, tenant: str
) -> list[TenantRow]:
    """Rows of tenants; of a single one, which the figures do not name, where just that is asked."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for (name, code), count in calls.items():
        row = totals[name]
        row[0] += count
        row[1] += 0.0 if code in ("OK", _DENIED) else count
        row[2] += count if code == _DENIED else 0.0
    return [
        TenantRow(
            name or tenant,
            total / window_s,
            failed / window_s,
            denied / window_s,
            tokens.get((name,), 0.0) / window_s,
            cost.get((name,), 0.0) / window_s * _HOUR_S,
        )
        for name, (total, failed, denied) in sorted(totals.items(), key=lambda item: -item[1][0])
    ]


def _models(
    answers: Sums, tokens: Sums, batches: Mapping[str, float], cost: Sums, window_s: float
) -> list[ModelRow]:
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (model, source), count in answers.items():
        totals[model][0] += count
        totals[model][1] += 0.0 if source == "model" else count
    for model, _ in tokens:
        _ = totals[model]
    return [
        ModelRow(
            model,
            total / window_s,
            kept / total if total else 0.0,
            tokens.get((model, "input"), 0.0) / window_s,
            tokens.get((model, "output"), 0.0) / window_s,
            batches.get(model),
            cost.get((model,), 0.0) / window_s * _HOUR_S,
        )
        for model, (total, kept) in sorted(totals.items(), key=lambda item: -item[1][0])
    ]


def _hits(lookups: Sums) -> float | None:
    total = sum(lookups.values())
    hits = sum(count for (outcome,), count in lookups.items() if outcome != "miss")
    return hits / total if total else None
