"""Server-sent events however the bytes are cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent360.mesh.inference.backends.sse import EventParser

STREAM = (
    b": a comment\n"
    b'data: {"a": 1}\n\n'
    b"event: message\r\ndata:no space\r\n\r\n"
    b"data: two\ndata: lines\n\n"
    b"\n\n"
    b"id: 7\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = [b'{"a": 1}', b"no space", b"two\nlines", b"[DONE]"]


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=20))
def test_events_do_not_depend_on_how_the_bytes_arrive(cuts):
    parser = EventParser(1 << 20)
    places = [0, *sorted(cuts), len(STREAM)]
    found = []
    for start, end in itertools.pairwise(places):
        found += parser.feed(STREAM[start:end])
    assert found + parser.finish() == EVENTS


def test_an_event_without_its_empty_line_counts_at_the_end():
    parser = EventParser(1 << 20)
    assert parser.feed(b"data: last") == []
    assert parser.finish() == [b"last"]
    assert parser.finish() == []


@pytest.mark.parametrize("endless", [b"data: " + b"x" * 200, b"data: xxxxxxxxx\n" * 20])
def test_an_event_beyond_the_bound_is_refused(endless):
    parser = EventParser(100)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        parser.feed(endless)
