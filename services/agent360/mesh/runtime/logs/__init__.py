"""The process's log: one JSON object a line, sampled, counted by pattern, without secrets."""

from agent360.mesh.runtime.logs.hub import LogHub, current_hub
from agent360.mesh.runtime.logs.report import LogReport
from agent360.mesh.runtime.logs.setup import configure_logging

__all__ = ["LogHub", "LogReport", "configure_logging", "current_hub"]
