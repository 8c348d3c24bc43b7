"""Gathers the requests of several callers into one round trip."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from agent360.mesh.ratelimit.decisions import Decision
from agent360.mesh.ratelimit.domain import Ask

_PATIENCE_S: Final = 0.005
"""How long requests wait for a round trip that is under way."""
_AT_ONCE: Final = 1
"""Round trips that are under way before requests wait."""
_MOST: Final = 2_000
"""Requests that go together."""

Decide = Callable[[Sequence[Ask]], Awaitable[Sequence[Decision]]]


class Gatherer:
    """Sends at once what comes while nothing is under way, and together what comes meanwhile.

    Invariant: requests are decided in the order in which they came, unless a round trip takes
    longer than the patience: what waits then overtakes nothing but does not wait for its end.
    """

    def __init__(self, decide: Decide) -> None:
        self._decide = decide
        self._waiting: list[tuple[Sequence[Ask], asyncio.Future[Sequence[Decision]]]] = []
        self._waiting_asks = 0
        self._under_way = 0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def decide(self, asks: Sequence[Ask]) -> Sequence[Decision]:
        """Decides requests, with those of other callers."""
        if self._under_way < _AT_ONCE and not self._waiting:
            self._under_way += 1
            try:
                return await self._decide(asks)
            finally:
                self._ended()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[Decision]] = loop.create_future()
        self._waiting.append((asks, future))
        self._waiting_asks += len(asks)
        if self._waiting_asks >= _MOST:
            self._send()
        elif self._timer is None:
            self._timer = loop.call_later(_PATIENCE_S, self._send)
        return await future

    def _ended(self) -> None:
        self._under_way -= 1
        if self._waiting and self._under_way < _AT_ONCE:
            self._send()

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting, self._waiting_asks = self._waiting, [], 0
        self._under_way += 1
        # An empty context: the trace and the deadline of one caller are not those of the others.
        task = asyncio.get_running_loop().create_task(
            self._decide_all(waiting), context=contextvars.Context()
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _decide_all(
        self, waiting: Sequence[tuple[Sequence[Ask], asyncio.Future[Sequence[Decision]]]]
    ) -> None:
        try:
            asks = [ask for part, _ in waiting for ask in part]
            decisions = await self._decide(asks)
        except BaseException as error:  # whoever waits must learn of it
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            first = 0
            for part, future in waiting:
                after = first + len(part)
                if not future.done():
                    future.set_result(decisions[first:after])
                first = after
        finally:
            self._ended()
