"""CUB-200-2011 (Wah et al., 2011): photographs of 200 species of birds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from quickstudy.data.base import Split
from quickstudy.data.folders import ClassFolders, Files, class_files
from quickstudy.errors import DataError

CLASS = re.compile(r"(\d{3})\..+")
"""The folder of a class: its number, and its name."""


class CUB(ClassFolders):
    """CUB-200-2011: 200 species, 11,788 photographs; 100 / 50 / 50 for meta-training / validation / test.

    The species of an odd number are to train on; of the even ones, every other (2, 6, 10, ...) is to validate on and
    the rest (4, 8, 12, ...) to test on, as in Chen et al. (2019), "A closer look at few-shot classification". The files
    lie as in the official archive, ``CUB_200_2011/images/001.Black_footed_Albatross/*.jpg``; each place is searched for
    ``CUB_200_2011/images/`` and ``images/``. Fewer classes will do. The few grey photographs become RGB. The arguments
    are those of :class:`~quickstudy.data.folders.ClassFolders`.
    """

    name = "cub"
    layout: ClassVar[str] = "CUB_200_2011/images/, with a folder like 001.Black_footed_Albatross/ for every class,"

    @classmethod
    def find(cls, place: Path) -> Path | None:
        """Return the folder ``images/``, or ``None``; a folder of that name without numbered classes is not it."""
        for images in (place / "CUB_200_2011" / "images", place / "images"):
            if any(images.glob("[0-9][0-9][0-9].*")):
                return images
        return None

    @classmethod
    def files(cls, folder: Path) -> Files:
        """Return the image files of every class of every split.

        Raises:
            DataError: a folder is not named like a class, or cannot be read.
        """
        files: Files = {"train": {}, "val": {}, "test": {}}
        for name, images in class_files(folder).items():
            files[split_of(name, folder)][name] = images
        return files


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
