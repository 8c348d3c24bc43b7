"""What the event loop waits for and does: I/O waits, operations and their counts, its lag."""

from __future__ import annotations

import asyncio
import contextlib
import html as markup
import time
from asyncio import events
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from agent360.mesh.runtime.profiling.stacks import HTML_TYPE, Frame, Profile, Stack, speedscope

LAG_EVERY_S: Final = 0.01
"""How often the loop is asked how late it is."""

_ROWS: Final = 200
_WAITING: Final = Frame("waiting for I/O")
_LOOP: Final = Frame("event loop")


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of step of the loop: a step of a task, or a callback."""

    name: str
    count: int
    total_s: float
    worst_s: float


@dataclass(frozen=True, slots=True)
class Waits:
    """What a loop did for a while."""

    seconds: float
    """For how long it was watched."""
    waited_s: float
    """For how long it waited for I/O."""
    turns: int
    """How often it waited: turns of the loop."""
    ready: int
    """How many files and sockets were ready, over all turns."""
    operations: tuple[Operation, ...]
    """The costliest first."""
    lags_s: tuple[float, ...]
    """How late the loop was, each time it was asked; sorted."""

    def lag_s(self, quantile: float) -> float:
        """The lag at a quantile, in seconds."""
        if not self.lags_s:
            return 0.0
        return self.lags_s[min(len(self.lags_s) - 1, int(quantile * len(self.lags_s)))]


async def profile_waits(seconds: float, *, html: bool) -> Profile:
    """Times every step of the loop. What that costs: ``agent360-mesh bench profiling``."""
    waits = await watch(seconds)
    if html:
        return Profile(HTML_TYPE, _page(waits).encode())
    times = [Stack((_LOOP, _WAITING), waits.waited_s)]
    counts = []
    for operation in waits.operations:
        frames = (_LOOP, Frame(operation.name))
        times.append(Stack(frames, operation.total_s))
        counts.append(Stack(frames, operation.count))
    lags = [Stack((_LOOP, Frame(f"late by p{q * 100:g}")), waits.lag_s(q)) for q in _QUANTILES]
    return speedscope(
        "event loop",
        [("time", "seconds", times), ("operations", "none", counts), ("lag", "seconds", lags)],
    )


async def watch(seconds: float) -> Waits:
    """Watches the running loop."""
    loop: Any = asyncio.get_running_loop()
    recorder = _Recorder()
    lags: list[float] = []
    began = time.perf_counter()
    with _recording(loop, recorder):
        while (now := time.perf_counter()) - began < seconds:
            due = now + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            lags.append(max(0.0, time.perf_counter() - due))
    return Waits(
        seconds=time.perf_counter() - began,
        waited_s=recorder.waited_s,
        turns=recorder.turns,
        ready=recorder.ready,
        operations=tuple(
            sorted(
                (Operation(name, *row) for name, row in recorder.operations.items()),
                key=lambda operation: -operation.total_s,
            )
        ),
        lags_s=tuple(sorted(lags)),
    )


_QUANTILES: Final = (0.5, 0.9, 0.99, 1.0)


class _Recorder:
    """Sums of what the loop does."""

    def __init__(self) -> None:
        self.waited_s = 0.0
        self.turns = 0
        self.ready = 0
        self.operations: dict[str, list[Any]] = {}

    def ran(self, name: str, took_s: float) -> None:
        row = self.operations.get(name)
        if row is None:
            row = self.operations[name] = [0, 0.0, 0.0]
        row[0] += 1
        row[1] += took_s
        if took_s > row[2]:
            row[2] = took_s


@contextlib.contextmanager
def _recording(loop: Any, recorder: _Recorder) -> Iterator[None]:
    """Puts clocks around the two things that an event loop does: select, and run a handle.

    Python offers no hook for these. Both are put back as they were, whatever happens.
    """
    clock = time.perf_counter
    selector = getattr(loop, "_selector", None)
    handle_class: Any = events.Handle
    run = handle_class._run  # noqa: SLF001

    def timed_run(handle: Any) -> None:
        began = clock()
        try:
            run(handle)
        finally:
            recorder.ran(_name(handle._callback), clock() - began)  # noqa: SLF001

    def timed_select(timeout: float | None = None) -> Any:
        began = clock()
        found = select(timeout)
        recorder.waited_s += clock() - began
        recorder.turns += 1
        recorder.ready += len(found)
        return found

    handle_class._run = timed_run  # noqa: SLF001
    if selector is not None:
        select = selector.select
        selector.select = timed_select
    try:
        yield
    finally:
        handle_class._run = run  # noqa: SLF001
        if selector is not None:
            del selector.select


def _name(callback: Any) -> str:
    """What a handle runs: the coroutine of a task's step, or the function."""
    owner = getattr(callback, "__self__", None)
    get_coroutine: Callable[[], Any] | None = getattr(owner, "get_coro", None)
    if get_coroutine is not None:
        coroutine = get_coroutine()
        return f"task {getattr(coroutine, '__qualname__', type(coroutine).__name__)}"
    name = getattr(callback, "__qualname__", None)
    if name is None:
        name = type(callback).__qualname__
    module = getattr(callback, "__module__", None) or ""
    return f"{module}.{name}" if module else name


def _page(waits: Waits) -> str:
    rows = "".join(
        f"<tr><td>{markup.escape(each.name)}</td><td>{each.count:,}</td>"
        f"<td>{each.total_s * 1e3:,.1f}</td><td>{each.total_s / each.count * 1e6:,.1f}</td>"
        f"<td>{each.worst_s * 1e3:,.2f}</td></tr>"
        for each in waits.operations[:_ROWS]
    )
    lags = ", ".join(f"p{q * 100:g} {waits.lag_s(q) * 1e3:.2f} ms" for q in _QUANTILES)
    busy = sum(each.total_s for each in waits.operations)
    return (
        "<!doctype html><meta charset=utf-8><title>Event loop</title>"
        "<style>body{font:14px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right}"
        "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f4f4f4}</style>"
        f"<h1>Event loop, {waits.seconds:.1f} s</h1>"
        f"<p>Waited for I/O {waits.waited_s:.3f} s in {waits.turns:,} turns "
        f"({waits.ready:,} ready), worked {busy:.3f} s. Late: {lags}.</p>"
        "<table><tr><th>operation</th><th>count</th><th>total ms</th><th>mean us</th>"
        f"<th>worst ms</th></tr>{rows}</table>"
    )
