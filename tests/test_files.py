"""A file is whole, or as it was."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import pytest

from quickstudy.errors import FileError
from quickstudy.files import append_text, write_file, write_folder, write_text


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


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "new" / "folder", lambda new: write_text(new / "one", "1"))

    def fail(new: Path) -> None:
        write_text(new / "two", "2")
        raise OSError(28, "No space left on device")

    with pytest.raises(FileError, match=r"cannot write .*folder: No space left on device"):
        write_folder(folder, fail)
    assert [path.name for path in folder.iterdir()] == ["one"]
    write_folder(folder, lambda new: write_text(new / "three", "3"))
    assert [path.name for path in folder.iterdir()] == ["three"]
    assert list(folder.parent.iterdir()) == [folder]
