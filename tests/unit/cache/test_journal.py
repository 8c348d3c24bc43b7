"""A watch misses nothing, or says that it may have."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from support.cache_domain import Cache, FakeClock, at_once

from agent360.client.errors import InvalidRequestError, MeshError
from agent360.mesh.cache.journal import KEYS_AT_ONCE, Change, Event, Journal, Journals


def written(*keys: str, namespace: str = "plans", version: int = 1) -> Change:
    return Change(namespace, "keys", keys, version)


def watch(journal: Journal, token: str = "", *namespaces: str) -> AsyncIterator[Event]:
    return journal.watch(token, namespaces, FakeClock(), 15.0)


async def test_the_first_event_says_from_where_on_nothing_is_missed() -> None:
    journal = Journal(100, "epoch")
    journal.add(written("before"))
    events = watch(journal)
    first = await anext(events)
    assert (first.change, first.reset) == (None, "")
    journal.add(written("after"))
    assert (await anext(events)).change == written("after")


async def test_a_watch_goes_on_where_its_token_says() -> None:
    journal = Journal(100, "epoch")
    first = await anext(watch(journal))
    journal.add(written("a"))
    journal.add(Change("plans", "prefix", ("b/",), 2))
    events = watch(journal, first.token)
    assert (await anext(events)).reset == ""
    seen = await anext(events)
    assert seen.change == written("a")
    again = watch(journal, seen.token)
    await anext(again)
    assert (await anext(again)).change == Change("plans", "prefix", ("b/",), 2)


async def test_a_watch_that_was_away_too_long_is_reset() -> None:
    journal = Journal(3, "epoch")
    first = await anext(watch(journal))
    for number in range(5):
        journal.add(written(f"k{number}"))
    events = watch(journal, first.token)
    assert (await anext(events)).reset == ""
    assert (await anext(events)).reset == "too far behind"
    journal.add(written("next"))
    assert (await anext(events)).change == written("next")


@pytest.mark.parametrize("token", ["former.1", "epoch.9"])
async def test_a_token_of_another_run_resets_the_watch(token: str) -> None:
    journal = Journal(3, "epoch")
    assert "not of this replica" in (await anext(watch(journal, token))).reset


@pytest.mark.parametrize("token", ["x", ".1", "epoch.", "epoch.-1", "epoch.x", "e" * 70 + ".1"])
async def test_a_malformed_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequestError, match="resume_token"):
        await anext(watch(Journal(3, "epoch"), token))


async def test_writes_that_follow_each_other_come_together_with_the_newest_version() -> None:
    journal = Journal(10_000, "epoch")
    events = watch(journal)
    await anext(events)
    for version in range(1, 11):
        journal.add(written(f"k{version % 5}", version=version))
    change = (await anext(events)).change
    assert change.version == 10
    assert sorted(change.names) == [f"k{number}" for number in range(5)]


async def test_an_event_names_a_bounded_number_of_keys() -> None:
    journal = Journal(10_000, "epoch")
    events = watch(journal)
    await anext(events)
    for number in range(KEYS_AT_ONCE + 10):
        journal.add(written(f"k{number}", version=number))
    sizes = [len((await anext(events)).change.names) for _ in range(2)]
    assert sizes == [KEYS_AT_ONCE, 10]


async def test_an_invalidation_is_never_reordered_with_writes() -> None:
    journal = Journal(100, "epoch")
    events = watch(journal)
    await anext(events)
    changes = [written("a"), Change("plans", "all", (), 2), written("a", version=3)]
    for change in changes:
        journal.add(change)
    assert [(await anext(events)).change for _ in range(3)] == changes


async def test_a_watch_of_some_namespaces_hears_of_no_other() -> None:
    journal = Journal(100, "epoch")
    events = watch(journal, "", "plans")
    await anext(events)
    journal.add(written("a", namespace="answers"))
    journal.add(written("b"))
    journal.add(written("c", namespace="answers"))
    journal.add(written("d"))
    assert (await anext(events)).change.names == ("b", "d")


async def test_a_watch_gives_a_sign_of_life_while_nothing_happens() -> None:
    journal, clock = Journal(100, "epoch"), FakeClock()
    events = journal.watch("", (), clock, 15.0)
    await anext(events)
    sign = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    clock.advance(14.9)
    await asyncio.sleep(0)
    assert not sign.done()
    clock.advance(0.1)
    assert (await sign).change is None


async def test_who_waits_for_a_change_hears_of_it_at_once() -> None:
    journal = Journal(100, "epoch")
    watches = [watch(journal) for _ in range(3)]
    for events in watches:
        await anext(events)
    waiting = [asyncio.ensure_future(anext(events)) for events in watches]
    await asyncio.sleep(0)
    journal.add(written("k"))
    heard = await asyncio.wait_for(asyncio.gather(*waiting), 5.0)
    assert [event.change for event in heard] == [written("k")] * 3


def test_a_change_that_names_many_keys_takes_the_room_of_many() -> None:
    journal = Journal(10, "epoch")
    journal.add(written("a"))
    journal.add(written(*(f"k{number}" for number in range(10))))
    assert journal._last - len(journal._ring) == 1


async def test_so_many_may_watch_a_tenants_changes_and_leaving_makes_room() -> None:
    journals = Journals(10, lambda: "epoch", max_watches=1)
    events = watch(journals.to_watch("acme"))
    await anext(events)
    with pytest.raises(MeshError) as caught:
        journals.to_watch("acme")
    assert caught.value.reason == "WATCHES_EXHAUSTED"
    journals.to_watch("globex")
    await events.aclose()
    journals.to_watch("acme")


async def test_a_tenant_hears_of_its_own_changes_alone() -> None:
    cache = Cache()
    acme, globex = (watch(cache.service.watch(tenant)) for tenant in ("acme", "globex"))
    for events in (acme, globex):
        await anext(events)
    cache.put("of-acme")
    cache.put("of-globex", space=cache.space("globex"))
    assert (await anext(acme)).change.names == ("of-acme",)
    assert (await anext(globex)).change.names == ("of-globex",)


async def test_a_copy_of_what_was_just_written_is_not_outdated_by_its_own_change() -> None:
    cache = Cache()
    events = watch(cache.service.watch("acme"))
    await anext(events)
    stored = cache.put("k")
    assert (await anext(events)).change.version < stored.version
    at_once(cache.service.invalidate_prefix(cache.plans, "k"))
    assert (await anext(events)).change.version > stored.version


async def test_writes_that_are_told_together_keep_their_own_versions() -> None:
    journal = Journal(100, "epoch")
    events = watch(journal)
    await anext(events)
    for key, version in (("a", 1), ("b", 5), ("a", 7)):
        journal.add(written(key, version=version))
    change = (await anext(events)).change
    assert change is not None
    assert (change.names, change.versions, change.version) == (("a", "b"), (7, 5), 7)
