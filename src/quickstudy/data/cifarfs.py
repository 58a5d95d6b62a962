"""CIFAR-FS (Bertinetto et al., 2019): the classes of CIFAR-100, split for few-shot learning."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import ClassVar

from quickstudy.data.archive import GIB, Member, open_files
from quickstudy.data.base import SPLITS, Split
from quickstudy.data.decode import Resize
from quickstudy.data.folders import SUFFIXES, ClassFolders, Files, check_split, published_split
from quickstudy.data.transforms import Transform


class CIFARFS(ClassFolders):
    """CIFAR-FS: 100 classes, 600 photographs of 32x32 pixels of each; 64 / 16 / 20 to train, validate and test on.

    The files lie in ``{train,val,test}/<class>/``, in an archive ``cifar-fs.zip``, which is read as it is, or in a
    folder ``cifar-fs/``; fewer classes will do. A class of Bertinetto et al.'s lists under another split than theirs is
    refused, because its results could not be compared with published ones. The arguments are those of
    :class:`~quickstudy.data.folders.ClassFolders`; ``root`` may also be the archive.
    """

    name = "cifar-fs"
    layout: ClassVar[str] = "cifar-fs.zip, or a folder cifar-fs/, with {train,val,test}/<class>/<image>.webp|png|jpg,"

    def __init__(
        self,
        image_size: int = 32,
        resize: Resize = "squash",
        train_transforms: list[Transform] | None = None,
        test_transforms: list[Transform] | None = None,
        root: str | None = None,
    ) -> None:
        super().__init__(image_size, resize, train_transforms, test_transforms, root)

    @classmethod
    def find(cls, place: Path) -> Path | None:
        """Return the archive, or the folder in which ``train/``, ``val/`` and ``test/`` lie, or ``None``."""
        for archive in (place / "cifar-fs.zip", place):
            if archive.suffix == ".zip" and archive.is_file():
                return archive
        folders = (place / "cifar-fs", place)
        return next((path for path in folders if all((path / split).is_dir() for split in SPLITS)), None)

    @classmethod
    def files(cls, folder: Path) -> Files:
        """Return the image files of every class of every split.

        Raises:
            DataError: the archive cannot be read, or a class is in another split than Bertinetto et al.'s, or in two.
        """
        files: dict[Split, defaultdict[str, list[Member]]] = {split: defaultdict(list) for split in SPLITS}
        source = open_files(folder, limit=GIB)
        for name in sorted(source.names):
            path = PurePosixPath(name)
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                for split in SPLITS:
                    if path.parts[-3:-2] == (split,):
                        files[split][path.parent.name].append(Member(source, name))
        check_split(files, published_split("cifar-fs"), f"{cls.name}: {folder}", "Bertinetto et al.'s")
        return files
