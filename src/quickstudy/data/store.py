"""The packed store: one dataset decoded once, as one array of bytes that is memory-mapped from then on.

A store is a folder of two files: ``images.npy`` (uint8 ``[n, channels, height, width]``, class after class) and
``index.json`` (the names of the classes, the row at which each begins, and what the store was made from).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from quickstudy.data.images import ImageClasses
from quickstudy.errors import DataError

FORMAT = 1
IMAGES, INDEX = "images.npy", "index.json"


def write_store(
    folder: Path,
    classes: Iterable[tuple[str, np.ndarray]],
    image_shape: tuple[int, int, int],
    origin: Mapping[str, Any],
) -> Path:
    """Write a packed store; either the whole of it becomes visible, or nothing.

    The classes are written as they come, so they need not fit in memory together. If another process has finished
    the same store first, that one stays.

    Args:
        folder: where; its parent is made.
        classes: name and images, uint8 ``[count, channels, height, width]``, of one class after the other.
        image_shape: ``(channels, height, width)``.
        origin: anything worth keeping about where the images came from (JSON values).

    Returns:
        ``folder``.

    Raises:
        DataError: the disk is full, the folder cannot be written, or the classes do not fit ``image_shape``.
    """
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        _fill(temporary, classes, image_shape, origin)
        temporary.chmod(0o755)  # mkdtemp gives 0700, but a cache may be shared
        _publish(temporary, folder)
    except OSError as error:
        full = error.errno in {errno.ENOSPC, getattr(errno, "EDQUOT", None)}
        remedy = "free some space, or set" if full else "make it writable, or set"
        raise DataError(
            f"cannot write the packed images to {folder}: {error.strerror or error}; {remedy} QUICKSTUDY_CACHE to a "
            "folder elsewhere, and try again"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
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
    """Return ``index.json`` of a store: ``format``, ``names``, ``offsets`` and ``origin``.

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


def _fill(folder: Path, classes: Iterable[tuple[str, np.ndarray]], shape: tuple, origin: Mapping[str, Any]) -> None:
    names: list[str] = []
    offsets = [0]
    with open(folder / IMAGES, "wb") as file:
        header = _write_header(file, 0, shape)
        for name, images in classes:
            if images.dtype != np.uint8 or images.shape[1:] != shape:
                raise DataError(f"class {name!r} has images {images.dtype} {images.shape[1:]}, not uint8 {shape}")
            file.write(np.ascontiguousarray(images).data)
            names.append(name)
            offsets.append(offsets[-1] + len(images))
        file.seek(0)
        # numpy leaves room in the header for the first axis to grow, so the second header is as long as the first.
        if _write_header(file, offsets[-1], shape) != header:
            raise AssertionError("numpy's header changed its length")
        _to_disk(file)
    index = {"format": FORMAT, "origin": dict(origin), "names": names, "offsets": offsets}
    with open(folder / INDEX, "wb") as file:
        file.write(json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode())
        _to_disk(file)


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
