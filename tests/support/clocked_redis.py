"""A real Redis whose script goes by a clock that the test sets, and the stores of replicas."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import structlog
from support.redis_servers import RedisServer

from agent360.mesh.ratelimit.stores.redis import RedisStore
from agent360.mesh.ratelimit.stores.redis.timeline import Timeline
from agent360.mesh.runtime.redis import Redis, RedisSettings, Script

BEGIN_US = 1_790_000_000_000_000

_TIME = "local t = redis.call('TIME')\nlocal now = t[1] * 1000000 + t[2]"
_CLOCK = "local now = tonumber(redis.call('GET', 'test-clock'))"


class ClockedRedis:
    """Redis, its clock, and the time that passes for the replicas.

    Example:
        >>> async with ClockedRedis() as redis:
        ...     store = redis.store()
        ...     await redis.advance(5_000_000)
        ...     await redis.step(-30_000_000)

    Attributes:
        clock_us: what Redis' clock shows, in microseconds since 1970.
        passed_us: on the monotonic clocks.
    """

    def __init__(self) -> None:
        self.server = RedisServer()
        self.clock_us = BEGIN_US
        self.passed_us = 0

    async def __aenter__(self) -> Self:
        await self.server.__aenter__()
        self._redis = _Clocked(self.server.url, self)
        await self._redis.start()
        await self.reset()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._redis.close()
        await self.server.__aexit__(kind, error, traceback)

    async def reset(self) -> None:
        """Empties it, and sets its clock to the beginning."""
        await self.server.command("FLUSHDB")
        self.passed_us = 0
        await self._set(BEGIN_US)

    async def advance(self, us: int) -> None:
        """Lets time pass on every clock."""
        self.passed_us += us
        await self._set(self.clock_us + us)

    async def step(self, us: int) -> None:
        """Sets Redis' clock forward, or back below 0; no time passes."""
        await self._set(self.clock_us + us)

    def store(self) -> RedisStore:
        """The store of a replica that has just started."""
        return RedisStore(
            self._redis, structlog.get_logger(), prefix="p", answer_s=5.0, lease_ttl_s=1.0,
            records_kept_s=3_600.0, timeline=Timeline(lambda: self.passed_us * 1_000),
        )  # fmt: skip

    async def _set(self, us: int) -> None:
        self.clock_us = us
        await self.server.command("SET", "test-clock", us)


class _Clocked(Redis):
    def __init__(self, url: str, clock: ClockedRedis) -> None:
        super().__init__(url, RedisSettings(timeout_s=5), structlog.get_logger())
        self._clock = clock

    def script(self, source: str) -> Script:
        """The script with the test's clock."""
        assert _TIME in source
        return super().script(source.replace(_TIME, _CLOCK))

    def now_us(self) -> int:
        """What the test's clock shows."""
        return self._clock.clock_us
