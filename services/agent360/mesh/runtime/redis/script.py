"""Lua scripts, sent by their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from redis.crc import key_slot

from agent360.mesh.runtime.redis.commands import Argument, Command


class Script:
    """A Lua script that servers load when they meet it for the first time.

    Example:
        >>> add = redis.script("return redis.call('INCRBY', KEYS[1], ARGV[1])")
        >>> (total,) = await redis.run([add.command([b"hits"], [3])])
    """

    __slots__ = ("_clustered", "sha", "source")

    def __init__(self, source: str, *, clustered: bool) -> None:
        """See Redis.script, which makes scripts known to the client."""
        self.source = source
        """Lua."""
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
        """What servers know it by."""
        self._clustered = clustered

    def command(self, keys: Sequence[bytes], arguments: Sequence[Argument] = ()) -> Command:
        """The command that runs it.

        Raises:
            ValueError: the keys are in different slots of a cluster.
        """
        if self._clustered and len(keys) > 1 and len({key_slot(key) for key in keys}) > 1:
            raise ValueError("the keys of a script must have one hash tag")
        key = keys[0] if keys else b""
        return Command(key, ("EVALSHA", self.sha, len(keys), *keys, *arguments))
