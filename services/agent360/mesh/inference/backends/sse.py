"""Server-sent events, parsed from the bytes as they arrive (WHATWG HTML, section 9.2.6)."""

from __future__ import annotations


class EventParser:
    """Cuts a byte stream into the data of its events.

    Only ``data`` is kept: the OpenAI API uses no event names, ids or retry times. Several data
    lines of one event are joined by line feeds; comments are dropped. A field ``error``, in which
    older llama.cpp servers say what went wrong, counts as data with that error.

    Example:
        >>> EventParser(max_bytes=1 << 20).feed(b"data: one\\n\\ndata: tw")
        [b'one']
    """

    __slots__ = ("_data", "_max_bytes", "_rest")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """The data of the events that ``received`` completes.

        Raises:
            ValueError: one event is larger than the bound.
        """
        lines = (self._rest + received if self._rest else received).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > self._max_bytes:
            raise ValueError(f"an event is larger than {self._max_bytes:,} bytes")
        events: list[bytes] = []
        data = self._data
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if line.startswith(b"data:"):
                data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif line.startswith(b"error:"):
                data.append(b'{"error":' + (line[6:].strip() or b'""') + b"}")
            elif not line and data:
                events.append(data[0] if len(data) == 1 else b"\n".join(data))
                data.clear()
        if sum(map(len, data)) > self._max_bytes:
            raise ValueError(f"an event is larger than {self._max_bytes:,} bytes")
        return events

    def finish(self) -> list[bytes]:
        """The data of an event whose empty line the server did not send."""
        events = self.feed(b"\n\n") if self._rest or self._data else []
        self._rest = b""
        return events
