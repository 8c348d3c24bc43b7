"""Answers OTLP exports once what they bring is durable."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2

from agent360.client.errors import MeshError
from agent360.mesh.metrics.intake import Intake
from agent360.mesh.metrics.otlp.cumulative import Totals
from agent360.mesh.metrics.otlp.reading import ExportReader
from agent360.mesh.metrics.rejections import Refused, Rejections
from agent360.mesh.metrics.report import AcceptedTimes
from agent360.mesh.metrics.series_table import SeriesTable
from agent360.mesh.metrics.settings import OtlpSettings
from agent360.mesh.runtime.call import Call

SERVICE: Final = metrics_service_pb2.DESCRIPTOR.services_by_name["MetricsService"]
"""The gRPC service."""

_RETRY_AFTER_S: Final = 1.0
_NAMED_REJECTIONS: Final = 10


class OtlpService:
    """Takes gauges, sums and histograms of both temporalities, also exponential ones.

    An export whose answer was lost and that is repeated adds cumulative points once; those of delta
    temporality twice, as OTLP gives nothing to know them by.
    """

    def __init__(
        self,
        settings: OtlpSettings,
        intake: Intake,
        table: SeriesTable,
        times: AcceptedTimes,
        rejections: Rejections,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._intake = intake
        self._table = table
        self._times = times
        self._rejections = rejections
        self._now = now
        self._resource_labels = frozenset(settings.resource_labels)
        self._totals = Totals(lambda: intake.marks, settings.max_cumulative, int(now() * 1e9))

    async def export(self, call: Call, request: Any) -> Any:
        """Takes one request.

        Raises:
            MeshError: nothing of it was taken; it may be repeated.
        """
        if self._intake.fault:
            raise MeshError(
                grpc.StatusCode.UNAVAILABLE,
                "JOURNAL_FAILING",
                "the service cannot write to its disk at present",
                retry_after_s=_RETRY_AFTER_S,
            )
        if not self._intake.has_room:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "OVERLOADED",
                "more samples wait to be stored than may",
                retry_after_s=_RETRY_AFTER_S,
            )
        reader = ExportReader(
            call.tenant,
            self._table,
            self._totals,
            self._times,
            self._resource_labels,
            self._now(),
        )
        columns = reader.read(request)
        self._rejections.add(reader.refused)
        response = metrics_service_pb2.ExportMetricsServiceResponse()
        if reader.refused:
            response.partial_success.rejected_data_points = len(reader.refused)
            response.partial_success.error_message = _told(reader.refused)
        if len(columns.series) or reader.marks:
            # No await since the marks were read: two exports cannot both add the same increase.
            await self._intake.take(columns, reader.marks)
        return response


def _told(refused: Iterable[Refused]) -> str:
    """The reasons, the most frequent first, with the number of points of each."""
    reasons = Counter(str(each) for each in refused)
    told = [f"{text} ({count})" for text, count in reasons.most_common(_NAMED_REJECTIONS)]
    left = len(reasons) - len(told)
    return "; ".join([*told, *([f"and {left} more"] if left else [])])
