"""Where data lives on this machine."""

from __future__ import annotations

import hashlib
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


def store_folder(name: str, root: str | None = None) -> Path:
    """Return the folder of one packed store; one made from a ``root`` that the user has named is not the common one."""
    mark = ""
    if root is not None:
        path = os.path.abspath(os.path.expanduser(root))
        mark = f"-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    return cache_folder() / "stores" / f"{name}{mark}"


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
