"""Your own data: folders and lists of images, arrays, any PyTorch dataset. None of it has to be registered."""

from __future__ import annotations

import hashlib
import json
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from quickstudy.data.archive import Member, open_files
from quickstudy.data.base import SPLITS, Dataset, Split, TaskSource, check_split_name, split_title
from quickstudy.data.decode import Resize
from quickstudy.data.embeddings import grouped
from quickstudy.data.folders import ClassFolders
from quickstudy.data.layouts import Files, Layout, archive_files, class_files, read_table, split_folders
from quickstudy.data.paths import store_folder
from quickstudy.data.pictures import Picture
from quickstudy.data.splitting import draw_split, kept_split, split_of_each
from quickstudy.data.transformed import transformed
from quickstudy.data.transforms import Transform
from quickstudy.errors import DataError

Splits = str | dict[str, list[str]] | None
"""The classes of each split, a JSON file that keeps them, or ``None`` to have them drawn."""


class OwnImages(ClassFolders):
    """Your own images, packed again when a file or the split of a class has changed since; one object looks once.

    Photographs are turned as their EXIF orientation says.

    Args:
        name: what results call them.
        image_size, resize, train_transforms, test_transforms: as of
            :class:`~quickstudy.data.folders.ClassFolders`.
    """

    version: ClassVar[int] = 2
    upright: ClassVar[bool] = True  # as pictures to predict are

    def __init__(
        self,
        name: str,
        image_size: int = 84,
        resize: Resize = "squash",
        train_transforms: list[Transform] | None = None,
        test_transforms: list[Transform] | None = None,
    ) -> None:
        self.name = name
        super().__init__(image_size, resize, train_transforms, test_transforms)

    @abstractmethod
    def read(self) -> tuple[str, Files]:
        """Return where the images are, in words, and those of every class of every split.

        Raises:
            DataError: there are none, or they are not split.
        """

    @property
    def remedy(self) -> str:
        """What the message on an image that cannot be read says besides: nothing, for these are yours to put right."""
        return ""

    @property
    def store(self) -> Path:
        """The folder of the packed images, whether they are there or not; another for other files or splits."""
        return store_folder(f"{self.name}-{self.image_size}-{self.resize}-v{self.version}-{self._mark}")

    def source(self) -> tuple[Path, Layout]:
        """Return the images with how they are laid out.

        Raises:
            DataError: there are none, or they are not split.
        """
        title, files = self._found
        return Path(self.name), Layout(title, lambda place: place, lambda place: files)

    @cached_property
    def _found(self) -> tuple[str, Files]:
        return self.read()

    @cached_property
    def _mark(self) -> str:
        _, files = self._found
        listed = [
            [split, name, [_state(picture) for picture in pictures]]
            for split in SPLITS
            for name, pictures in files[split].items()
        ]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:12]


def _state(picture: Picture) -> tuple[str, int, int]:
    """Return name, size and time of the last change of the file in which a picture lies."""
    path = picture if isinstance(picture, Path) else picture.files.path if isinstance(picture, Member) else picture.path
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; add or remove it") from error
    return str(picture), state.st_size, state.st_mtime_ns


class ImageFolder(OwnImages):
    """Your own images, a folder for every class.

    Classes that lie in ``train/``, ``val/`` and ``test/`` are split so. All others are split as ``splits`` says; if it
    says nothing, the split is drawn (60, 20 and 20 % of the classes), and kept in a file beside the folder,
    ``<root>.splits.json``. That file is never changed: a class that comes or goes is an error.

    Args:
        root: folder or zip archive with a folder of images for every class, or with ``train/``, ``val/`` and ``test/``
            of such; or a list of images, ``.csv``, with the columns ``path`` (seen from the list) and ``label``.
        splits: ``{"train": [...], "val": [...], "test": [...]}``, or a JSON file with that; the file is made if it is
            not there.
        seed: of the draw.
        image_size, resize, train_transforms, test_transforms: as of
            :class:`~quickstudy.data.folders.ClassFolders`.
    """

    def __init__(
        self,
        root: str,
        splits: Splits = None,
        seed: int = 0,
        image_size: int = 84,
        resize: Resize = "squash",
        train_transforms: list[Transform] | None = None,
        test_transforms: list[Transform] | None = None,
    ) -> None:
        self.path = Path(root).expanduser().absolute()
        self.splits = f"{self.path}.splits.json" if splits is None else splits
        self.seed = seed
        name = self.path.stem if self.path.suffix in (".zip", ".csv") else self.path.name
        super().__init__(name, image_size, resize, train_transforms, test_transforms)

    def read(self) -> tuple[str, Files]:
        """Return where the images are, in words, and those of every class of every split.

        Raises:
            DataError: there are none, they are not split, or the splits are of other classes.
        """
        path = self.path
        there = [split for split in SPLITS if (path / split).is_dir()]
        if len(there) > 1:
            if len(there) < len(SPLITS):
                raise DataError(
                    f"{path} has {' and '.join(there)}, and needs train, val and test: add what is missing, with "
                    "classes of its own; or put the folders of all classes into one, and they will be split"
                )
            return f"train/, val/ and test/ in {path}", split_folders(()).files(path)
        if path.suffix == ".csv":
            return f"listed in {path}", self._split(_listed(path))
        if path.is_dir():
            return f"class folders in {path}", self._split(class_files(path))
        if not path.exists():
            raise DataError(
                f"there is no {path} (from {Path.cwd()}): give the folder of your images, or an archive of it"
            )
        archive = open_files(path)
        files: Files = {split: archive_files(archive, (split,)) for split in SPLITS}
        if all(files.values()):
            return f"train/, val/ and test/ in {path}", files
        return f"class folders in {path}", self._split(archive_files(archive, ()))

    def _split(self, classes: Mapping[str, Sequence[Picture]]) -> Files:
        if not classes:
            raise DataError(f"{self.path} has no images in folders of classes: add some, or choose another root")
        return by_split(classes, self.splits, self.seed, self.name)


class ImageList(OwnImages):
    """Your own images, as a list of files with their labels.

    Args:
        images: pairs: path and label of each image.
        splits: ``{"train": [...], "val": [...], "test": [...]}``, or a JSON file with that, which is made if it is not
            there; if not given, 60, 20 and 20 % of the classes are drawn.
        seed: of the draw.
        name: what results call them.
        image_size, resize, train_transforms, test_transforms: as of
            :class:`~quickstudy.data.folders.ClassFolders`.
    """

    def __init__(
        self,
        images: list[tuple[str, str]],
        splits: Splits = None,
        seed: int = 0,
        name: str = "images",
        image_size: int = 84,
        resize: Resize = "squash",
        train_transforms: list[Transform] | None = None,
        test_transforms: list[Transform] | None = None,
    ) -> None:
        self.images = [*images]
        if any(isinstance(image, str | Path) or len(image) != 2 for image in self.images):
            raise DataError(f"{name}: a list of images is one of pairs, each the path of an image and its label")
        self.splits = splits
        self.seed = seed
        super().__init__(name, image_size, resize, train_transforms, test_transforms)

    def read(self) -> tuple[str, Files]:
        """Return what they are, in words, and those of every class of every split.

        Raises:
            DataError: there are none, or the splits are of other classes.
        """
        classes: dict[str, list[Path]] = {}
        for path, label in self.images:
            classes.setdefault(str(label), []).append(Path(path).expanduser())
        return f"{len(self.images):,} listed images", by_split(classes, self.splits, self.seed, self.name)


def _listed(path: Path) -> dict[str, list[Path]]:
    classes: dict[str, list[Path]] = {}
    for name, label in read_table(path, ("path", "label")):
        classes.setdefault(label, []).append(path.parent / name)
    return classes


def by_split(classes: Mapping[str, Sequence[Picture]], splits: Splits, seed: int, title: str) -> Files:
    """Return the classes of each split.

    Args:
        classes: the pictures of each.
        splits: which is in which split.
        seed: of a draw, if that is not said.
        title: what messages call them.

    Raises:
        DataError: the splits are of other classes.
    """
    known = splits_of(classes, splits, seed, title)
    return {split: {name: own for name, own in classes.items() if known[name] == split} for split in SPLITS}


def splits_of(names: Iterable[str], splits: Splits, seed: int, title: str) -> dict[str, Split]:
    """Return the split of each class, as given, as kept in a file, or as drawn.

    Raises:
        DataError: the splits are of other classes.
    """
    if splits is None:
        return draw_split(names, seed)
    if isinstance(splits, str):
        return kept_split(Path(splits).expanduser(), names, seed)
    return split_of_each(splits, names, title)


class Arrays(Dataset):
    """Your own examples, in memory.

    Args:
        x: images, uint8 ``[n, H, W]``, or ``[n, H, W, C]`` or ``[n, C, H, W]`` of 1 or 3 channels, which tasks hold as
            floats in [0, 1]; or any numbers ``[n, ...]``, which tasks hold as float32, and as they are. What has
            learned from square images in uint8 also predicts image files.
        y: the class of each, ``[n]``: numbers or names.
        splits: ``{"train": [...], "val": [...], "test": [...]}``, with the classes as text, or a JSON file with that,
            which is made if it is not there; if not given, 60, 20 and 20 % of the classes are drawn.
        seed: of the draw.
        name: what results call them.
        train_transforms: applied in turn to the images of meta-training tasks, support and query alike.
        test_transforms: the same for meta-validation and meta-test tasks.

    Raises:
        DataError: the arrays do not fit together, or the splits are of other classes.
    """

    name = "arrays"

    def __init__(
        self,
        x: Any,
        y: Any,
        splits: Splits = None,
        seed: int = 0,
        name: str = "arrays",
        train_transforms: list[Transform] | None = None,
        test_transforms: list[Transform] | None = None,
    ) -> None:
        self.name = name
        self.x = examples(x, name)
        self.image_size = self.x.shape[-1]
        self.pictures = self.x.dtype == torch.uint8 and self.x.shape[-2] == self.image_size
        labels = y.tolist() if isinstance(y, np.ndarray | Tensor) else [*y]
        if any(isinstance(label, Sequence | np.ndarray) and not isinstance(label, str | bytes) for label in labels):
            raise DataError(f"{name}: the classes are to be [n], numbers or names, one for each example")
        self.y = [str(label) for label in labels]
        if len(self.x) != len(self.y):
            raise DataError(f"{name}: there is a class for each example; got {len(self.x)} and {len(self.y)}")
        self.split_of = splits_of(self.y, splits, seed, name)
        self.train_transforms = train_transforms or []
        self.test_transforms = test_transforms or []

    @classmethod
    def from_dataset(cls, dataset: Iterable[tuple[Any, Any]], **settings: Any) -> Arrays:
        """Return all examples of a PyTorch dataset, or of any other pairs of an example and its class.

        Args:
            dataset: its examples are tensors, arrays or Pillow images, all of one shape.
            settings: the arguments of this class but ``x`` and ``y``.

        Raises:
            DataError: they are not of one shape, or not at least one.
        """
        indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        items = (dataset[i] for i in range(len(dataset))) if indexed else dataset  # type: ignore
        x, y = [], []
        for item in items:
            if not isinstance(item, Sequence) or len(item) != 2:
                raise DataError("the items of a dataset are to be pairs, each an example and its class")
            example, label = item
            x.append(example if isinstance(example, Tensor) else torch.from_numpy(np.array(example)))
            y.append(label.item() if isinstance(label, Tensor | np.generic) else label)
        shapes = sorted({tuple(example.shape) for example in x})
        if len(shapes) != 1:
            few = ", ".join(map(str, shapes[:3])) or "none"
            raise DataError(f"the examples of a dataset are to be of one shape; got {few}: resize or crop them")
        return cls(torch.stack(x), y, **settings)

    def split(self, split: Split) -> TaskSource:
        """Return the classes of one split, in the order in which they are first seen.

        Raises:
            DataError: there is no such split.
        """
        check_split_name(split)
        rows = [row for row, label in enumerate(self.y) if self.split_of[label] == split]
        classes = grouped(self.x[rows], [self.y[row] for row in rows], split_title(self.name, split))
        return transformed(classes, self.train_transforms if split == "train" else self.test_transforms)

    def location(self) -> str:
        """Say that they are in memory."""
        return "in memory"


class ArrayFile(Dataset):
    """Your own examples, in a file of NumPy: ``numpy.savez("mine.npz", x=x, y=y)``; read when it is first used.

    Args:
        path: of the file; ``x`` and ``y`` are as of :class:`Arrays`.
        splits: ``{"train": [...], "val": [...], "test": [...]}``, with the classes as text, or a JSON file with that;
            if not given, the split is drawn and kept in ``<path>.splits.json``, which is never changed.
        seed, train_transforms, test_transforms: as of :class:`Arrays`.
    """

    name = "arrays"

    def __init__(
        self,
        path: str,
        splits: Splits = None,
        seed: int = 0,
        train_transforms: list[Transform] | None = None,
        test_transforms: list[Transform] | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        self.name = self.path.stem
        self.splits = f"{self.path}.splits.json" if splits is None else splits
        self.seed = seed
        self.train_transforms = train_transforms or []
        self.test_transforms = test_transforms or []

    @cached_property
    def _arrays(self) -> Arrays:
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                x, y = arrays["x"], arrays["y"]
        except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile, zlib.error) as error:
            raise DataError(f"cannot read {self.path}: {error}; write it by numpy.savez(path, x=x, y=y)") from error
        return Arrays(x, y, self.splits, self.seed, self.name, self.train_transforms, self.test_transforms)

    def split(self, split: Split) -> TaskSource:
        """Return the classes of one split, in the order in which they are first seen.

        Raises:
            DataError: there is no such split, the file cannot be read, or the splits are of other classes.
        """
        return self._arrays.split(split)

    @property
    def pictures(self) -> bool:  # type: ignore[override]
        """Whether they are images in bytes, and square."""
        return self._arrays.pictures

    @property
    def image_size(self) -> int:
        """Height and width, before any transform."""
        return self._arrays.image_size

    def location(self) -> str | None:
        """Return in words where the file is, or ``None`` if it is not there."""
        return f"in {self.path}" if self.path.is_file() else None


def examples(x: Any, title: str) -> Tensor:
    """Return examples as tasks are made of them: images uint8 ``[n, C, H, W]``, or float32 ``[n, ...]``."""
    try:
        found = torch.as_tensor(x if isinstance(x, Tensor) else np.asarray(x)).cpu()
    except (TypeError, ValueError) as error:
        raise DataError(f"{title}: the examples are to be numbers of one shape: {error}") from error
    if found.dim() < 2 or not len(found) or found.is_complex():
        raise DataError(f"{title}: the examples are to be [n, ...], at least one; got {[*found.shape]}, {found.dtype}")
    if found.dtype != torch.uint8 or found.dim() not in (3, 4):
        return found.to(torch.float32)
    if found.dim() == 3:
        found = found[:, None]
    if found.shape[1] not in (1, 3) and found.shape[3] in (1, 3):
        found = found.movedim(3, 1)
    if found.shape[1] not in (1, 3):
        raise DataError(
            f"{title}: images in uint8 are [n, H, W], [n, H, W, C] or [n, C, H, W] with 1 or 3 channels; got "
            f"{[*found.shape]}: leave transparency out (x[..., :3]), or give floats, which are taken as they are"
        )
    return found.contiguous()
