"""The file of answers: durable, repaired after a crash, in order where that is asked for."""

import json
from array import array
from pathlib import Path
from typing import Any

import pytest

from agent360.mesh.jobs.answers import Answered, AnswerFile, AnswersFileError, Repair


def record(index: int, **more: Any) -> bytes:
    return json.dumps({"index": index, "key": f"{index:016x}", **more}).encode() + b"\n"


def opened(path: Path, *, keep_errors: bool = False) -> Repair:
    with AnswerFile(path) as answers:
        return answers.repair(keep_errors=keep_errors)


@pytest.mark.parametrize("cut", [1, 5, 20, 40])
def test_a_half_written_last_line_is_dropped_and_its_prompt_is_not_answered(
    tmp_path: Path, cut: int
) -> None:
    file = tmp_path / "answers.jsonl"
    whole = record(0, text="a") + record(1, text="b")
    file.write_bytes(whole + record(2, text="c" * 100)[:cut])
    found = opened(file)
    assert file.read_bytes() == whole
    assert found.dropped_bytes == cut
    assert [found.answered.take(index) for index in (0, 1, 2)] == [True, True, False]


def test_a_half_written_only_line_is_dropped_too(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    for cut in range(1, len(record(0)) - 1):
        file.write_bytes(record(0)[:cut])
        assert opened(file).dropped_bytes == cut
        assert file.read_bytes() == b""


def test_a_last_line_that_lacks_only_its_end_is_an_answer(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_bytes(record(0)[:-1])
    found = opened(file)
    assert (len(found.answered), found.dropped_bytes) == (1, 0)
    assert file.read_bytes() == record(0)


def test_errors_are_taken_out_to_be_tried_again_or_kept(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    failed = record(1, error={"reason": "UPSTREAM_FAILED"})
    content = record(0) + failed + record(2)
    file.write_bytes(content)
    kept = opened(file, keep_errors=True)
    assert (len(kept.answered), kept.errors) == (3, 0)
    assert file.read_bytes() == content
    retried = opened(file)
    assert (len(retried.answered), retried.errors) == (2, 1)
    assert file.read_bytes() == record(0) + record(2)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("foreign", [b"a,b\n1,2\n", b'{"text": 1}\n{"text": 2}\n', b"notes"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, foreign: bytes) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_bytes(foreign)
    with pytest.raises(AnswersFileError, match="line 1 is no answer"):
        opened(file)
    assert file.read_bytes() == foreign


def test_a_broken_line_in_the_middle_is_not_guessed_at(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    content = record(0) + b'{"index": 1, "ke\n' + record(2)
    file.write_bytes(content)
    with pytest.raises(AnswersFileError, match="line 2 is no answer"):
        opened(file)
    assert file.read_bytes() == content


def test_two_jobs_do_not_write_to_one_file(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with AnswerFile(file) as first:
        with pytest.raises(AnswersFileError, match="another job"), AnswerFile(file):
            pass
        first.append(record(1, error={}))
        first.repair(keep_errors=False)
        with pytest.raises(AnswersFileError, match="another job"), AnswerFile(file):
            pass
    with AnswerFile(file) as second:
        assert len(second.repair(keep_errors=False).answered) == 0


def test_answers_are_put_in_the_order_of_their_prompts(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with AnswerFile(file) as answers:
        for index in (3, 0, 2, 1):
            answers.append(record(index, text="x" * index))
        answers.put_in_order()
        answers.append(record(4))
        inode = file.stat().st_ino
        answers.put_in_order()
        assert file.stat().st_ino == inode
    assert file.read_bytes() == b"".join(
        [*(record(index, text="x" * index) for index in range(4)), record(4)]
    )


def test_many_keys_are_found_whatever_their_order() -> None:
    keys = array("Q", ((place * 2**40 + 7) % 2**61 for place in range(600_000)))
    answered = Answered(keys)
    assert all(answered.take(key) for key in keys[::1_000])
    assert not any(answered.take(key) for key in keys[::1_000])


def test_a_key_is_taken_as_often_as_it_stands_there() -> None:
    answered = Answered(array("Q", [7, 2**64 - 1, 7]))
    assert [answered.take(7) for _ in range(3)] == [True, True, False]
    assert answered.left == 1
    assert answered.take(2**64 - 1)
    assert not answered.take(0)
    assert answered.left == 0
