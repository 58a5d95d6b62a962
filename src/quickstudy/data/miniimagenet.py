"""miniImageNet (Vinyals et al., 2016) in the split of Ravi and Larochelle (2017)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from quickstudy.data.base import SPLITS, Split
from quickstudy.data.folders import ClassFolders, Files, check_split, class_files, published_split


class MiniImageNet(ClassFolders):
    """miniImageNet: 100 classes of ImageNet, 600 photographs of each; 64 / 16 / 20 to train, validate and test on.

    The files lie in ``{train,val,test}/<WordNet id>/``, and fewer classes will do. A class of Ravi and Larochelle's
    lists under another split than theirs is refused, because its results could not be compared with published ones.
    The folders are looked for in ``miniImagenet/`` and ``miniimagenet/`` of each place, and in the place itself. The
    arguments are those of :class:`~quickstudy.data.folders.ClassFolders`.
    """

    name = "miniimagenet"
    layout: ClassVar[str] = "a folder with train/, val/ and test/, each with a folder of images for every class,"

    @classmethod
    def find(cls, place: Path) -> Path | None:
        """Return the folder in which ``train/``, ``val/`` and ``test/`` lie, or ``None``."""
        candidates = (place / "miniImagenet", place / "miniimagenet", place)
        return next((path for path in candidates if all((path / split).is_dir() for split in SPLITS)), None)

    @classmethod
    def files(cls, folder: Path) -> Files:
        """Return the image files of every class of every split.

        Raises:
            DataError: a class is in another split than Ravi and Larochelle's, or in two, or a folder cannot be read.
        """
        files: Files = {split: class_files(folder / split) for split in SPLITS}
        check_split(files, ravi_split(), f"{cls.name}: {folder}", "Ravi and Larochelle's")
        return files


def ravi_split() -> dict[str, Split]:
    """Return the split of each of the 100 classes (WordNet ids), as in Ravi and Larochelle (2017)."""
    return published_split("miniimagenet-ravi")
