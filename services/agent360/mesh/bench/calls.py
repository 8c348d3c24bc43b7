"""``bench calls``: bare unary, our unary, coalesced and many calls, side by side in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from agent360.client import CheckRequest, Entry, Mesh
from agent360.client.channel import open_channel
from agent360.mesh.bench.bare import (
    CHECK,
    GET,
    KEYS,
    NAME,
    NAMESPACE,
    USER,
    VALUE,
    BareClient,
    Subject,
    key_of,
)
from agent360.mesh.bench.processes import POLICIES_ON, bare_server
from agent360.mesh.bench.timing import MESSAGE_ITEMS, Series, run_many, run_tasks
from agent360.mesh.cli.supervisor import Supervisor
from agent360.mesh.free_ports import free_ports

TASKS: Final = (1, 64, 256, 1024)
TENANT: Final = "bench"

_LIMITS: Final = f"""
[[limits]]
id = "{NAME}"
name = "{NAME}"
per = ["tenant", "user"]
algorithm = "token_bucket"
amount = 1000000000
period = "1s"
"""


Results = dict[tuple[str, int], Series]
"""By kind of call (bare_unary, unary, coalesced, bare_many, many) and number of tasks."""


async def measure(rounds: int, seconds: float, report: Callable[[str], None]) -> dict[str, Results]:
    """Measures both subjects.

    Args:
        rounds: how often every measurement is taken; the kinds take turns within a round.
        seconds: about how long one measurement takes.
        report: told of progress.
    """
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        limits = directory / "limits.toml"
        limits.write_text(_LIMITS)
        bare_port, *ports = free_ports(4)
        await stack.enter_async_context(bare_server(bare_port))
        mesh_processes = await stack.enter_async_context(
            Supervisor(
                {
                    "ratelimit": [f"--set=limits={limits}", *POLICIES_ON],
                    "cache": POLICIES_ON,
                },
                dict(zip(("ratelimit", "cache"), ports, strict=False)),
                log_file=directory / "log",
            )
        )
        mesh = await stack.enter_async_context(
            Mesh.connect(
                ratelimit=mesh_processes.addresses["ratelimit"],
                cache=mesh_processes.addresses["cache"],
                tenant=TENANT,
            )
        )
        entries = [Entry(key_of(number), VALUE, ttl=3600.0) for number in range(KEYS)]
        await mesh.cache.set_many(entries, namespace=NAMESPACE)
        found = {}
        for subject, ours in ((CHECK, Check(mesh)), (GET, Get(mesh))):
            address = mesh_processes.addresses[subject.key.split("_")[0]]
            bare = BareClient(subject, f"127.0.0.1:{bare_port}")
            unary = UnaryClient(subject, address)
            try:
                found[subject.key] = await _measure_subject(
                    subject, bare, unary, ours, rounds, seconds, report
                )
            finally:
                await bare.close()
                await unary.close()
        return found


class Check:
    """Our checks, as a user writes them."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    async def call(self, _: int) -> None:
        """One awaited check."""
        await self._mesh.ratelimit.check(NAME, descriptor={"user": USER})

    async def many(self, count: int) -> None:
        """``count`` checks at once."""
        requests = (CheckRequest(NAME, 1, {"user": USER}) for _ in range(count))
        await self._mesh.ratelimit.check_many(requests)


class Get:
    """Our gets, as a user writes them."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    async def call(self, number: int) -> None:
        """One awaited get."""
        await self._mesh.cache.get(key_of(number), namespace=NAMESPACE)

    async def many(self, count: int) -> None:
        """``count`` gets at once."""
        keys = (key_of(number) for number in range(count))
        await self._mesh.cache.get_many(keys, namespace=NAMESPACE)


class UnaryClient:
    """Calls our service as a stranger with generated stubs does: one unary RPC a call."""

    def __init__(self, subject: Subject, address: str) -> None:
        self._subject = subject
        self._channel = open_channel(address)
        self._request_class = getattr(subject.modules, f"{subject.method}Request")
        self._rpc = self._channel.unary_unary(
            f"/{subject.service}/{subject.method}",
            request_serializer=self._request_class.SerializeToString,
            response_deserializer=getattr(subject.modules, f"{subject.method}Response").FromString,
        )

    async def call(self, number: int) -> None:
        """One unary call."""
        request = self._request_class()
        self._subject.fill_request(request, number)
        response = await self._rpc(request, metadata=(("x-agent360-tenant", TENANT),))
        self._subject.read_response(response)

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()


async def _measure_subject(
    subject: Subject,
    bare: BareClient,
    unary: UnaryClient,
    ours: Check | Get,
    rounds: int,
    seconds: float,
    report: Callable[[str], None],
) -> Results:
    results: Results = {}
    for number in range(rounds + 1):
        report(f"{subject.title}: " + (f"round {number} of {rounds}" if number else "warming up"))
        current = results if number else {}
        length = seconds if number else seconds / 4
        for tasks in TASKS:
            for kind, call in (
                ("bare_unary", bare.call),
                ("unary", unary.call),
                ("coalesced", ours.call),
            ):
                series = current.setdefault((kind, tasks), Series())
                await run_tasks(call, tasks, length, series)
        for kind, many in (
            ("bare_many", lambda count: bare.many(count, MESSAGE_ITEMS)),
            ("many", ours.many),
        ):
            await run_many(many, length, current.setdefault((kind, MESSAGE_ITEMS), Series()))
    return results


def flatten(found: dict[str, Results]) -> dict[str, float]:
    """The ratios by name: ours over bare, of the medians."""
    flat = {}
    for key, results in found.items():
        most = max(TASKS)

        def ratio(kind: str, bare: str, tasks: int, results: Results = results) -> float:
            return results[kind, tasks].median_per_s / results[bare, tasks].median_per_s

        flat[f"{key}_unary"] = ratio("unary", "bare_unary", min(most, 64))
        for tasks in TASKS:
            flat[f"{key}_coalesced_{tasks}"] = ratio("coalesced", "bare_unary", tasks)
        flat[f"{key}_many_{MESSAGE_ITEMS}"] = ratio("many", "bare_many", MESSAGE_ITEMS)
    return {name: round(value, 3) for name, value in flat.items()}
