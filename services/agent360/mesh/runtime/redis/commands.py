"""Commands and their form on the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import hiredis

Argument = bytes | str | int | float
"""A part of a command; text is sent as UTF-8."""

pack_command: Final[Callable[[tuple[Argument, ...]], bytes]] = hiredis.pack_command  # type: ignore[assignment]  # its stub declares a tuple of one
"""One command in RESP."""


class Command(NamedTuple):
    """One command and the key that says which server it goes to.

    Example:
        >>> Command(b"{acme}:1", ("SET", b"{acme}:1", b"value", "PX", 1_000))
    """

    key: bytes
    """Routes the command, by its hash tag if it has one; empty: any server will do."""
    arguments: tuple[Argument, ...]
    """The command's name and its arguments."""


def pack(commands: Iterable[Command]) -> bytes:
    """Commands in RESP, to be sent as one."""
    return b"".join([pack_command(command.arguments) for command in commands])
