"""The synchronous clients: what scripts and notebooks do, without an event loop."""

import asyncio
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest

from agent360.client import (
    AuditEvent,
    CheckRequest,
    Entry,
    InvalidRequestError,
    Lookup,
    SyncMesh,
    call_scope,
)
from agent360.client.portal import Portal
from agent360.mesh import embedded_sync
from agent360.mesh.simulator import Simulator, SimulatorSettings


@pytest.fixture(scope="module")
def simulator() -> Iterator[str]:
    """The address of a simulator."""
    with Portal() as portal:
        settings = SimulatorSettings(port=0, first_token_s=0.0, inter_token_s=0.0)
        simulator = portal.call(Simulator, settings)
        portal.run(simulator.start())
        yield simulator.url
        portal.run(simulator.close())


@pytest.fixture(scope="module")
def mesh(simulator: str) -> Iterator[SyncMesh]:
    """The four services and a client of them."""
    settings = {"inference": {"backends": [{"url": simulator}]}}
    with embedded_sync(tenant="acme", settings=settings) as mesh:
        yield mesh


def test_entries_are_written_read_claimed_and_invalidated(mesh: SyncMesh) -> None:
    assert mesh.cache.set("greeting", b"hello", tags=["x"]).stored
    assert mesh.cache.get("greeting").value == b"hello"
    claim = mesh.cache.claim("plan")
    assert mesh.cache.fill(claim.fill_token, "plan", b"1").stored
    assert mesh.cache.claim("plan").lookup.value == b"1"
    assert mesh.cache.invalidate(tags=["x"]).removed == 1
    assert not mesh.cache.get("greeting").hit
    assert [each.namespace for each in mesh.cache.stats()] == ["default"]


def test_limits_are_checked_reserved_and_settled(mesh: SyncMesh) -> None:
    assert mesh.ratelimit.check("search").allowed
    decisions = mesh.ratelimit.check_many(CheckRequest("search") for _ in range(2_500)).all()
    assert len(decisions) == 2_500
    reservation = mesh.ratelimit.reserve("tokens", 100)
    assert mesh.ratelimit.settle(reservation.reservation_id, 40).adjustment == -60
    assert list(mesh.ratelimit.list_limits()) == []


def test_an_answer_comes_whole_or_in_pieces(mesh: SyncMesh) -> None:
    whole = mesh.inference.generate("Name a river", model="sim-small")
    assert whole.text
    stream = mesh.inference.stream("Name another river", model="sim-small")
    assert "".join(delta.text for delta in stream) == stream.answer.text
    assert [model.name for model in mesh.inference.list_models()] == [
        "sim-embed",
        "sim-large",
        "sim-small",
    ]
    answers = mesh.inference.generate_many([f"Name river {n}" for n in range(20)]).all()
    assert len(answers) == 20


def test_measurements_and_events_can_be_read_back(mesh: SyncMesh) -> None:
    mesh.metrics.count("plans", 3)
    mesh.metrics.flush()
    assert [each.name for each in mesh.metrics.list_series("plans")] == ["plans"]
    event = mesh.audit.record(AuditEvent("plans.approve", "plans/1", actor="ana"))
    assert event in [each.event_id for each in mesh.audit.list_events(actor="ana")]


def test_results_of_many_calls_come_with_their_indexes_or_all_in_order(mesh: SyncMesh) -> None:
    entries = [Entry(f"k{n}", str(n).encode()) for n in range(3_000)]
    assert all(mesh.cache.set_many(entries).all())
    keys = [entry.key for entry in entries]
    seen = {}
    for index, lookup in mesh.cache.get_many(keys):
        assert index not in seen
        assert isinstance(lookup, Lookup)
        seen[index] = lookup.value
    assert seen == {index: entry.value for index, entry in enumerate(entries)}


def test_leaving_an_iteration_early_leaves_nothing_behind(mesh: SyncMesh) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield f"k{taken}"

    results = iter(mesh.cache.get_many(endless()))
    for _ in range(10):
        next(results)
    results.close()  # type: ignore[attr-defined]
    assert taken < 20_000
    assert mesh._mesh._coalescers[0]._in_flight == 0
    assert not mesh.cache.get("none").hit


def test_an_error_is_raised_where_the_call_was_made(mesh: SyncMesh) -> None:
    with pytest.raises(InvalidRequestError, match="key"):
        mesh.cache.get("")
    with pytest.raises(ValueError, match="nowhere"):
        SyncMesh.connect(cache="nowhere")


def test_calls_inherit_the_scope_of_the_thread_that_makes_them(mesh: SyncMesh) -> None:
    with call_scope(tenant="globex"):
        mesh.cache.set("mine", b"of globex")
        assert mesh.cache.get("mine").hit
        assert [lookup.hit for _, lookup in mesh.cache.get_many(["mine"])] == [True]
    assert not mesh.cache.get("mine").hit


def test_threads_share_a_mesh_each_with_its_own_tenant(mesh: SyncMesh) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        with call_scope(tenant=f"tenant{number}"):
            for round_ in range(50):
                mesh.cache.set("k", f"{number} {round_}".encode())
                found = mesh.cache.get("k").value
                if found != f"{number} {round_}".encode():
                    wrong.append(found)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_interrupting_a_call_withdraws_it(mesh: SyncMesh) -> None:
    mesh.cache.claim("taken", fill_timeout=60)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            mesh.cache.claim("taken", timeout=30)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not mesh.cache.get("none").hit
    assert mesh._mesh._coalescers[0]._in_flight == 0


def test_a_call_that_would_wait_for_itself_is_refused(mesh: SyncMesh) -> None:
    keys = (mesh.cache.get("k").content_type for _ in range(1))
    with pytest.raises(RuntimeError, match="own thread"):
        mesh.cache.get_many(keys).all()


def test_a_closed_mesh_says_so_and_closing_twice_is_harmless() -> None:
    mesh = SyncMesh.connect(cache="127.0.0.1:1", tenant="acme", api_key="")
    mesh.close()
    mesh.close()
    with pytest.raises(RuntimeError, match="closed"):
        mesh.cache.get("k")


def test_the_portal_works_beside_a_loop_of_the_callers_own() -> None:
    async def main() -> int:
        with Portal() as portal:
            return await asyncio.to_thread(portal.run, asyncio.sleep(0, 7))

    assert asyncio.run(main()) == 7


def test_a_program_that_forgets_to_close_ends_all_the_same() -> None:
    program = """
        from agent360.client import SyncMesh
        mesh = SyncMesh.connect(cache="127.0.0.1:1", tenant="acme", api_key="", patience=0.1)
        try:
            mesh.cache.get("k", timeout=0.5)
        except Exception as error:
            print(error.reason)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "UNREACHABLE\n", "")
