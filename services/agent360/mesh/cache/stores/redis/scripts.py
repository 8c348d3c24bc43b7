"""The Lua scripts beside this module, each with what all of them share before it."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from agent360.mesh.runtime.redis import Redis, Script

_NAMES: Final = ("write", "delete", "prefix", "tags", "claim", "fill", "release", "reclaim")


class Scripts:
    """All scripts, known to a client of the servers."""

    __slots__ = ("claim", "delete", "fill", "prefix", "reclaim", "release", "tags", "write")

    claim: Script
    delete: Script
    fill: Script
    prefix: Script
    reclaim: Script
    release: Script
    tags: Script
    write: Script

    def __init__(self, redis: Redis) -> None:
        folder = files("agent360.mesh.cache.stores.redis") / "lua"
        prelude = (folder / "prelude.lua").read_text()
        for name in _NAMES:
            source = prelude + (folder / f"{name}.lua").read_text()
            setattr(self, name, redis.script(source))
