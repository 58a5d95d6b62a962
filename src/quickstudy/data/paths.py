"""Where data lives on this machine."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from quickstudy.errors import DataError
from quickstudy.files import cache_folder, write_text

PLACE = "place.txt"
"""Holds the path of the user's copy of a dataset, in the folder of its downloads."""


def user_folder() -> Path | None:
    """Return the folder of the user's own copies, ``QUICKSTUDY_DATA``: it is read, and never written to."""
    value = os.environ.get("QUICKSTUDY_DATA")
    return Path(value).expanduser() if value else None


def download_folder(dataset: str) -> Path:
    """Return the folder of the files of one dataset as they were downloaded."""
    return cache_folder() / "downloads" / dataset


def store_folder(name: str, root: str | None = None) -> Path:
    """Return the folder of one packed store; one made from a ``root`` that the user has named is not the common one."""
    mark = ""
    if root is not None:
        path = os.path.abspath(os.path.expanduser(root))
        mark = f"-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    return cache_folder() / "stores" / f"{name}{mark}"


def source_folders(datasets: str | Sequence[str], root: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return the places in which raw files of a dataset are looked for, best first.

    Args:
        datasets: name of the dataset; more names if copies may lie under those.
        root: the one place to look in, if the user has named it.
    """
    if root is not None:
        return [Path(root).expanduser()]
    names = [datasets] if isinstance(datasets, str) else datasets
    own = user_folder()
    places = [place for name in names if (place := remembered_place(name)) is not None]
    places += [*(own / name for name in names), own] if own else []
    return places + [download_folder(name) for name in names]


def remembered_place(dataset: str) -> Path | None:
    """Return the user's copy of a dataset that ``quickstudy data prepare`` was told of."""
    try:
        return Path((download_folder(dataset) / PLACE).read_text(encoding="utf-8"))
    except OSError:
        return None


def remember_place(dataset: str, place: Path) -> None:
    """Look for a dataset in this place first from now on.

    Raises:
        FileError: that cannot be kept.
    """
    write_text(download_folder(dataset) / PLACE, str(Path(place).expanduser().resolve()))


def check_room(path: Path, size: int, title: str) -> None:
    """Raise unless there is room on the disk.

    Args:
        path: of a file or folder to be written, which need not exist yet.
        size: in bytes.
        title: of what is to be written.

    Raises:
        DataError: there is less.
    """
    folder = next(one for one in path.absolute().parents if one.exists())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DataError(
            f"{title} take {size / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free at {folder}; free some space, or "
            "set QUICKSTUDY_CACHE to a folder elsewhere"
        )
