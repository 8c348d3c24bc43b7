"""The one Lua script, put together from the files beside this module."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

_PARTS: Final = (
    "prelude",
    "token_bucket",
    "sliding_window",
    "fixed_window",
    "concurrency",
    "operations",
)


def script_source() -> str:
    """What all algorithms share, each algorithm, and what carries out operations on them."""
    folder = files("agent360.mesh.ratelimit.stores.redis") / "lua"
    return "".join((folder / f"{part}.lua").read_text() for part in _PARTS)
