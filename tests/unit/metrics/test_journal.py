"""The journal: what it returned from is read again, whatever the disk did to the rest."""

import errno
import os
from pathlib import Path

import pytest

from agent360.mesh.metrics.journal import Journal, JournalInUseError


def left_in(directory: Path, from_position: int = 0) -> list[tuple[int, bytes]]:
    journal = Journal(directory)
    found = [(r.position, r.payload) for r in journal.recover(from_position) if r.is_new]
    journal.close()
    return found


def write(directory: Path, *payloads: bytes, segment_bytes: int = 1 << 20) -> Journal:
    journal = Journal(directory, segment_bytes=segment_bytes)
    list(journal.recover(0))
    for payload in payloads:
        journal.append(payload)
    return journal


def test_what_was_appended_is_read_in_order_over_many_segments(tmp_path: Path) -> None:
    payloads = [bytes([n]) * 100 for n in range(50)]
    write(tmp_path, *payloads, segment_bytes=500).close()
    assert left_in(tmp_path) == list(enumerate(payloads))
    assert len(list(tmp_path.glob("*.journal"))) == 10


def test_every_cut_of_the_last_segment_leaves_the_whole_records_before_it(tmp_path: Path) -> None:
    write(tmp_path, b"first", b"second", b"third").close()
    (segment,) = tmp_path.glob("*.journal")
    whole = segment.read_bytes()
    for size in range(len(whole)):
        segment.write_bytes(whole[:size])
        found = [payload for _, payload in left_in(tmp_path)]
        assert found == [b"first", b"second", b"third"][: len(found)]
        assert len(found) == (size >= 8 + 21) + (size >= 8 + 21 + 22)


def test_a_changed_byte_ends_the_reading_of_its_segment(tmp_path: Path) -> None:
    write(tmp_path, b"first", b"second").close()
    (segment,) = tmp_path.glob("*.journal")
    whole = bytearray(segment.read_bytes())
    for place in range(8 + 21, len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        segment.write_bytes(changed)
        assert left_in(tmp_path) == [(0, b"first")]


def test_positions_go_on_after_a_restart_and_never_before_the_stores(tmp_path: Path) -> None:
    write(tmp_path, b"a", b"b").close()
    journal = Journal(tmp_path)
    assert [record.is_new for record in journal.recover(1)] == [False, True]
    assert journal.append(b"c") == 2
    journal.close()
    journal = Journal(tmp_path)
    list(journal.recover(77))
    assert journal.append(b"d") == 77
    journal.close()


def test_segments_are_removed_once_all_of_their_records_are_released(tmp_path: Path) -> None:
    journal = write(tmp_path, *[b"x" * 100] * 10, segment_bytes=250)
    assert len(list(tmp_path.glob("*.journal"))) == 4
    journal.release(2)
    assert len(list(tmp_path.glob("*.journal"))) == 4
    journal.release(3)
    assert len(list(tmp_path.glob("*.journal"))) == 3
    journal.release(10)
    assert len(list(tmp_path.glob("*.journal"))) == 1, "the one that is being written"
    assert journal.append(b"y") == 10
    journal.close()


class FailingJournal(Journal):
    """Fails at the next write or sync, having done some of it."""

    fail_write = False
    fail_sync = False

    def write(self, parts: tuple[bytes, ...]) -> None:
        if self.fail_write:
            self.fail_write = False
            super().write((b"".join(parts)[:-3],))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(parts)

    def sync(self) -> None:
        if self.fail_sync:
            self.fail_sync = False
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync()


@pytest.mark.parametrize("failure", ["fail_write", "fail_sync"])
def test_a_failed_append_may_be_repeated_and_is_read_once(tmp_path: Path, failure: str) -> None:
    journal = FailingJournal(tmp_path)
    list(journal.recover(0))
    journal.append(b"before")
    setattr(journal, failure, True)
    with pytest.raises(OSError):  # noqa: PT011 - either kind
        journal.append(b"again")
    assert journal.begins_segment
    assert journal.append(b"again") == 1
    assert journal.append(b"after") == 2
    journal.close()
    assert left_in(tmp_path) == [(0, b"before"), (1, b"again"), (2, b"after")]


def test_a_record_left_by_an_attempt_that_was_said_to_have_failed_counts_once(
    tmp_path: Path,
) -> None:
    journal = write(tmp_path, b"before", b"twice")
    first = next(tmp_path.glob("*.journal"))
    whole = first.read_bytes()
    journal.close()
    first.write_bytes(whole[: 8 + 22])
    journal = Journal(tmp_path)
    list(journal.recover(0))
    assert journal.append(b"twice") == 1
    journal.close()
    first.write_bytes(whole)
    assert left_in(tmp_path) == [(0, b"before"), (1, b"twice")]


def test_two_processes_cannot_share_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(JournalInUseError):
        Journal(tmp_path)
    journal.close()
    again = Journal(tmp_path)
    assert again.writer == journal.writer
    again.close()
