"""A file that is read again when it changes; a wrong one is refused, the old content stays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

import structlog

from agent360.mesh.runtime.settings import SettingError

T = TypeVar("T")
_LOOK_EVERY_S: Final = 0.3


class WrongFileError(SettingError):
    """A file cannot be read, or says something wrong; the message names file and line."""


class WatchedFile(Generic[T]):
    """The content of a file, as it last was right.

    Example:
        >>> watched = WatchedFile(Path("limits.toml"), read_limits, log, on_load=audit)
        >>> watched.content
        >>> watched.start(adopt)  # called with every later content
        >>> await watched.close()
    """

    def __init__(
        self,
        file: Path,
        read: Callable[[Path], T],
        log: structlog.stdlib.BoundLogger,
        on_load: Callable[[str], None],
    ) -> None:
        """Reads the file.

        Args:
            file: what is watched.
            read: makes its content of it, in a thread; raises a ``WrongFileError``.
            log: where a reading is noted.
            on_load: told what was wrong, if anything, whenever the file was read again.

        Raises:
            WrongFileError: the file is wrong.
        """
        self._file = file
        self._read = read
        self._log = log
        self._on_load = on_load
        # Looked at before it is read: a change in between is then seen later instead of never.
        self._stamp = self._look()
        self._watcher: asyncio.Task[None] | None = None
        self.content: T = read(file)
        """As it last was right."""

    def start(self, adopt: Callable[[T], None]) -> None:
        """Has ``adopt`` told of the content whenever it changed."""
        self._watcher = asyncio.create_task(self._watch(adopt))

    async def close(self) -> None:
        """Watches no more."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait((self._watcher,))

    async def _watch(self, adopt: Callable[[T], None]) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            stamp = await asyncio.to_thread(self._look)
            if stamp != self._stamp:
                self._stamp = stamp
                await self._read_again(adopt)

    async def _read_again(self, adopt: Callable[[T], None]) -> None:
        file = str(self._file)
        try:
            self.content = await asyncio.to_thread(self._read, self._file)
        except WrongFileError as error:
            self._log.error("a file is wrong; what it said before stays", error=str(error))
            self._on_load(str(error))
            return
        self._log.info("file read", file=file)
        adopt(self.content)
        self._on_load("")

    def _look(self) -> tuple[int, int, int]:
        """Changes when the file does."""
        try:
            stat = self._file.stat()
        except OSError:
            return (0, 0, 0)
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino)
