"""``bench inference``: the gateway beside a direct client and the LiteLLM proxy."""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
from rich.console import Console
from rich.table import Table

from agent360.client import GenerateRequest, Mesh
from agent360.mesh.bench.bare import CHECK, BareClient
from agent360.mesh.bench.litellm import find_litellm, litellm_proxy
from agent360.mesh.bench.local_engine import measure_local_engine
from agent360.mesh.bench.processes import (
    POLICIES_ON,
    PROCESSES,
    bare_server,
    cpu_seconds,
    simulator,
)
from agent360.mesh.bench.timing import Series, run_tasks
from agent360.mesh.cli.supervisor import Supervisor
from agent360.mesh.free_ports import free_ports
from agent360.mesh.services import NAMES

TASKS: Final = 64
"""Of requests at a time where the gateways are compared."""
CACHED_TASKS: Final = 256
"""Of requests that the cache answers."""

_TENANT: Final = "bench"
_MODEL: Final = "sim-small"
_MAX_TOKENS: Final = 16
_CHUNKS: Final = 200
_STREAMS: Final = 20
_LONE_CALLS: Final = 200
_HTTP_OFFSET: Final = 1000

_TITLES: Final = {
    "direct": f"direct aiohttp, {TASKS} tasks",
    "grpc": f"our gRPC, {TASKS} tasks",
    "http": f"our HTTP front, {TASKS} tasks",
    "litellm": f"LiteLLM proxy, {TASKS} tasks",
    "bare_unary": f"bare unary, {CACHED_TASKS} tasks",
    "cached": f"our gRPC, answered from the cache, {CACHED_TASKS} tasks",
    "direct_1": "direct aiohttp, one at a time",
    "grpc_1": "our gRPC, one at a time",
    "http_1": "our HTTP front, one at a time",
    "litellm_1": "LiteLLM proxy, one at a time",
}

Call = Callable[[int], Awaitable[object]]


@dataclass(slots=True)
class InferenceFigures:
    """What was measured."""

    series: dict[str, Series] = field(default_factory=dict)
    """By kind; see the titles."""
    chunk_cpu_s: dict[str, list[float]] = field(default_factory=dict)
    """CPU time of a chunk: of the direct client, and of the service that relays it; by round."""
    local_ratios: list[float] = field(default_factory=list)
    """Tokens a second of eight local streams beside those of one, by round."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why there is nothing about LiteLLM or the local engine, by name."""


async def measure(rounds: int, seconds: float, report: Callable[[str], None]) -> InferenceFigures:
    """Measures all kinds; the simulator, without delays, is the upstream of all.

    Args:
        rounds: how often every measurement is taken; the kinds take turns within a round.
        seconds: about how long one measurement takes.
        report: told of progress.
    """
    figures = InferenceFigures()
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = await _Bench.started(stack, directory, figures)
        for number in range(rounds + 1):
            report(f"inference: round {number} of {rounds}" if number else "inference: warming up")
            for kind, (call, tasks) in bench.calls.items():
                series = figures.series.setdefault(kind, Series()) if number else Series()
                await run_tasks(call, tasks, seconds if number else seconds / 4, series)
            if number:
                await bench.relay_chunks()
    for number in range(rounds):
        report(f"inference: local engine, round {number + 1} of {rounds}")
        ratio = await measure_local_engine(seconds)
        if isinstance(ratio, str):
            figures.left_out["the local engine"] = ratio
            break
        figures.local_ratios.append(ratio)
    return figures


def flatten(figures: InferenceFigures) -> dict[str, float]:
    """The figures that are promised, by name."""
    series = figures.series

    def per_s(kind: str) -> float:
        return series[kind].median_per_s

    def p50_ms(kind: str) -> float:
        return series[kind].quantile_ms(0.5) or 0.0

    flat = {
        "added_p50_ms": p50_ms("grpc_1") - p50_ms("direct_1"),
        f"cached_coalesced_{CACHED_TASKS}": per_s("cached") / per_s("bare_unary"),
    }
    if "litellm" in series:
        flat["litellm_grpc"] = per_s("grpc") / per_s("litellm")
        flat["litellm_http"] = per_s("http") / per_s("litellm")
    if figures.chunk_cpu_s:
        relayed, direct = figures.chunk_cpu_s["grpc"], figures.chunk_cpu_s["direct"]
        flat["relay_cpu"] = statistics.median(relayed) / statistics.median(direct)
    if figures.local_ratios:
        flat["local_8"] = statistics.median(figures.local_ratios)
    return {name: round(value, 3) for name, value in flat.items()}


def print_inference_figures(
    figures: InferenceFigures, flat: dict[str, float], console: Console
) -> None:
    """Prints the rates, the latencies and the ratios."""
    table = Table(title="inference: medians of the rounds", title_justify="left")
    for column in ("", "requests/s", "p50 ms", "p99 ms"):
        table.add_column(column, justify="left" if not column else "right")
    for kind, title in _TITLES.items():
        series = figures.series.get(kind)
        if series is not None:
            quantiles = [series.quantile_ms(quantile) for quantile in (0.5, 0.99)]
            shown = ["-" if each is None else f"{each:.2f}" for each in quantiles]
            table.add_row(title, f"{series.median_per_s:,.0f}", *shown)
    console.print(table)
    for kind, cpu_s in figures.chunk_cpu_s.items():
        what = "the service's relay" if kind == "grpc" else "a direct client"
        console.print(f"CPU time of a chunk, {what}: {statistics.median(cpu_s) * 1e6:.1f} us")
    for name, value in flat.items():
        console.print(f"{name} = {value:,.3f}")
    for name, reason in figures.left_out.items():
        console.print(f"nothing about {name}: {reason}")


class _Bench:
    """What runs, and the calls that are measured."""

    def __init__(
        self,
        figures: InferenceFigures,
        http: aiohttp.ClientSession,
        upstream: str,
        mesh: Mesh,
        supervisor: Supervisor,
    ) -> None:
        self._figures = figures
        self._http = http
        self._upstream = upstream
        self._mesh = mesh
        self._pid = supervisor.pids["inference"]
        self.calls: dict[str, tuple[Call, int]] = {}
        """By kind, with the number of tasks."""

    @classmethod
    async def started(
        cls, stack: AsyncExitStack, directory: Path, figures: InferenceFigures
    ) -> _Bench:
        """Starts the simulator, the mesh, a bare server and, if it is there, LiteLLM."""
        sim_port, bare_port, litellm_port, *ports = free_ports(3 + len(NAMES))
        await stack.enter_async_context(simulator(sim_port))
        upstream = f"http://127.0.0.1:{sim_port}/v1"
        service_ports = dict(zip(NAMES, ports, strict=True))
        backends = json.dumps([{"name": "simulator", "url": upstream}])
        addresses = [f"--set=mesh.{name}=127.0.0.1:{port}" for name, port in service_ports.items()]
        arguments = {name: [*POLICIES_ON, *addresses] for name in NAMES}
        arguments["inference"].append(f"--set=backends={backends}")
        arguments["metrics"].append("--set=store=sqlite:///:memory:")
        supervisor = await stack.enter_async_context(
            Supervisor(arguments, service_ports, log_file=directory / "mesh.log")
        )
        await stack.enter_async_context(bare_server(bare_port))
        bare = BareClient(CHECK, f"127.0.0.1:{bare_port}")
        stack.push_async_callback(bare.close)
        mesh = await stack.enter_async_context(_connected(supervisor.addresses))
        http = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        )
        bench = cls(figures, http, upstream, mesh, supervisor)
        front = f"http://127.0.0.1:{service_ports['inference'] + _HTTP_OFFSET}/v1"
        fronts = {"direct": (upstream, ""), "http": (front, "")}
        program = find_litellm()
        if program is None:
            figures.left_out["LiteLLM"] = "it is neither on the PATH nor in .cache/litellm/bin"
        else:
            proxy = await stack.enter_async_context(
                litellm_proxy(program, litellm_port, upstream, _MODEL, directory)
            )
            fronts["litellm"] = proxy
        for kind, (url, key) in fronts.items():
            call = bench.http_call(url, key)
            bench.calls[kind] = (call, TASKS)
            bench.calls[f"{kind}_1"] = (call, 1)
        bench.calls["grpc"] = (bench.grpc_call, TASKS)
        bench.calls["grpc_1"] = (bench.grpc_call, 1)
        bench.calls["bare_unary"] = (bare.call, CACHED_TASKS)
        bench.calls["cached"] = (bench.cached_call, CACHED_TASKS)
        if not PROCESSES.is_dir():
            figures.left_out["relaying"] = f"CPU times are read in {PROCESSES}, which is not here"
        return bench

    def http_call(self, url: str, key: str) -> Call:
        """A chat completion over the OpenAI API; each prompt is another."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        extension = {} if key else {"agent360": {"cache": {"no_cache": True, "no_store": True}}}
        ours = url != self._upstream and not key

        async def call(number: int) -> None:
            body = _body(f"Question {number}") | (extension if ours else {})
            async with self._http.post(
                f"{url}/chat/completions", json=body, headers=headers
            ) as response:
                found = await response.json()
                if response.status != 200:
                    raise RuntimeError(f"{url}: {found}")

        return call

    async def grpc_call(self, number: int) -> None:
        """An answer of the model, past the cache."""
        await self._mesh.inference.generate(_uncached(f"Question {number}"))

    async def cached_call(self, number: int) -> None:
        """An answer of the cache, once each of a few questions was answered."""
        await self._mesh.inference.generate(
            GenerateRequest(f"Asked often {number % 100}", _MODEL, _MAX_TOKENS)
        )

    async def relay_chunks(self) -> None:
        """Adds a round of what a chunk of a stream costs in CPU time, direct and relayed."""
        if not PROCESSES.is_dir():
            return
        own_before = time.process_time()
        chunks = sum(await asyncio.gather(*(self._direct_stream(n) for n in range(_STREAMS))))
        own_s = time.process_time() - own_before
        self._figures.chunk_cpu_s.setdefault("direct", []).append(own_s / chunks)
        # The service's time goes by hundredths of a second: several times as many streams.
        before = cpu_seconds(self._pid)
        chunks = 0
        for first in range(0, 5 * _STREAMS, _STREAMS):
            streams = (self._relayed_stream(first + n) for n in range(_STREAMS))
            chunks += sum(await asyncio.gather(*streams))
        used_s = cpu_seconds(self._pid) - before
        self._figures.chunk_cpu_s.setdefault("grpc", []).append(used_s / chunks)

    async def _direct_stream(self, number: int) -> int:
        """Reads a stream as a client of the OpenAI API does; returns the tokens."""
        body = _body(f"[[sim:tokens={_CHUNKS}]] {number}", _CHUNKS) | {
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        tokens = 0
        async with self._http.post(f"{self._upstream}/chat/completions", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if event.get("choices"):
                        tokens += bool(event["choices"][0]["delta"].get("content"))
        return tokens

    async def _relayed_stream(self, number: int) -> int:
        stream = self._mesh.inference.stream(
            _uncached(f"[[sim:tokens={_CHUNKS}]] {number}", _CHUNKS)
        )
        async for _ in stream:
            pass
        return stream.answer.usage.output_tokens


def _connected(addresses: Mapping[str, str]) -> Mesh:
    return Mesh.connect(
        inference=addresses["inference"],
        cache=addresses["cache"],
        ratelimit=addresses["ratelimit"],
        metrics=addresses["metrics"],
        tenant=_TENANT,
        api_key="",
    )


def _body(prompt: str, max_tokens: int = _MAX_TOKENS) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": _MODEL, "messages": messages, "max_tokens": max_tokens}


def _uncached(prompt: str, max_tokens: int = _MAX_TOKENS) -> GenerateRequest:
    return GenerateRequest(prompt, _MODEL, max_tokens, no_cache=True, no_store=True)
