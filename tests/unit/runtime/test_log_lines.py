"""What ``agent360-mesh logs`` writes to a terminal."""

import pytest

from agent360.logs.v1 import logs_pb2 as pb
from agent360.mesh.cli.logs import _show


def test_a_record_cannot_steer_the_terminal_it_is_shown_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _show(
        pb.LogRecord(
            level=pb.LOG_LEVEL_ERROR,
            service="x\x1b[31m",
            message="title\x1b]0;other\x07 é\x9b2J",
            attributes={"a\x1b[2J": "\x1b[1mb"},
            exception="at\n\tline 1\x1b[2J",
        )
    )
    shown = capsys.readouterr().out
    assert not set(shown) & set("\x1b\x9b\x07")
    assert "title\\x1b]0;other\\x07 é\\x9b2J" in shown
