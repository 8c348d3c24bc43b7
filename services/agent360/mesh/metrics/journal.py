"""The journal on disk: what was acknowledged and is not in the store yet.

Records are appended to segments. Each has a header (CRC-32 of the rest, length of the payload,
position) and a payload; positions grow by one. A segment is removed when the store has all that is
in it. What follows a torn record in a segment was never acknowledged and is not read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_MAGIC: Final = b"A360JNL1"
_HEADER: Final = struct.Struct("<IIQ")
_MAX_PAYLOAD: Final = 1 << 30
_SUFFIX: Final = ".journal"
_READ_WRITE: Final = 0o600


class Record(NamedTuple):
    """One append."""

    position: int
    payload: bytes
    is_new: bool = True
    """False: the store has it, or it was read before; later records may still refer to it."""


class _Segment(NamedTuple):
    path: Path
    first: int
    """Position of its first record."""


class JournalInUseError(Exception):
    """Another process has the journal open."""


class Journal:
    """Appends records durably; reads them again after a crash.

    All methods block; they are called from one thread. Invariant: what ``append`` returned for is
    on the disk, and every position is read once, whatever happened to earlier attempts to write it.

    Example:
        >>> journal = Journal(Path("/var/lib/agent360/metrics.journal"))
        >>> for record in journal.recover(from_position=0): ...
        >>> journal.append(b"payload")
        0
        >>> journal.release(1)
    """

    def __init__(self, directory: Path, *, segment_bytes: int = 16 << 20) -> None:
        """Opens the journal, made if need be.

        Args:
            directory: holds nothing else.
            segment_bytes: a segment that is as large is followed by another.

        Raises:
            JournalInUseError: another process has it open.
            OSError: the directory cannot be used.
        """
        self._directory = directory
        self._segment_bytes = segment_bytes
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR, _READ_WRITE)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise JournalInUseError(
                f"the journal {directory} is in use by another process; give each its own"
            ) from None
        self.writer = self._read_writer()
        """Names this journal among all that write to the same store."""
        self._older: list[_Segment] = self._segments()
        self._file = -1
        self._current: _Segment | None = None
        self._size = 0
        self._next = 0
        self.torn_bytes = 0
        """What ``recover`` could not read: the ends of segments that a crash cut."""

    @property
    def next_position(self) -> int:
        """Position of the next record; counts from 0."""
        return self._next

    @property
    def begins_segment(self) -> bool:
        """Whether the next record is the first of its segment."""
        return self._file < 0

    @property
    def size_bytes(self) -> int:
        """Size of all segments."""
        return sum(_size_of(each.path) for each in self._older) + self._size

    def recover(self, from_position: int) -> Iterator[Record]:
        """Reads what an earlier process left; to be read to its end before anything is appended.

        Args:
            from_position: records before are not new; the next is not appended before it.
        """
        self._next = from_position
        for segment in self._older:
            for record in self._read(segment):
                # An attempt that failed half-way may have left the record; the first one counts.
                is_new = record.position >= self._next
                if is_new:
                    self._next = record.position + 1
                yield record._replace(is_new=is_new)

    def append(self, payload: bytes) -> int:
        """Writes a record and returns its position once it is durable.

        Raises:
            OSError: it is not; the next attempt takes the same position.
        """
        try:
            if self._file < 0:
                self._begin_segment()
            position = self._next
            rest = struct.pack("<IQ", len(payload), position)
            checksum = zlib.crc32(payload, zlib.crc32(rest))
            self.write((struct.pack("<I", checksum) + rest, payload))
            self.sync()
        except OSError:
            self._give_up_segment()
            raise
        self._size += _HEADER.size + len(payload)
        self._next += 1
        if self._size >= self._segment_bytes:
            self._end_segment()
        return position

    def write(self, parts: tuple[bytes, ...]) -> None:
        """Writes to the end of the segment.

        Raises:
            OSError: not all of it could be written.
        """
        rest = memoryview(b"".join(parts))
        while rest:
            rest = rest[os.write(self._file, rest) :]

    def sync(self) -> None:
        """Makes what was written durable.

        Raises:
            OSError: it may not be.
        """
        os.fdatasync(self._file)

    def release(self, position: int) -> None:
        """Removes segments that have only records before a position.

        Raises:
            OSError: one could not be removed.
        """
        while self._older:
            follower = self._older[1] if len(self._older) > 1 else self._current
            end = follower.first if follower else self._next
            if end > position:
                return
            self._older[0].path.unlink(missing_ok=True)
            del self._older[0]

    def close(self) -> None:
        """Lets another process open it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        os.close(self._lock)

    # ---------------------------------------------------------------- segments

    def _read_writer(self) -> str:
        path = self._directory / "writer"
        if not path.exists():
            fresh = self._directory / "writer.new"
            fresh.write_text(uuid.uuid4().hex)
            with fresh.open() as file:
                os.fsync(file.fileno())
            fresh.rename(path)
            self._sync_directory()
        return path.read_text()

    def _segments(self) -> list[_Segment]:
        paths = sorted(self._directory.glob(f"*{_SUFFIX}"))
        return [_Segment(path, int(path.name.split("-")[0])) for path in paths]

    def _read(self, segment: _Segment) -> Iterator[Record]:
        data = segment.path.read_bytes()
        place = len(_MAGIC) if data.startswith(_MAGIC) else len(data)
        while place + _HEADER.size <= len(data):
            checksum, length, position = _HEADER.unpack_from(data, place)
            end = place + _HEADER.size + length
            if length > _MAX_PAYLOAD or end > len(data):
                break
            if zlib.crc32(memoryview(data)[place + 4 : end]) != checksum:
                break
            yield Record(position, data[place + _HEADER.size : end])
            place = end
        self.torn_bytes += len(data) - place

    def _begin_segment(self) -> None:
        name = f"{self._next:020d}-{uuid.uuid4().hex[:8]}{_SUFFIX}"
        path = self._directory / name
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, _READ_WRITE)
        self._current = _Segment(path, self._next)
        self._size = len(_MAGIC)
        self.write((_MAGIC,))
        self._sync_directory()

    def _end_segment(self) -> None:
        os.close(self._file)
        self._file = -1
        if self._current is not None:
            self._older.append(self._current)
            self._current = None

    def _give_up_segment(self) -> None:
        """After a failed write or sync nothing about the file's end is certain: goes on in another.

        What the failed attempt left is cut off, or known to ``recover`` by its position.
        """
        if self._file < 0 or self._current is None:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._size)
        self._end_segment()

    def _sync_directory(self) -> None:
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
