"""What every record of the process's log passes: counted, sampled, redacted, handed on."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from typing import Any, Final, Protocol

import structlog

from agent360.mesh.runtime.logs.patterns import Patterns
from agent360.mesh.runtime.logs.sampling import Sampler
from agent360.mesh.runtime.redaction import Redactor
from agent360.mesh.runtime.settings import LogSettings, RedactionSettings
from agent360.mesh.runtime.single import current_group

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
"""Levels by name, as in Python's logging."""

EventDict = MutableMapping[str, Any]

handing_on: ContextVar[bool] = ContextVar("agent360_handing_on_logs", default=False)
"""True in a task that hands records on: what is logged there is not handed on itself."""

_WARNING: Final = LEVELS["warning"]
_PATTERN: Final = "_pattern"
_UNTOUCHED: Final = frozenset({"event", "level", "timestamp", "exc_info", _PATTERN})


class Sink(Protocol):
    """Takes the records of a service that go to the metrics service."""

    def offer(self, event: EventDict, level: int, pattern: str) -> None:
        """Takes a record, or drops it; never waits. May be called by any thread."""


class LogHub:
    """Processors for structlog and a filter for Python's logging, with what they share.

    Example:
        >>> hub = LogHub(settings.log, settings.redaction, "cache")
        >>> structlog.configure(processors=[hub.sample, hub.complete, hub.hand_on, render])
        >>> hub.drain("cache")
        {('warning', 'call UNAVAILABLE'): 3}
    """

    def __init__(
        self,
        settings: LogSettings,
        redaction: RedactionSettings,
        service: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Begins with nothing counted.

        Args:
            settings: of the log.
            redaction: what is taken out.
            service: whose records those are that name none.
            clock: seconds, for sampling.
            chance: a number from 0 to 1, for the share that is handed on.
        """
        self.sinks: dict[str, Sink] = {}
        """Where records go, by service."""
        self._service = service
        self._share = settings.shipping.share
        self._chance = chance
        self._redactor = Redactor(redaction)
        self._patterns = Patterns(settings.sampling.max_patterns, self._redactor)
        self._sampler = Sampler(settings.sampling, clock)
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()

    def drain(self, service: str) -> dict[tuple[str, str], int]:
        """Records of a service since the last drain, by level and pattern; also those left out."""
        with self._lock:
            own = [key for key in self._counts if key[0] == service]
            return {key[1:]: self._counts.pop(key) for key in own}

    # ---------------------------------------------------------------- structlog's processors

    def sample(self, _: Any, __: str, event: EventDict) -> EventDict:
        """Counts a record; drops it if its pattern is too frequent.

        Raises:
            structlog.DropEvent: it is not written.
        """
        service = event.setdefault("service", self._service)
        code = event.get("code")
        text = str(event.get("event", ""))
        admitted = self._admit(service, event["level"], f"{text} {code}" if code else text)
        if admitted is None:
            raise structlog.DropEvent
        event[_PATTERN], suppressed = admitted
        if suppressed:
            event["suppressed"] = suppressed
        return event

    def complete(self, _: Any, __: str, event: EventDict) -> EventDict:
        """Adds the call that is being handled."""
        group = current_group.get(None)
        if group is not None:
            call = group.call
            for name, value in (
                ("tenant", call.tenant),
                ("method", call.method),
                ("request_id", call.request_id),
                ("trace_id", call.traceparent[3:35]),
                ("span_id", call.traceparent[36:52]),
            ):
                if value:
                    event.setdefault(name, value)
        return event

    def redact(self, _: Any, __: str, event: EventDict) -> EventDict:
        """Takes secrets out."""
        redactor = self._redactor
        event["event"] = redactor.text(str(event.get("event", "")))
        for name, value in event.items():
            if name not in _UNTOUCHED:
                event[name] = (
                    redactor.named(name, value)
                    if isinstance(value, str)
                    else redactor.value({name: value})[name]
                )
        return event

    def hand_on(self, _: Any, __: str, event: EventDict) -> EventDict:
        """Gives the sink of the record's service what is to be kept elsewhere."""
        pattern = event.pop(_PATTERN, "")
        level = LEVELS.get(event["level"], _WARNING)
        sink = self.sinks.get(event.get("service", ""))
        if sink is None or handing_on.get():
            return event
        if level >= _WARNING or self._chance() < self._share:
            sink.offer(event, level, pattern)
        return event

    # ---------------------------------------------------------------- Python's logging

    def filter(self, record: logging.LogRecord) -> bool:
        """As ``sample``, for a handler of Python's logging."""
        level = record.levelname.lower()
        admitted = self._admit(self._service, level, str(record.msg))
        if admitted is None:
            return False
        record.agent360_pattern, record.agent360_suppressed = admitted
        return True

    def from_record(self, _: Any, __: str, event: EventDict) -> EventDict:
        """Takes over what ``filter`` found out."""
        record = event["_record"]
        event["service"] = self._service
        event["logger"] = record.name
        event[_PATTERN] = getattr(record, "agent360_pattern", "")
        if suppressed := getattr(record, "agent360_suppressed", 0):
            event["suppressed"] = suppressed
        return event

    def _admit(self, service: str, level: str, text: str) -> tuple[str, int] | None:
        with self._lock:
            pattern = self._patterns.of(text)
            self._counts[service, level, pattern] += 1
            suppressed = self._sampler.admit(level, pattern)
        return None if suppressed is None else (pattern, suppressed)


_current: list[LogHub] = []


def current_hub() -> LogHub | None:
    """The hub of the process's log; None: its log was not set up by ``configure_logging``."""
    return _current[0] if _current else None


def set_hub(hub: LogHub | None) -> None:
    """Makes a hub that of the process."""
    _current[:] = [] if hub is None else [hub]
