"""One call of a model, many callers: each is charged once, and together no more than agreed."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent360.client.errors import RateLimitedError
from agent360.mesh.inference.answers import Usage
from agent360.mesh.inference.billing import Bill, Spent
from agent360.mesh.inference.metering.sharing import SharedBill
from agent360.mesh.inference.metering.till import Charge, Till, most_of, used_of
from agent360.mesh.inference.ports import Amount, Payer, Reservation
from agent360.mesh.inference.settings import ModelSettings

PAYER = Payer("acme", "small")
PRICED = ModelSettings(name="small", input_usd_per_million=0.15, output_usd_per_million=0.6)
DEARER = ModelSettings(name="large", input_usd_per_million=3.0, output_usd_per_million=15.0)


class Books:
    """Reserves and settles, and writes it down; slowly, if told to."""

    def __init__(self) -> None:
        self.reserved: list[Amount] = []
        self.settled: list[Amount] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.deny = False

    def free(self, payer: Payer, most: Amount) -> bool:
        return False

    async def reserve(self, payer: Payer, most: Amount) -> Reservation:
        await self.hold.wait()
        if self.deny:
            raise RateLimitedError("no more")
        self.reserved.append(most)
        return Reservation(f"r{len(self.reserved)}")

    async def settle(self, payer: Payer, reservation: Reservation, used: Amount) -> None:
        self.settled.append(used)


@pytest.fixture
async def books():
    return Books()


@pytest.fixture
async def till(books):
    made = Till(books)
    yield made
    await made.close(1)


async def party(till: Till, billing: str, joiners: int) -> tuple[SharedBill, list[Charge]]:
    bill = SharedBill(billing)
    bill.leader = await till.open(PAYER, Amount(100, 100))
    joined = []
    for _ in range(joiners if bill.joiners_pay else 0):
        joined.append(await till.open(PAYER, Amount(100, 100)))
        bill.join(joined[-1])
    return bill, joined


async def test_a_charge_is_settled_once_whoever_settles_it_again(till, books):
    charge = await till.open(PAYER, Amount(100))
    charge.settle(Amount(40))
    charge.settle(Amount(70))
    await till.close(1)
    assert books.settled == [Amount(40)]


async def test_a_caller_who_leaves_while_tokens_are_set_aside_leaves_nothing_behind(till, books):
    books.hold.clear()
    opening = asyncio.create_task(till.open(PAYER, Amount(100)))
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait((opening,))
    assert books.settled == []
    books.hold.set()
    await till.close(1)
    assert (books.reserved, books.settled) == ([Amount(100)], [Amount()])


async def test_what_was_denied_is_not_settled(till, books):
    books.deny = True
    with pytest.raises(RateLimitedError):
        await till.open(PAYER, Amount(100))
    await till.close(1)
    assert books.settled == []


async def test_where_the_leader_pays_it_pays_all(till, books):
    bill, _ = await party(till, "leader", 3)
    bill.settle(Amount(90, 9))
    await till.close(1)
    assert books.settled == [Amount(90, 9)]
    assert bill.leader.part == 1.0


async def test_where_each_pays_everyone_pays_all(till, books):
    bill, joined = await party(till, "each", 3)
    bill.settle(Amount(90, 9))
    await till.close(1)
    assert books.settled == [Amount(90, 9)] * 4
    assert [each.part for each in joined] == [1.0] * 3


async def test_who_left_early_pays_for_what_was_produced_or_for_no_part(till, books):
    each, (leaver,) = await party(till, "each", 1)
    each.leave(leaver, Amount(30, 3))
    split, (other,) = await party(till, "split", 1)
    split.leave(other, Amount(30, 3))
    split.settle(Amount(50))
    assert leaver.settled == Amount(30, 3)
    assert other.settled == Amount()
    assert split.leader.settled == Amount(50)


async def test_who_comes_after_the_end_pays_as_if_alone_or_not_at_all(till):
    for billing, expected in (("each", Amount(90)), ("split", Amount())):
        bill, _ = await party(till, billing, 1)
        bill.settle(Amount(90))
        late = await till.open(PAYER, Amount(100))
        bill.join(late)
        assert late.settled == expected


async def test_what_waits_for_the_charges_is_told_once_they_are_made(till):
    bill, _ = await party(till, "leader", 0)
    told = []
    bill.when_settled(lambda: told.append(bill.leader.settled))
    assert told == []
    bill.settle(Amount(90))
    bill.when_settled(lambda: told.append("late"))
    assert told == [Amount(90), "late"]


@given(tokens=st.integers(0, 10_000), micro_usd=st.integers(0, 10_000), joiners=st.integers(0, 30))
def test_parts_add_up_to_the_whole(tokens, micro_usd, joiners):
    async def add_up() -> None:
        till = Till(Books())
        bill, joined = await party(till, "split", joiners)
        bill.settle(Amount(tokens, micro_usd))
        settled = [each.settled for each in (bill.leader, *joined)]
        assert sum(each.tokens for each in settled) == tokens
        assert sum(each.micro_usd for each in settled) == micro_usd
        most, least = max(settled), min(settled)
        assert most.tokens - least.tokens <= joiners
        await till.close(1)

    asyncio.run(add_up())


def test_the_most_is_that_of_the_dearest_model_rounded_up():
    assert most_of([PRICED], 10, 0) == Amount(10, 2)  # 1.5 millionths
    assert most_of([PRICED], 0, 0) == Amount()
    assert most_of([PRICED, DEARER], 1_000, 100) == Amount(1_100, 4_500)


def test_wasted_tries_cost_the_caller_nothing():
    bill = Bill()
    bill.spent.append(Spent(DEARER, "b1", Usage(1_000, 100), wasted=True))
    bill.spent.append(Spent(PRICED, "b2", Usage(1_000, 100)))
    assert used_of(bill) == Amount(1_100, 210)
