"""The estimate of a server's clock is never behind it, and not far ahead."""

from hypothesis import given
from hypothesis import strategies as st

from agent360.mesh.runtime.redis.clock import ServerClock


def reply(server_us: int) -> tuple[bytes, bytes]:
    return str(server_us // 1_000_000).encode(), str(server_us % 1_000_000).encode()


@given(st.lists(st.tuples(st.floats(0.001, 5.0), st.floats(0.0, 2.0)), min_size=1, max_size=30))
def test_it_is_never_behind_and_as_near_as_the_quickest_answer(
    asked: list[tuple[float, float]],
) -> None:
    clock, now, offset_us = ServerClock(), 1_000.0, 1_700_000_000_000_000
    for pause_s, way_s in asked:
        now += pause_s
        clock.note(now, reply(offset_us + int((now + way_s) * 1e6)))
        now += way_s
        true_us = offset_us + int(now * 1e6)
        assert clock.now_us(now) >= true_us
    if min(way_s for _, way_s in asked[-8:]) == 0.0 and len({w for _, w in asked}) == 1:
        assert clock.now_us(now) - true_us < 100_000


def test_one_slow_answer_does_not_move_it() -> None:
    clock = ServerClock()
    clock.note(1.0, reply(5_000_000))
    clock.note(2.0, reply(6_030_000))
    assert clock.now_us(2.0) - 6_000_000 < 1_000


def test_a_clock_that_was_set_forward_is_followed_at_once() -> None:
    clock = ServerClock()
    clock.note(1.0, reply(5_000_000))
    clock.note(2.0, reply(36_000_000))
    assert clock.now_us(2.0) >= 36_000_000


def test_a_clock_that_was_set_back_is_followed_at_once() -> None:
    clock = ServerClock()
    clock.note(1.0, reply(50_000_000))
    clock.note(2.0, reply(21_000_000))
    assert clock.now_us(2.0) < 22_000_000
