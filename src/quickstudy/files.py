"""Files that appear whole, or not at all, and where those are that can be made again."""

from __future__ import annotations

import csv
import errno
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from quickstudy.errors import FileError


def cache_folder() -> Path:
    """Return the folder of all that can be made or fetched again: ``QUICKSTUDY_CACHE``, or the system's cache."""
    value = os.environ.get("QUICKSTUDY_CACHE")
    if value:
        return Path(value).expanduser()
    import pooch

    return Path(pooch.os_cache("quickstudy"))


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Let ``write`` fill a temporary file, and put it in the place of ``path`` when all of it is on the disk.

    Whatever happens meanwhile, ``path`` holds either what it held before or all that is new.

    Args:
        path: file to write; its folder is made if need be.
        write: is given the open temporary file.

    Returns:
        ``path``.

    Raises:
        FileError: the file cannot be written, because the disk is full or for another reason of the system.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives 0600
        os.replace(temporary, path)
        temporary = None
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        before = "what it held before is unharmed" if path.exists() else "nothing was left there"
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
        raise FileError(f"cannot write {path}: {cause}; {before}. Make room, or choose another folder") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
    return path


def write_folder(folder: Path, fill: Callable[[Path], object]) -> Path:
    """Let ``fill`` write into a temporary folder, and put it in the place of ``folder`` when all of it is there.

    Args:
        folder: what is to be replaced, if it exists, or made.
        fill: is given the empty temporary folder; files are best written by :func:`write_file`.

    Returns:
        ``folder``.

    Raises:
        FileError: it cannot be written; what it held before is unharmed.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        fill(new)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    except OSError as error:
        raise FileError(
            f"cannot write {folder}: {error.strerror or error}; make it writable, or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def append_text(path: Path, text: str) -> Path:
    """Append to a text file, which is made if need be; return its path.

    The text is handed to the system in one piece, so several processes may append to the same file.

    Raises:
        FileError: it cannot be written; the file is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            if file.write(text.encode()) != len(text.encode()):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise FileError(f"cannot append to {path}: {error.strerror}; it is as it was. Make room, and repeat") from error
    return path


def create_text(path: Path, text: str) -> Path:
    """Write a text file that is not there yet, whole or not at all; return its path.

    Raises:
        FileExistsError: it is there, be it that another process has made it meanwhile.
        FileError: it cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=_made(path.parent)) as folder:
        temporary = write_text(Path(folder) / path.name, text)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if path.exists():
                raise FileExistsError(path) from None
            os.replace(temporary, path)
    return path


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {folder}: {error.strerror}; choose another") from error
    return folder


def write_text(path: Path, text: str) -> Path:
    """Write a text file, whole or not at all; return its path.

    Raises:
        FileError: it cannot be written.
    """
    return write_file(path, lambda file: file.write(text.encode()))


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table in Markdown, without a last newline; its first ``left`` columns to the left, others right."""
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def csv_text(rows: Sequence[Mapping[str, object]], *, header: bool = True) -> str:
    """Return rows as the text of a CSV file; the first one names the columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
