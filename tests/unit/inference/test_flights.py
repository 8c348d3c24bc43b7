"""Many callers, one call: who joins late hears all, who leaves disturbs nobody."""

import asyncio

import pytest

from agent360.client.errors import MeshError, UnavailableError
from agent360.mesh.inference.answers import Answer, Source, ToolCallPiece, Usage
from agent360.mesh.inference.flights import Flights
from agent360.mesh.inference.metering.sharing import SharedBill
from agent360.mesh.inference.ports import Amount, Payer

SOMEBODY = Payer("acme", "m")
ANSWER = Answer("abc", (), "stop", Usage(1, 1), "m", "b")


class Stage:
    """A model that says what it is told to, when it is told to."""

    def __init__(self) -> None:
        self.lines: asyncio.Queue[list[str] | Exception | None] = asyncio.Queue()
        self.runs = 0
        self.stopped = asyncio.Event()

    async def work(self, flight) -> None:
        self.runs += 1
        flight.admit()
        try:
            while (line := await self.lines.get()) is not None:
                if isinstance(line, Exception):
                    raise line
                flight.push(line)
            flight.land(ANSWER)
        except asyncio.CancelledError:
            self.stopped.set()
            raise


async def hear(follower) -> str:
    said = []
    while await follower.more():
        said.append(follower.take().content)
    return "".join(said)


@pytest.fixture
async def flights():
    made = Flights()
    yield made
    await made.close()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_follower_that_joins_late_hears_everything_from_the_start(flights):
    stage = Stage()
    flight = flights.launch("key", SOMEBODY, SharedBill("leader"), stage.work)
    with flights.follow(flight, leads=True) as leader:
        stage.lines.put_nowait(["a"])
        assert await leader.more()
        assert leader.take().content == "a"
        with flights.follow(flights.find("key"), leads=False) as late:
            for line in (["b"], ["c"], None):
                stage.lines.put_nowait(line)
            assert await asyncio.gather(hear(leader), hear(late)) == ["bc", "abc"]
            assert (leader.source, late.source) == (Source.MODEL, Source.COALESCED)
    assert stage.runs == 1


async def test_what_came_while_a_follower_was_busy_is_taken_at_once(flights):
    stage = Stage()
    with flights.follow(
        flights.launch("key", SOMEBODY, SharedBill("leader"), stage.work), leads=True
    ) as slow:
        for line in (["a", "b"], ["c"], ["d"]):
            stage.lines.put_nowait(line)
        await settle()
        assert slow.pending_bytes == 4
        assert await slow.more()
        assert slow.take().content == "abcd"
        assert slow.pending_bytes == 0


async def test_pieces_of_tool_calls_are_put_together_by_call(flights):
    async def work(flight) -> None:
        flight.push([ToolCallPiece(0, "id0", "book", ""), ToolCallPiece(1, "id1", "pay", "{")])
        flight.push([ToolCallPiece(0, "", "", '{"a"'), ToolCallPiece(0, "", "", ": 1}")])
        flight.push([ToolCallPiece(1, "", "", "}")])
        flight.land(ANSWER)

    with flights.follow(
        flights.launch("key", SOMEBODY, SharedBill("leader"), work), leads=True
    ) as follower:
        await follower.answer()
        assert follower.take().tool_calls == (
            ToolCallPiece(0, "id0", "book", '{"a": 1}'),
            ToolCallPiece(1, "id1", "pay", "{}"),
        )


async def test_followers_survive_the_leaders_leaving(flights):
    stage = Stage()
    flight = flights.launch("key", SOMEBODY, SharedBill("leader"), stage.work)
    with flights.follow(flight, leads=False) as follower:
        with flights.follow(flight, leads=True):
            await settle()
        stage.lines.put_nowait(["abc"])
        stage.lines.put_nowait(None)
        assert await hear(follower) == "abc"
        assert not stage.stopped.is_set()


async def test_the_call_is_cancelled_and_not_joined_when_the_last_one_leaves(flights):
    stage = Stage()
    flight = flights.launch("key", SOMEBODY, SharedBill("leader"), stage.work)
    with flights.follow(flight, leads=True), flights.follow(flight, leads=False):
        await settle()
    assert flights.find("key") is None
    async with asyncio.timeout(1):
        await stage.stopped.wait()


async def test_a_call_that_is_left_before_it_begins_is_settled_all_the_same(flights):
    stage = Stage()
    flight = flights.launch("key", SOMEBODY, SharedBill("leader"), stage.work)
    with flights.follow(flight, leads=True):
        pass
    assert flight.bill.total == Amount()
    await settle()
    assert stage.runs == 0


async def test_who_flies_alone_does_the_work_itself_and_is_joined_by_nobody(flights):
    stage = Stage()
    flight = flights.alone(SOMEBODY, SharedBill("leader"), stage.work)
    with flights.follow(flight, leads=True) as follower:
        asking = asyncio.create_task(follower.answer())
        await settle()
        assert len(flights) == 0
        assert flights.find(flight.key) is None
        stage.lines.put_nowait(["abc"])
        stage.lines.put_nowait(None)
        assert await asking is ANSWER
    assert stage.runs == 1


async def test_who_flies_alone_hears_of_failures_and_stops_the_work_by_leaving(flights):
    stage = Stage()
    stage.lines.put_nowait(MeshError(None, "BROKEN", "it broke"))
    flight = flights.alone(SOMEBODY, SharedBill("leader"), stage.work)
    with flights.follow(flight, leads=True) as follower, pytest.raises(MeshError):
        await follower.answer()
    flight = flights.alone(SOMEBODY, SharedBill("leader"), stage.work)
    with flights.follow(flight, leads=True) as follower:
        asking = asyncio.create_task(follower.answer())
        await settle()
        asking.cancel()
        await asyncio.wait((asking,))
        assert stage.stopped.is_set()
    unused = flights.alone(SOMEBODY, SharedBill("leader"), stage.work)
    with flights.follow(unused, leads=True):
        pass
    assert unused.bill.total == Amount()
    assert stage.runs == 2


async def test_a_failure_reaches_all_followers_after_what_was_said_before_it(flights):
    stage = Stage()
    flight = flights.launch("key", SOMEBODY, SharedBill("leader"), stage.work)
    with (
        flights.follow(flight, leads=True) as one,
        flights.follow(flight, leads=False) as other,
    ):
        stage.lines.put_nowait(["a"])
        stage.lines.put_nowait(UnavailableError("broke", reason="UPSTREAM_BROKE"))
        for follower in (one, other):
            assert await follower.more()
            assert follower.take().content == "a"
            with pytest.raises(UnavailableError, match="broke"):
                await follower.more()
    assert flights.find("key") is None


async def test_a_landed_flight_can_be_joined_until_its_work_is_done(flights):
    kept = asyncio.Event()

    async def work(flight) -> None:
        flight.push(["abc"])
        flight.land(ANSWER)
        await kept.wait()

    with flights.follow(
        flights.launch("key", SOMEBODY, SharedBill("leader"), work), leads=True
    ) as leader:
        assert await leader.answer() is ANSWER
    with flights.follow(flights.find("key"), leads=False) as late:
        assert await hear(late) == "abc"
        assert await late.answer() is ANSWER
    kept.set()
    await settle()
    assert flights.find("key") is None


async def test_closing_ends_all_flights_with_an_error_for_those_who_wait(flights):
    stage = Stage()
    with flights.follow(
        flights.launch("key", SOMEBODY, SharedBill("leader"), stage.work), leads=True
    ) as follower:
        await settle()
        await flights.close()
        with pytest.raises(MeshError, match="stopping"):
            await follower.answer()


async def test_who_comes_when_the_answer_is_there_takes_it_as_from_the_cache(flights):
    stored = asyncio.Event()

    async def work(flight) -> None:
        flight.push(["abc"])
        flight.land(ANSWER)
        await stored.wait()

    flight = flights.launch("key", SOMEBODY, SharedBill("leader"), work)
    with flights.follow(flight, leads=True) as leader:
        assert await leader.answer() is ANSWER
        with flights.follow(flights.find("key"), leads=False) as late:
            assert await hear(late) == "abc"
            assert (leader.source, late.source) == (Source.MODEL, Source.CACHE)
    stored.set()
