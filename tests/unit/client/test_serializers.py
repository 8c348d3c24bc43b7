"""Serializers: every value of their type comes back, and what is not of the type is refused."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from agent360.client import BYTES, TEXT, json_of, pydantic_of
from agent360.client.serializers import serializer_for


class Plan(BaseModel):
    """A model of pydantic's."""

    name: str
    steps: int = 0


class Step(msgspec.Struct):
    """A structure of msgspec's."""

    name: str
    at: datetime | None = None


@dataclass
class Point:
    """A plain dataclass."""

    x: float
    y: float


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.binary())
def test_bytes_come_back(value: bytes) -> None:
    assert BYTES.decode(BYTES.encode(value)) == value


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_text_comes_back(value: str) -> None:
    assert TEXT.decode(TEXT.encode(value)) == value


@given(JSON)
def test_json_values_come_back(value: Any) -> None:
    serializer = json_of(Any)
    assert serializer.decode(serializer.encode(value)) == value


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (bytes, b"\x00\xff"),
        (str, "naïve"),
        (int, 7),
        (str | None, None),
        (Plan, Plan(name="p", steps=2)),
        (Plan | None, None),
        (list[Plan], [Plan(name="p")]),
        (dict[str, Plan], {"a": Plan(name="p")}),
        (Step, Step("s", datetime(2026, 1, 2, tzinfo=UTC))),
        (list[Step], [Step("s")]),
        (Point, Point(1.0, 2.5)),
        (tuple[int, str], (1, "a")),
        (dict[str, list[int]], {"a": [1, 2]}),
        (Any, {"a": [1, None]}),
    ],
)
def test_a_value_of_the_annotated_type_comes_back_as_that_type(annotation: Any, value: Any) -> None:
    serializer = serializer_for(annotation)
    back = serializer.decode(serializer.encode(value))
    assert back == value
    assert type(back) is type(value)


def test_the_annotation_decides_which_serializer_it_is() -> None:
    assert serializer_for(bytes) is BYTES
    assert serializer_for(str) is TEXT
    assert serializer_for(list[Plan]) is pydantic_of(list[Plan])
    assert serializer_for(list[Step]) is json_of(list[Step])


def test_what_is_not_of_the_type_is_refused() -> None:
    with pytest.raises(TypeError, match="needs a serializer"):
        BYTES.encode("text")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not text"):
        TEXT.encode(b"bytes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int"):
        json_of(int).decode(b'"seven"')
    with pytest.raises(ValueError, match="steps"):
        pydantic_of(Plan).decode(b'{"name": "p", "steps": "many"}')
    with pytest.raises(UnicodeDecodeError):
        TEXT.decode(b"\xff")


def test_a_serializer_states_the_media_type() -> None:
    types = [each.content_type for each in (BYTES, TEXT, json_of(int), pydantic_of(Plan))]
    assert types == ["", "text/plain; charset=utf-8", "application/json", "application/json"]
