"""Kept answers come back as they were, and garbage does not come back."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent360.mesh.inference.answers import (
    Answer,
    Embeddings,
    TokenLogprob,
    Usage,
    as_pieces,
    merge,
    whole_calls,
)
from agent360.mesh.inference.codec import (
    decode_answer,
    decode_vectors,
    encode_answer,
    encode_vectors,
)
from agent360.mesh.inference.conversation import ToolCall

logprobs = st.builds(
    TokenLogprob,
    st.text(),
    st.floats(max_value=0, allow_infinity=False),
    st.binary(max_size=4),
    st.lists(st.builds(TokenLogprob, st.text(), st.floats(-9, 0)), max_size=2).map(tuple),
)
answers = st.builds(
    Answer,
    content=st.text(),
    tool_calls=st.lists(st.builds(ToolCall, st.text(), st.text(), st.text()), max_size=3).map(
        tuple
    ),
    finish_reason=st.sampled_from(["stop", "length", "tool_calls"]),
    usage=st.builds(Usage, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.booleans()),
    model=st.text(),
    backend=st.text(),
    logprobs=st.lists(logprobs, max_size=3).map(tuple),
    reasoning=st.text(),
)


@given(answers)
def test_a_kept_answer_comes_back_as_it_was(answer):
    assert decode_answer(encode_answer(answer)) == answer


@given(answers)
def test_a_replayed_answer_says_the_same(answer):
    said = merge(as_pieces(answer))
    assert said.content == answer.content
    assert whole_calls(said) == answer.tool_calls
    assert said.logprobs == answer.logprobs
    assert said.reasoning == answer.reasoning


def test_kept_vectors_come_back_as_they_were():
    vectors = [array("f", [0.5, -1.25]), array("f"), array("f", [3.0])]
    found = Embeddings(vectors, Usage(7, estimated=True), "m", "b")
    assert decode_vectors(encode_vectors(found)) == found


@pytest.mark.parametrize("garbage", [b"", b"{", b"null", b"[2,1]", b"[1,[3]]\nabc", b"\xff\xfe"])
def test_garbage_is_a_miss(garbage):
    assert decode_answer(garbage) is None
    assert decode_vectors(garbage) is None
