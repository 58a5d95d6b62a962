"""A file is whole, or as it was."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import pytest

from quickstudy.errors import FileError
from quickstudy.files import append_text, write_file, write_text


def fail_half_way(file: BinaryIO) -> None:
    file.write(b"half")
    raise OSError(5, "Input/output error")


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="Input/output error; nothing was left there"):
        write_file(tmp_path / "file", fail_half_way)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = write_text(tmp_path / "new folder" / "file", "before")
    with pytest.raises(FileError, match="what it held before is unharmed"):
        write_file(path, fail_half_way)
    assert [file.read_text() for file in path.parent.iterdir()] == ["before"]
    assert write_text(path, "after").read_text() == "after"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(file: BinaryIO) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "file", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_appending(tmp_path: Path) -> None:
    path = append_text(tmp_path / "new folder" / "file", "a\n")
    assert append_text(path, "b\n").read_text() == "a\nb\n"
    with pytest.raises(FileError, match="cannot append to"):
        append_text(path / "file", "c")
