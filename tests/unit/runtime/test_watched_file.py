"""A file that is read again when it changes."""

from pathlib import Path

import pytest
import structlog
from support.polling import eventually

from agent360.mesh.runtime.toml_places import Places
from agent360.mesh.runtime.watched_file import WatchedFile, WrongFileError


def read(file: Path) -> str:
    try:
        text = file.read_text()
    except OSError as error:
        raise WrongFileError(f"{file}: {error.strerror}") from error
    if "wrong" in text:
        raise WrongFileError(f"{file}:1: it is wrong")
    return text


async def test_changes_are_adopted_and_wrong_content_is_refused_and_told(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("one")
    faults, adopted = [], []
    watched = WatchedFile(file, read, structlog.get_logger(), faults.append)
    assert watched.content == "one"
    watched.start(adopted.append)
    file.write_text("wrong")
    await eventually(lambda: faults)
    assert (watched.content, adopted) == ("one", [])
    assert "it is wrong" in faults[0]
    file.write_text("three")
    await eventually(lambda: adopted)
    assert (watched.content, adopted, faults[1:]) == ("three", ["three"], [""])
    await watched.close()


async def test_a_file_that_is_replaced_or_goes_away_and_comes_back_is_noticed(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("one")
    faults, adopted = [], []
    watched = WatchedFile(file, read, structlog.get_logger(), faults.append)
    watched.start(adopted.append)
    other = tmp_path / "other.txt"
    other.write_text("two")
    other.rename(file)
    await eventually(lambda: adopted == ["two"])
    file.unlink()
    await eventually(lambda: any("No such file" in fault for fault in faults))
    assert watched.content == "two"
    file.write_text("three")
    await eventually(lambda: adopted == ["two", "three"])
    await watched.close()


def test_a_file_that_is_wrong_at_first_is_an_error(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("wrong")
    with pytest.raises(WrongFileError, match="it is wrong"):
        WatchedFile(file, read, structlog.get_logger(), print)


TOML = """[head]
a = 1

[[things]]
name = "one"
"quoted" = 2
[[things]]
[things.inner]
deep = 3
inline = { x = 1 }
"""


@pytest.mark.parametrize(
    ("number", "fields", "line"),
    [
        (0, ("name",), 5),
        (0, ("quoted",), 6),
        (0, ("missing",), 4),
        (0, ("missing", "name"), 5),
        (1, ("name",), 7),
        (1, ("inner",), 8),
        (1, ("deep", "inner"), 9),
        (1, ("x", "inline"), 10),
    ],
)
def test_places_are_lines_of_the_entry(number, fields, line):
    places = Places(Path("f.toml"), TOML, "things")
    assert places.of(number, *fields) == f"f.toml:{line}"


def test_keys_outside_of_entries_have_places_too():
    places = Places(Path("f.toml"), TOML, "things")
    assert places.of_key("head") == "f.toml:1"
    assert places.of_key("nowhere") == "f.toml"
    assert places.of(7, "name") == "f.toml"
