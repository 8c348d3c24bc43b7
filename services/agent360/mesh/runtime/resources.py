"""What a process uses: memory, processor, descriptors, disk; and how its event loop keeps up."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import shutil
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric

from agent360.mesh.runtime.call import MESH_TENANT
from agent360.mesh.runtime.telemetry import Measurements

LAG_EVERY_S: Final = 0.1
"""How often the event loop is asked how late it is."""

_REPORT_EVERY_S: Final = 5.0
_BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_PAGE_BYTES: Final = resource.getpagesize()
_STATM: Final = Path("/proc/self/statm")
_DESCRIPTORS: Final = Path("/proc/self/fd")


@dataclass(frozen=True, slots=True)
class Usage:
    """What the process uses now."""

    resident_bytes: int
    """Memory that is in RAM."""
    cpu_s: float
    """Processor time of all its threads since it started, in seconds."""
    descriptors: int
    """Open files and sockets."""
    max_descriptors: int
    """Most of them that the system allows."""
    disk_free_bytes: int
    """Free space where the service keeps its files."""
    disk_bytes: int
    """Size of that file system."""


def measure(directory: Path) -> Usage:
    """Asks the operating system.

    Args:
        directory: on the file system whose space is told.
    """
    times = os.times()
    disk = shutil.disk_usage(directory if directory.exists() else Path.cwd())
    return Usage(
        resident_bytes=resident_bytes(),
        cpu_s=times.user + times.system,
        descriptors=_descriptors(),
        max_descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        disk_free_bytes=disk.free,
        disk_bytes=disk.total,
    )


def resident_bytes() -> int:
    """Memory of this process that is in RAM; its peak where the system tells no more."""
    try:
        return int(_STATM.read_bytes().split()[1]) * _PAGE_BYTES
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _descriptors() -> int:
    try:
        return sum(1 for _ in _DESCRIPTORS.iterdir())
    except OSError:
        return 0


class Durations:
    """A histogram of durations with their sum and worst."""

    __slots__ = ("buckets", "count", "total_s", "worst_s")

    def __init__(self) -> None:
        self.buckets = [0] * (len(_BOUNDS_S) + 1)
        self.count = 0
        self.total_s = 0.0
        self.worst_s = 0.0
        """The longest since ``take_worst`` was called."""

    def add(self, duration_s: float) -> None:
        """Counts one."""
        self.buckets[bisect_left(_BOUNDS_S, duration_s)] += 1
        self.count += 1
        self.total_s += duration_s
        self.worst_s = max(self.worst_s, duration_s)

    def take_worst(self) -> float:
        """The longest since the last time, in seconds."""
        worst, self.worst_s = self.worst_s, 0.0
        return worst

    def cumulative(self) -> list[tuple[str, float]]:
        """Counts up to each bound, as Prometheus has them."""
        total, rows = 0, []
        for bound, count in zip((*map(str, _BOUNDS_S), "+Inf"), self.buckets, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


class CollectionPauses:
    """How long Python's garbage collections stop the process; watch with ``gc.callbacks``."""

    def __init__(self) -> None:
        self.pauses = Durations()
        """All collections, of every generation."""
        self._began = 0.0

    def __call__(self, phase: str, _: dict[str, Any]) -> None:
        """Called by Python before and after each collection."""
        if phase == "start":
            self._began = time.perf_counter()
        elif self._began:
            self.pauses.add(time.perf_counter() - self._began)


class ResourceMonitor:
    """Watches the process for Prometheus and the metrics service.

    Series of the metrics service, with the label ``service``: ``mesh_resident_bytes``,
    ``mesh_cpu_seconds``, ``mesh_open_descriptors``, ``mesh_disk_free_bytes``, and as distributions
    ``mesh_event_loop_lag_seconds`` and ``mesh_gc_pause_seconds`` (the worst of each 5 s).

    Example:
        >>> monitor = ResourceMonitor("cache", measurements, Path("."))
        >>> registry.register(monitor)
        >>> task = asyncio.create_task(monitor.run())
    """

    def __init__(self, service: str, measurements: Measurements, directory: Path) -> None:
        """Prepares a monitor.

        Args:
            service: whose process it is.
            measurements: where it reports to.
            directory: where the service keeps its files.
        """
        self._labels = {"service": service}
        self._measurements = measurements
        self._directory = directory
        self._collections = CollectionPauses()
        self._cpu_told_s = 0.0
        self.lag = Durations()
        """How late the event loop ran what was due."""

    async def run(self) -> None:
        """Watches until cancelled."""
        gc.callbacks.append(self._collections)
        try:
            told = time.monotonic()
            while True:
                due = time.monotonic() + LAG_EVERY_S
                await asyncio.sleep(LAG_EVERY_S)
                now = time.monotonic()
                self.lag.add(max(0.0, now - due))
                if now - told >= _REPORT_EVERY_S:
                    told = now
                    self._report(await asyncio.to_thread(measure, self._directory))
        finally:
            gc.callbacks.remove(self._collections)

    def collect(self) -> Iterator[Metric]:
        """Metrics for Prometheus, beside those of its own process collector."""
        usage = measure(self._directory)
        yield GaugeMetricFamily(
            "mesh_disk_free_bytes",
            "Free space where the service keeps its files.",
            usage.disk_free_bytes,
        )
        for name, help_text, durations in (
            ("mesh_event_loop_lag_seconds", "How late the event loop ran what was due.", self.lag),
            (
                "mesh_gc_pause_seconds",
                "How long garbage collections stopped the process.",
                self._collections.pauses,
            ),
        ):
            yield HistogramMetricFamily(
                name, help_text, buckets=durations.cumulative(), sum_value=durations.total_s
            )
        yield CounterMetricFamily(
            "mesh_cpu_seconds", "Processor time of all threads, in seconds.", usage.cpu_s
        )

    def _report(self, usage: Usage) -> None:
        measured = self._measurements
        cpu_s, self._cpu_told_s = usage.cpu_s - self._cpu_told_s, usage.cpu_s
        measured.count("mesh_cpu_seconds", cpu_s, self._labels, MESH_TENANT)
        for name, value, unit in (
            ("mesh_resident_bytes", float(usage.resident_bytes), "By"),
            ("mesh_open_descriptors", float(usage.descriptors), "1"),
            ("mesh_disk_free_bytes", float(usage.disk_free_bytes), "By"),
            ("mesh_event_loop_lag_seconds", self.lag.take_worst(), "s"),
            ("mesh_gc_pause_seconds", self._collections.pauses.take_worst(), "s"),
        ):
            measured.observe(name, value, self._labels, MESH_TENANT, unit=unit)
