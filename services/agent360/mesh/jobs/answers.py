"""The file that a job's answers are appended to: durable in groups, repaired, put in order."""

from __future__ import annotations

import fcntl
import heapq
import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import msgspec
from msgspec import Struct

_COPY_BYTES: Final = 2**20
_SORTED_AT_ONCE: Final = 2**18


class AnswersFileError(Exception):
    """The file cannot be used; the message is for people."""


class _Known(Struct):
    """What is read of a line of an earlier run."""

    index: int
    key: str
    error: Any = None


_decode: Final = msgspec.json.Decoder(_Known).decode


class Answered:
    """The keys of lines that need no answer any more: 9 bytes each.

    A key may stand there several times, for several lines that ask the same under the same id; it
    is then taken as often.
    """

    def __init__(self, keys: array[int]) -> None:
        # Sorted in parts: all of it at once would be held as Python's own, larger numbers.
        parts = (
            sorted(keys[at : at + _SORTED_AT_ONCE]) for at in range(0, len(keys), _SORTED_AT_ONCE)
        )
        self._keys = array("Q", heapq.merge(*(array("Q", part) for part in parts)))
        self._taken = bytearray(len(keys))

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def left(self) -> int:
        """Keys that no line has taken."""
        return len(self._taken) - sum(self._taken)

    def take(self, key: int) -> bool:
        """Whether a line of that key was answered, once for each time it was."""
        place = bisect_left(self._keys, key)
        while place < len(self._keys) and self._keys[place] == key:
            if not self._taken[place]:
                self._taken[place] = 1
                return True
            place += 1
        return False


@dataclass(slots=True)
class Repair:
    """What was found in the file when it was opened."""

    answered: Answered = field(default_factory=lambda: Answered(array("Q")))
    """Lines that need no answer any more."""
    dropped_bytes: int = 0
    """Bytes at the end that were no whole line: a crash while it was written."""
    errors: int = 0
    """Errors of earlier runs that were taken out, to be tried again."""


class AnswerFile:
    """A file of answers, open for one job at a time.

    Its methods block; what they wrote is on the disk when they return.

    Example:
        >>> with AnswerFile(Path("answers.jsonl")) as answers:
        ...     found = answers.repair(keep_errors=False)
        ...     answers.append(b'{"index":0,...}\\n')
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def __enter__(self) -> Self:
        """Opens and locks the file.

        Raises:
            AnswersFileError: another job writes to it.
            OSError: it cannot be opened.
        """
        while True:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(self._fd)
                raise AnswersFileError(f"{self.path}: another job is writing to it") from error
            if os.fstat(self._fd).st_ino == self.path.stat().st_ino:
                return self
            os.close(self._fd)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def append(self, data: bytes) -> None:
        """Appends whole lines and waits until they are on the disk."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        os.fsync(self._fd)

    def repair(self, *, keep_errors: bool) -> Repair:
        """Reads what is there: drops a half-written last line, and errors unless they are kept.

        Raises:
            AnswersFileError: the file is none of this command's.
        """
        found = Repair()
        keys = array("Q")
        size = os.fstat(self._fd).st_size
        whole = 0
        for line, data in self._lines():
            known = self._read(line, data, at_end=line.end == size)
            if known is None:
                found.dropped_bytes = size - line.start
                break
            whole = line.end
            if known.error is not None and not keep_errors:
                found.errors += 1
            else:
                keys.append(int(known.key, 16))
        if whole < size:
            os.ftruncate(self._fd, whole)
        if whole and not self._ends_with_newline(whole):
            self.append(b"\n")
        if found.errors:
            self._rewrite(self._without_errors)
        os.fsync(self._fd)
        found.answered = Answered(keys)
        return found

    def put_in_order(self) -> None:
        """Sorts the lines by their index, if they are not so already."""
        indexes, starts, ends = array("Q"), array("Q"), array("Q")
        sorted_already = True
        for line, data in self._lines():
            index = _decode(data).index
            sorted_already = sorted_already and (not indexes or indexes[-1] <= index)
            indexes.append(index)
            starts.append(line.start)
            ends.append(line.end)
        if sorted_already:
            return
        order = array("Q", sorted(range(len(indexes)), key=indexes.__getitem__))

        def lines() -> Iterator[bytes]:
            for place in order:
                yield os.pread(self._fd, ends[place] - starts[place], starts[place])

        self._rewrite(lines)

    # ---------------------------------------------------------------- steps

    def _lines(self) -> Iterator[tuple[_Span, bytes]]:
        with open(os.dup(self._fd), "rb", buffering=_COPY_BYTES) as file:  # noqa: PTH123 - a descriptor
            file.seek(0)
            start = 0
            for number, data in enumerate(file, 1):
                yield _Span(number, start, start + len(data)), data
                start += len(data)

    def _read(self, line: _Span, data: bytes, *, at_end: bool) -> _Known | None:
        """A line of an earlier run; None: it is the last one, and was not written whole."""
        try:
            known = _decode(data)
            int(known.key, 16)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            if at_end and line.start:
                return None
            if at_end and not data.endswith(b"\n") and data.startswith(b'{"index":'[: len(data)]):
                return None
            raise AnswersFileError(
                f"{self.path}: line {line.number} is no answer of this command; "
                "name another file, or remove it"
            ) from error
        return known

    def _without_errors(self) -> Iterator[bytes]:
        for _, data in self._lines():
            if _decode(data).error is None:
                yield data

    def _ends_with_newline(self, size: int) -> bool:
        return os.pread(self._fd, 1, size - 1) == b"\n"

    def _rewrite(self, lines: Callable[[], Iterator[bytes]]) -> None:
        """Replaces the file at once by one with these lines, which is then open and locked."""
        fresh = self.path.with_name(self.path.name + ".new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with open(os.dup(fd), "wb", buffering=_COPY_BYTES) as file:  # noqa: PTH123 - a descriptor
                file.writelines(lines())
            os.fsync(fd)
            fresh.replace(self.path)
        except BaseException:
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd = fd
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@dataclass(frozen=True, slots=True)
class _Span:
    """Where a line is."""

    number: int
    start: int
    end: int
