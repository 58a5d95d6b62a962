"""Where data lives on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from quickstudy.files import cache_folder


def user_folder() -> Path | None:
    """Return the folder of the user's own copies, ``QUICKSTUDY_DATA``: it is read, and never written to."""
    value = os.environ.get("QUICKSTUDY_DATA")
    return Path(value).expanduser() if value else None


def download_folder(dataset: str) -> Path:
    """Return the folder of the files of one dataset as they were downloaded."""
    return cache_folder() / "downloads" / dataset


def store_folder(name: str) -> Path:
    """Return the folder of one packed store."""
    return cache_folder() / "stores" / name


def source_folders(dataset: str, root: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return the folders in which raw files of a dataset are looked for, best first.

    Args:
        dataset: name of the dataset.
        root: the one folder to look in, if the user has named it.
    """
    if root is not None:
        return [Path(root).expanduser()]
    own = user_folder()
    return [*([own / dataset, own] if own else []), download_folder(dataset)]
