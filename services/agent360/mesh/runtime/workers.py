"""Work that would keep the event loop busy, done by processes of its own, most urgent first."""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import grpc
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from agent360.client.errors import MeshError
from agent360.mesh.runtime.call import Priority

R = TypeVar("R")

_TRIES: Final = 2
"""How often a task is begun whose worker dies; one that kills two workers is to blame itself."""


@dataclass(order=True, slots=True)
class _Task:
    rank: tuple[int, int]
    """What comes first: priority, then the order in which tasks came."""
    work: Callable[[], Any] = field(compare=False)
    result: asyncio.Future[Any] = field(compare=False)
    tries: int = field(default=0, compare=False)


class Workers:
    """Processes that compute what functions and arguments that can be pickled say.

    Tasks wait in order of priority, and a waiting one costs nothing when its caller leaves. Workers
    are spawned, not forked, when they are first needed. When one is killed, all are replaced, and
    what they were at is begun once more: tasks must be free of side effects.

    Example:
        >>> workers = Workers(2, log, registry)
        >>> total = await workers.run(sum, [1, 2, 3], priority=Priority.LOW)
    """

    def __init__(
        self,
        processes: int,
        log: structlog.stdlib.BoundLogger,
        registry: CollectorRegistry,
        *,
        max_waiting: int = 1_000,
    ) -> None:
        """Prepares workers; none runs yet.

        Args:
            processes: how many there are at most.
            log: told of workers that died.
            registry: where metrics are registered.
            max_waiting: tasks that may wait; further ones are refused.
        """
        self._processes = processes
        self._max_waiting = max_waiting
        self._log = log
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: list[_Task] = []
        self._order = itertools.count()
        self._running: set[asyncio.Task[None]] = set()
        self._died = Counter("mesh_workers_died", "Workers that were killed.", registry=registry)
        waiting = Gauge("mesh_worker_tasks_waiting", "Tasks that wait.", registry=registry)
        waiting.set_function(lambda: len(self._waiting))
        self._closed = False

    async def run(
        self, work: Callable[..., R], *args: Any, priority: Priority = Priority.NORMAL
    ) -> R:
        """Has a worker call ``work``, and returns what it returns.

        Raises:
            MeshError: RESOURCE_EXHAUSTED WORKERS_BUSY, if too many tasks wait; INTERNAL
                WORKER_DIED, if two workers died over the task.
            Exception: what ``work`` raised.
        """
        if self._closed or len(self._waiting) >= self._max_waiting:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "WORKERS_BUSY",
                f"{len(self._waiting):,} tasks wait for a worker already",
                retry_after_s=1.0,
            )
        task = _Task(
            (-int(priority), next(self._order)),
            functools.partial(work, *args),
            asyncio.get_running_loop().create_future(),
        )
        heapq.heappush(self._waiting, task)
        self._dispatch()
        found: R = await task.result
        return found

    async def close(self) -> None:
        """Ends the workers; tasks that wait or run are given up."""
        self._closed = True
        for task in self._waiting:
            task.result.cancel()
        self._waiting.clear()
        for running in self._running:
            running.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        pool, self._pool = self._pool, None
        if pool is not None:
            await asyncio.to_thread(pool.shutdown, cancel_futures=True)

    def _dispatch(self) -> None:
        """Hands tasks to free workers: one to each, so that what comes later may go first."""
        while self._waiting and len(self._running) < self._processes:
            task = heapq.heappop(self._waiting)
            if task.result.done():
                continue
            running = asyncio.get_running_loop().create_task(self._carry_out(task))
            self._running.add(running)
            running.add_done_callback(self._ended)

    def _ended(self, running: asyncio.Task[None]) -> None:
        self._running.discard(running)
        if not self._closed:
            self._dispatch()

    async def _carry_out(self, task: _Task) -> None:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._processes, mp_context=multiprocessing.get_context("spawn")
            )
        pool = self._pool
        task.tries += 1
        try:
            found = await asyncio.get_running_loop().run_in_executor(pool, task.work)
        except BrokenExecutor:
            if self._pool is pool:
                self._pool = None
                self._died.inc()
                self._log.warning("a worker died; all are replaced")
                pool.shutdown(wait=False)
            if task.tries < _TRIES:
                heapq.heappush(self._waiting, task)
            elif not task.result.done():
                task.result.set_exception(
                    MeshError(
                        grpc.StatusCode.INTERNAL,
                        "WORKER_DIED",
                        f"{task.tries} workers died at this task, which is not begun again",
                    )
                )
        except Exception as error:  # noqa: BLE001 - it is the answer of whoever waits
            if not task.result.done():
                task.result.set_exception(error)
        else:
            if not task.result.done():
                task.result.set_result(found)
