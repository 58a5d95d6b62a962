"""CIFAR-FS (Bertinetto et al., 2019) and FC100 (Oreshkin et al., 2018): CIFAR-100, split for few-shot learning."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from quickstudy.data.archive import GIB, open_files
from quickstudy.data.arrays import cifar100_classes
from quickstudy.data.decode import Resize
from quickstudy.data.download import Remote
from quickstudy.data.folders import ClassFolders
from quickstudy.data.layouts import Files, Layout, Published, places_of, split_folders
from quickstudy.data.transforms import Transform

ARCHIVE = Remote(
    "cifar-100-python.tar.gz",
    "md5:eb9058c3a382ffc7106e4002c42a8d85",
    (
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz",
    ),
)


PARTS = ("train", "test", "meta")
"""Files of the folder that it unpacks to."""


def cifar100_archive(published: Published) -> Layout:
    """The official archive of CIFAR-100 for Python, or the folder that it unpacks to.

    Args:
        published: the split of its classes.
    """

    def find(place: Path) -> Path | None:
        for path in places_of(place, [ARCHIVE.name, "cifar-100-python"]):
            if (path.is_file() and path.name == ARCHIVE.name) or all((path / name).is_file() for name in PARTS):
                return path
        return None

    def files(path: Path) -> Files:
        with open_files(path, limit=GIB) as source:
            return published.apply(cifar100_classes(source), path)

    return Layout(f"{ARCHIVE.name}, or what it unpacks to", find, files)


def other_folders(layout: Layout, published: Published) -> Layout:
    """Class folders with another split of the same classes, all of which must be there.

    Args:
        layout: of these.
        published: the split to apply.
    """

    def files(path: Path) -> Files:
        classes = {name: pictures for own in layout.files(path).values() for name, pictures in own.items()}
        return published.apply(dict(sorted(classes.items())), path)

    return Layout(f"{layout.title}, split anew", layout.find, files)


class CIFARFS(ClassFolders):
    """CIFAR-FS: 100 classes, 600 photographs of 32x32 pixels of each; 64 / 16 / 20 to train, validate and test on.

    It is read from an archive ``cifar-fs.zip`` or a folder ``cifar-fs/`` with ``{train,val,test}/<class>/<image>``,
    where fewer classes will do; or from the official archive of CIFAR-100, ``cifar-100-python.tar.gz``, which
    ``quickstudy data get cifar-fs`` downloads. A class of Bertinetto et al.'s lists under another split than theirs is
    refused, because its results could not be compared with published ones. The arguments are those of
    :class:`~quickstudy.data.folders.ClassFolders`; ``root`` may also be the archive.
    """

    name = "cifar-fs"
    folders = ("cifar-fs", "cifar-100")
    published: ClassVar[Published] = Published("cifar-fs", "Bertinetto et al.'s")
    layouts: ClassVar[tuple[Layout, ...]] = (split_folders(("cifar-fs",), published), cifar100_archive(published))
    remotes = (ARCHIVE,)

    def __init__(
        self,
        image_size: int = 32,
        resize: Resize = "squash",
        train_transforms: list[Transform] | None = None,
        test_transforms: list[Transform] | None = None,
        root: str | None = None,
    ) -> None:
        super().__init__(image_size, resize, train_transforms, test_transforms, root)


class FC100(CIFARFS):
    """FC100: the 100 classes of CIFAR-100, of which 60 / 20 / 20 to train, validate and test on are of other kinds.

    It is read as :class:`CIFARFS` is, from ``fc100.zip`` or ``fc100/``, from the same official archive, or from the
    ``cifar-fs.zip`` or ``cifar-fs/`` of all 100 classes, which are split anew.
    """

    name = "fc100"
    folders = ("fc100", "cifar-100")
    published: ClassVar[Published] = Published("fc100", "Oreshkin et al.'s")
    layouts: ClassVar[tuple[Layout, ...]] = (
        split_folders(("fc100", "FC100"), published),
        cifar100_archive(published),
        other_folders(split_folders(("cifar-fs",), CIFARFS.published), published),
    )
