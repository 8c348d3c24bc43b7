"""The board on a screen of its own, refreshed while it is looked at."""

from __future__ import annotations

from typing import ClassVar

from rich.console import Group
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Footer, Header, Static

from agent360.mesh.cli.top.board import Board
from agent360.mesh.cli.top.reading import BoardReader
from agent360.mesh.cli.top.tables import summary, tables


class TopApp(App[None]):
    """Shows boards until ``q`` is pressed; ``p`` pauses."""

    TITLE = "agent360-mesh top"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("p", "pause", "Pause"),
        Binding("r", "refresh_now", "Refresh"),
    ]

    def __init__(self, reader: BoardReader, every_s: float) -> None:
        """Prepares the screen.

        Args:
            reader: reads boards.
            every_s: seconds between looks.
        """
        super().__init__()
        self._reader = reader
        self._every_s = every_s
        self._paused = False

    def compose(self) -> ComposeResult:
        """The parts of the screen."""
        yield Header(show_clock=True)
        with VerticalScroll():
            yield Static("asking ...", id="summary")
            yield Static(id="tables")
        yield Footer()

    def on_mount(self) -> None:
        """Begins to look."""
        self.set_interval(self._every_s, self._look)
        self.call_later(self._look)

    def action_pause(self) -> None:
        """Stops looking, or goes on."""
        self._paused = not self._paused
        self.sub_title = "paused" if self._paused else ""

    async def action_refresh_now(self) -> None:
        """Looks at once, even if paused."""
        self.show(await self._reader.read())

    async def _look(self) -> None:
        if not self._paused:
            self.show(await self._reader.read())

    def show(self, board: Board) -> None:
        """Puts a board on the screen."""
        self.query_one("#summary", Static).update(summary(board))
        self.query_one("#tables", Static).update(Group(*tables(board)))
