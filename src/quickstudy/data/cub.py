"""CUB-200-2011 (Wah et al., 2011): photographs of 200 species of birds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from quickstudy.data.archive import open_files
from quickstudy.data.base import Split
from quickstudy.data.download import Remote
from quickstudy.data.folders import ClassFolders
from quickstudy.data.layouts import Files, Layout, archive_files, class_files, places_of
from quickstudy.data.pictures import Picture
from quickstudy.errors import DataError

CLASS = re.compile(r"(\d{3})\..+")
"""The folder of a class: its number, and its name."""

ARCHIVE = Remote(
    "CUB_200_2011.tgz",
    "md5:97eceeb196236b17998738112f37df78",
    ("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",),
)


def _find_folder(place: Path) -> Path | None:
    """Return the folder ``images/``; one without numbered classes is not it."""
    for images in places_of(place, ("CUB_200_2011/images", "images")):
        if any(images.glob("[0-9][0-9][0-9].*/")):
            return images
    return None


def _find_archive(place: Path) -> Path | None:
    return next(
        (path for path in places_of(place, (ARCHIVE.name,)) if path.name == ARCHIVE.name and path.is_file()), None
    )


def _split(classes: Mapping[str, Sequence[Picture]], path: Path) -> Files:
    files: dict[Split, dict[str, Sequence[Picture]]] = {"train": {}, "val": {}, "test": {}}
    for name, images in classes.items():
        files[split_of(name, path)][name] = images
    return files


class CUB(ClassFolders):
    """CUB-200-2011: 200 species, 11,788 photographs; 100 / 50 / 50 for meta-training / validation / test.

    The species of an odd number are to train on; of the even ones, every other (2, 6, 10, ...) is to validate on and
    the rest (4, 8, 12, ...) to test on, as in Chen et al. (2019), "A closer look at few-shot classification". It is
    read from the official archive, ``CUB_200_2011.tgz``, which ``quickstudy data get cub`` downloads, or from what that
    unpacks to, ``CUB_200_2011/images/001.Black_footed_Albatross/*.jpg``: each place is searched for
    ``CUB_200_2011/images/`` and ``images/``, and fewer classes will do. The few grey photographs become RGB. The
    arguments are those of :class:`~quickstudy.data.folders.ClassFolders`; ``root`` may also be the archive.
    """

    name = "cub"
    layouts: ClassVar[tuple[Layout, ...]] = (
        Layout(
            "images/ with a folder like 001.Black_footed_Albatross for every class",
            _find_folder,
            lambda path: _split(class_files(path), path),
        ),
        Layout(
            ARCHIVE.name,
            _find_archive,
            lambda path: _split(archive_files(open_files(path), ("CUB_200_2011", "images")), path),
        ),
    )
    remotes = (ARCHIVE,)


def split_of(name: str, folder: Path) -> Split:
    """Return the split of a class.

    Args:
        name: of its folder, such as ``"001.Black_footed_Albatross"``.
        folder: in which that folder lies; for the message.

    Raises:
        DataError: the name has no number.
    """
    match = CLASS.fullmatch(name)
    if match is None:
        raise DataError(
            f"{CUB.name}: {folder / name} is not named like a class, such as 001.Black_footed_Albatross, and the "
            "number decides the split: rename or remove it"
        )
    number = int(match[1])
    return "train" if number % 2 else "val" if number % 4 == 2 else "test"
