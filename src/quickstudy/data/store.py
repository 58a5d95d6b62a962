"""The packed store: one dataset decoded once, as one array of bytes that is memory-mapped from then on.

A store is a folder of two files: ``images.npy`` (uint8 ``[n, channels, height, width]``, class after class) and
``index.json`` (the names of the classes, the row at which each begins, what the store was made from, and the images
that could not be read). While it is written there is a third, ``journal.jsonl``, with a line for what it is made from
and one for each class that is done.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np
import torch

from quickstudy.data.images import ImageClasses
from quickstudy.errors import DataError

FORMAT = 1
IMAGES, INDEX, JOURNAL = "images.npy", "index.json", "journal.jsonl"


class Packed(NamedTuple):
    """One class of a store: its name, its images, uint8 ``[count, channels, height, width]``, and what is missing."""

    name: str
    images: np.ndarray
    unreadable: Sequence[str] = ()
    """Names of the images that could not be read."""


Classes = Iterable[Packed | tuple[str, np.ndarray]]


def write_store(
    folder: Path,
    classes: Classes | Callable[[int], Classes],
    image_shape: tuple[int, int, int],
    origin: Mapping[str, Any],
) -> Path:
    """Write a packed store; either the whole of it becomes visible, or nothing.

    The classes are written as they come, so they need not fit in memory together. If another process has finished
    the same store first, that one stays.

    Args:
        folder: where; its parent is made.
        classes: one class after the other; or a function of a number that returns those from that one on. Then what an
            interrupted (or killed) writer has done is kept, and the next continues it, if it is of the same origin; of
            several at a time one writes, and the others wait for it.
        image_shape: ``(channels, height, width)``.
        origin: anything worth keeping about where the images came from (JSON values).

    Returns:
        ``folder``.

    Raises:
        DataError: the disk is full, the folder cannot be written, or the classes do not fit ``image_shape``.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _kept_workplace(folder) if callable(classes) else _fresh_workplace(folder) as workplace:
            if not folder.exists():
                _fill(workplace, classes, image_shape, origin)
                workplace.chmod(0o755)  # mkdtemp gives 0700, but a cache may be shared
                _publish(workplace, folder)
    except OSError as error:
        full = error.errno in {errno.ENOSPC, getattr(errno, "EDQUOT", None)}
        remedy = "free some space, or set" if full else "make it writable, or set"
        raise DataError(
            f"cannot write the packed images to {folder}: {error.strerror or error}; {remedy} QUICKSTUDY_CACHE to a "
            "folder elsewhere, and try again"
        ) from error
    return folder


def open_store(folder: Path, title: str) -> ImageClasses:
    """Open a packed store; the images stay on disk (a private memory map) until they are used.

    Args:
        folder: the folder of the store.
        title: what error messages call its classes.

    Raises:
        DataError: there is no store there, or it is damaged, truncated, or of another format.
    """
    index = read_index(folder)
    names, offsets = index.get("names"), np.asarray(index.get("offsets"))
    try:
        # Copy-on-write, because a read-only array makes torch.from_numpy warn; nothing is ever written to it.
        images = np.load(folder / IMAGES, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(folder, f"{IMAGES}: {error}") from error
    if not isinstance(names, list) or offsets.dtype.kind != "i" or offsets.shape != (len(names) + 1,):
        raise _damaged(folder, f"{INDEX} does not say where each class begins")
    if images.dtype != np.uint8 or images.ndim != 4:
        raise _damaged(folder, f"{IMAGES} holds {images.dtype} {images.shape}, not uint8 [n, channels, height, width]")
    if offsets[0] != 0 or offsets[-1] != len(images) or (np.diff(offsets) < 0).any():
        raise _damaged(folder, f"{INDEX} speaks of {offsets[-1]} images, {IMAGES} holds {len(images)}")
    return ImageClasses.from_offsets(torch.from_numpy(images), offsets, names, title)


def read_index(folder: Path) -> dict[str, Any]:
    """Return ``index.json`` of a store: ``format``, ``names``, ``offsets``, ``origin`` and maybe ``unreadable``.

    Raises:
        DataError: there is none, or it cannot be understood.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{INDEX}: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else None
        raise _damaged(folder, f"it has format {found}, and this version of quickstudy reads format {FORMAT}")
    return index


@contextmanager
def _fresh_workplace(folder: Path) -> Iterator[Path]:
    """Give a folder to write in that is gone afterwards, whatever happens."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _kept_workplace(folder: Path) -> Iterator[Path]:
    """Give a folder to write in that the next writer gets again, unless it has become the store; one writer at a time.

    The system gives a lock back when its holder dies. Where it has none, every writer begins afresh.
    """
    workplace, lock = (folder.parent / f".{folder.name}.{ending}" for ending in ("part", "lock"))
    with open(lock, "w") as file:
        if _locked(file):
            workplace.mkdir(exist_ok=True)
            yield workplace
            shutil.rmtree(workplace, ignore_errors=True)  # if another's store was there before
        else:
            with _fresh_workplace(folder) as temporary:
                yield temporary
    with suppress(OSError):
        lock.unlink()  # not after a failure, when another may hold it


def _locked(file: TextIO) -> bool:
    """Wait for the lock of an open file, and return whether there are locks here."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # some file systems of networks know no locks
        return False
    return True


def _fill(
    folder: Path, classes: Classes | Callable[[int], Classes], shape: tuple[int, ...], origin: Mapping[str, Any]
) -> None:
    resumable = callable(classes)
    done = _read_journal(folder, [FORMAT, list(shape), dict(origin)])
    with (
        open(folder / IMAGES, "r+b" if done else "wb") as file,
        open(folder / JOURNAL, "a", encoding="utf-8") as journal,
    ):
        header = _write_header(file, 0, shape)
        file.truncate(header + prod(shape) * sum(count for _, count, _ in done))
        file.seek(0, os.SEEK_END)
        for item in classes(len(done)) if callable(classes) else classes:
            name, images, unreadable = item if isinstance(item, Packed) else Packed(*item)
            if images.dtype != np.uint8 or images.shape[1:] != shape:
                raise DataError(f"class {name!r} has images {images.dtype} {images.shape[1:]}, not uint8 {shape}")
            file.write(np.ascontiguousarray(images).data)
            done.append((name, len(images), list(unreadable)))
            if resumable:
                _to_disk(file)  # before the journal says so
                journal.write(json.dumps(done[-1]) + "\n")
                journal.flush()
        offsets = [0, *accumulate(count for _, count, _ in done)]
        file.seek(0)
        # numpy leaves room in the header for the first axis to grow, so the second header is as long as the first.
        if _write_header(file, offsets[-1], shape) != header:
            raise AssertionError("numpy's header changed its length")
        _to_disk(file)
    index = {
        "format": FORMAT,
        "origin": dict(origin),
        "names": [name for name, _, _ in done],
        "offsets": offsets,
        "unreadable": [image for _, _, unreadable in done for image in unreadable],
    }
    with open(folder / INDEX, "wb") as file:
        file.write(json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode())
        _to_disk(file)
    (folder / JOURNAL).unlink()


def _read_journal(folder: Path, beginning: list[Any]) -> list[tuple[str, int, list[str]]]:
    """Return name, count of images and unreadable ones of the classes that are done, and drop a line that is cut off.

    If there is no journal, or one with another first line than ``beginning``, one that begins so is written.
    """
    path, done = folder / JOURNAL, []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    first = json.dumps(beginning) + "\n"
    if lines[:1] == [first]:
        for line in lines[1:]:
            if not line.endswith("\n"):
                break
            done.append(tuple(json.loads(line)))
    path.write_text("".join([first, *lines[1 : 1 + len(done)]]), encoding="utf-8")
    return done


def _write_header(file: BinaryIO, count: int, shape: tuple) -> int:
    description = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, description)
    return file.tell()


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _publish(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / INDEX).is_file():  # if it is there, another process was faster, and its store is as good
            raise


def _damaged(folder: Path, reason: str) -> DataError:
    return DataError(
        f"the packed images in {folder} are damaged or of another version ({reason}); remove that folder, and they "
        "will be made again"
    )
