"""Sets up the process's log, that of structlog and that of Python's own logging alike."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from agent360.mesh.runtime.logs.hub import LEVELS, LogHub, set_hub
from agent360.mesh.runtime.settings import LogSettings, RedactionSettings


def configure_logging(
    settings: LogSettings, redaction: RedactionSettings, service: str, *, file: Any = None
) -> LogHub:
    """Sets up the process's log: one JSON object a line, or colours where a person looks on.

    Args:
        settings: of the log.
        redaction: what is taken out of it.
        service: whose records those are that name none.
        file: where lines go; None: standard error.

    Returns:
        What the records pass.
    """
    file = file or sys.stderr
    console = settings.format == "console" or (settings.format == "auto" and file.isatty())
    renderer: Any = structlog.processors.JSONRenderer()
    if console:
        # Its own tracebacks show local variables, and with them keys and what callers said.
        renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    hub = LogHub(settings, redaction, service)
    without_locals = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    errors: list[Any] = [] if console else [structlog.processors.ExceptionRenderer(without_locals)]
    context: list[Any] = [
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.contextvars.merge_contextvars,
        hub.complete,
    ]
    last: list[Any] = [*errors, hub.redact, hub.hand_on, renderer]
    structlog.configure(
        processors=[structlog.processors.add_log_level, hub.sample, *context, *last],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[settings.level]),
        logger_factory=structlog.PrintLoggerFactory(file),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(file)
    handler.addFilter(hub.filter)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
            foreign_pre_chain=[structlog.processors.add_log_level, hub.from_record, *context],
        )
    )
    logging.basicConfig(level=LEVELS[settings.level], handlers=[handler], force=True)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    set_hub(hub)
    return hub
