"""A thread with an event loop, and how code without one reaches into it."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Generic, ParamSpec, Self, TypeVar

from agent360.client.chat import Answer
from agent360.client.errors import MeshError
from agent360.client.inference import AnswerStream, Delta
from agent360.client.many import Results

P = ParamSpec("P")
T = TypeVar("T")

_END: Final = object()


class Portal:
    """Runs an event loop on a thread of its own until it is closed, or the program ends.

    What is run inherits the context variables of its caller, so ``call_scope`` works as usual.

    Example:
        >>> with Portal() as portal:
        ...     portal.run(asyncio.sleep(1))
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="agent360-mesh", daemon=True)
        self._closing = threading.Lock()
        self._thread.start()
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether nothing can be run any more."""
        return self._loop.is_closed()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine to its end and returns its result.

        Raises:
            RuntimeError: the portal is closed, or this is its own thread.
        """
        try:
            future = self._submit(work)
        except RuntimeError:
            work.close()
            raise
        try:
            return future.result()
        except BaseException:  # KeyboardInterrupt above all: nobody waits for the work any more
            future.cancel()
            raise

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls a function on the loop's thread."""

        async def work() -> T:
            return function(*args, **kwargs)

        return self.run(work())

    def iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        """Yields what an asynchronous iterator yields, and closes it if it can be closed."""
        try:
            while (found := self.run(_awaited(anext(source, _END)))) is not _END:
                yield found  # type: ignore[misc]  # it is not the mark of the end
        finally:
            if isinstance(source, AsyncGenerator) and not self.closed:
                self.run(source.aclose())

    def in_thread(self, function: Callable[P, T]) -> Callable[P, Awaitable[T]]:
        """A blocking function as the loop can await it: it runs on another thread."""

        async def work(*args: P.args, **kwargs: P.kwargs) -> T:
            return await asyncio.to_thread(function, *args, **kwargs)

        return work

    def close(self) -> None:
        """Stops the loop; what still runs is cancelled. May be repeated."""
        with self._closing:
            if self._loop.is_closed():
                return
            atexit.unregister(self.close)
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "a synchronous call was made on the mesh's own thread, which would wait for itself"
            )
        if self._loop.is_closed():
            raise RuntimeError("the mesh is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()


class SyncResults(Generic[T]):
    """The results of many calls, each with the index of its request, as they arrive.

    A failed call gives a MeshError in the place of a result: it says nothing about the others.
    Requests are taken from their iterable on the mesh's own thread, as results are consumed.

    Example:
        >>> for index, lookup in mesh.cache.get_many(keys):
        ...     print(keys[index], lookup)
        >>> lookups = mesh.cache.get_many(keys).all()
    """

    def __init__(self, portal: Portal, results: Results[T]) -> None:
        self._portal = portal
        self._results = results

    def __iter__(self) -> Iterator[tuple[int, T | MeshError]]:
        """Yields each result with the index of its request, in the order they arrive."""
        for batch in self._portal.iterate(self._results.batches()):
            yield from batch

    def all(self) -> list[T | MeshError]:
        """All results in the order of the requests."""
        return self._portal.run(_awaited(self._results))


class SyncAnswerStream:
    """A streamed answer: iterate over its pieces, then read ``answer``.

    Example:
        >>> stream = mesh.inference.stream("Tell me a story.")
        >>> for delta in stream:
        ...     print(delta.text, end="")
        >>> print(stream.answer.usage)
    """

    def __init__(self, portal: Portal, stream: AnswerStream) -> None:
        self._portal = portal
        self._stream = stream

    def __iter__(self) -> Iterator[Delta]:
        """Yields the pieces as they come."""
        return self._portal.iterate(self._stream.__aiter__())

    @property
    def batch_size(self) -> int:
        """See ``AnswerStream.batch_size``."""
        return self._stream.batch_size

    @property
    def answer(self) -> Answer:
        """See ``AnswerStream.answer``."""
        return self._stream.answer


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable
