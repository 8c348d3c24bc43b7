"""Patterns of log messages, and how often a pattern is written."""

import pytest

from agent360.mesh.runtime.logs.patterns import OTHER, Patterns
from agent360.mesh.runtime.logs.sampling import Sampler
from agent360.mesh.runtime.redaction import Redactor
from agent360.mesh.runtime.settings import LogSamplingSettings, RedactionSettings


def patterns(limit: int = 100) -> Patterns:
    return Patterns(limit, Redactor(RedactionSettings()))


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("serving", "serving"),
        ("took 17.5 s for 'acme'", "took * s for *"),
        ("event 7d4df1f4-93b3-4a5c-9a9e-0d7a4a4ce111 is 'late'", "event * is *"),
        ("trace 0af7651916cd43dd8448eb211c80319c at 0x7f00", "trace * at *"),
        ("10.0.0.1:7361 is away", "* is away"),
        ("first line\nsecond line", "first line"),
        ("token=abc is wrong", "token=[redacted] is wrong"),
        ("", ""),
    ],
)
def test_what_varies_is_left_out_of_a_pattern(text: str, pattern: str) -> None:
    assert patterns().of(text) == pattern


def test_a_pattern_fits_into_a_label_and_there_are_only_so_many() -> None:
    few = patterns(2)
    assert len(few.of("ä" * 5_000).encode()) <= 200
    assert few.of("b") == "b"
    assert few.of("c") == OTHER
    assert few.of("b") == "b"
    for number in range(10_000):
        few.of(f"{number} x {number:b}")
    assert len(few._by_text) <= 4_096


def test_the_first_of_an_interval_are_written_then_one_of_many_and_the_rest_is_counted() -> None:
    now = [100.0]
    settings = LogSamplingSettings(first=3, then_every=10, interval_s=60)
    sampler = Sampler(settings, lambda: now[0])
    answers = [sampler.admit("info", "p") for _ in range(25)]
    assert answers[:3] == [0, 0, 0]
    assert [index for index, each in enumerate(answers) if each is not None] == [0, 1, 2, 12, 22]
    assert [answers[12], answers[22]] == [9, 9]
    assert sampler.admit("error", "p") == 0, "a level has a count of its own"
    now[0] += 60
    assert sampler.admit("info", "p") == 2, "what was left out is said with the next"
    assert sampler.admit("info", "p") == 0
