"""The Lua scripts, put together from the files beside this module."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

_PARTS: Final = (
    "prelude",
    "token_bucket",
    "sliding_window",
    "fixed_window",
    "concurrency",
)


def script_source() -> str:
    """What all algorithms share, each algorithm, and what carries out operations on them."""
    return _put_together("operations")


def usage_source() -> str:
    """The same algorithms, and what adds and tells usage."""
    return _put_together("usage")


def _put_together(last: str) -> str:
    folder = files("agent360.mesh.ratelimit.stores.redis") / "lua"
    return "".join((folder / f"{part}.lua").read_text() for part in (*_PARTS, last))
