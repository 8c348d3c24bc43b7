"""The window is as large as what is missed says it should be."""

import random

from support.cache_domain import Cache

from agent360.mesh.cache.admission import Bounds
from agent360.mesh.cache.window import LEAST_SHARE, MOST_SHARE, WindowShare


def test_a_refused_key_that_comes_again_widens_the_window_and_an_evicted_one_narrows_it() -> None:
    share = WindowShare()
    assert share.value == LEAST_SHARE
    share.note_refused(1)
    share.note_evicted(2)
    assert share.note_arrival(1)
    widened = share.value
    assert widened > LEAST_SHARE
    assert share.note_arrival(2)
    assert share.value < widened


def test_a_key_counts_once_and_a_stranger_never() -> None:
    share = WindowShare()
    share.note_refused(1)
    assert share.note_arrival(1)
    assert not share.note_arrival(1)
    assert not share.note_arrival(2)


def test_only_the_keys_that_went_last_are_remembered() -> None:
    share = WindowShare()
    share.fit(1_600)
    for key_hash in range(101):
        share.note_refused(key_hash)
    assert not share.note_arrival(0)
    assert share.note_arrival(1)


def test_the_share_stays_within_its_bounds() -> None:
    share = WindowShare()
    for _ in range(1_000):
        share.note_refused(1)
        share.note_arrival(1)
    assert share.value == MOST_SHARE
    for _ in range(1_000):
        share.note_evicted(1)
        share.note_arrival(1)
    assert share.value == LEAST_SHARE


def test_what_is_used_soon_again_and_then_never_is_found_once_the_window_has_grown() -> None:
    cache = Cache(Bounds(entries=100, size_bytes=10_000 * 1_024))
    chance = random.Random(7)
    hits = 0
    for number in range(20_000):
        # One of the last 60 keys; every key is asked for twice on average.
        key = f"k{max(0, number // 2 - chance.randrange(60))}"
        if cache.find(key) is None:
            cache.put(key)
        else:
            hits += number >= 10_000
    assert hits >= 4_500
