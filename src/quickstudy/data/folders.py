"""Datasets of photographs that lie on the disk as folders of image files, a folder for each class."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import resources
from pathlib import Path
from typing import ClassVar, get_args

import numpy as np

from quickstudy.data.archive import Member
from quickstudy.data.base import SPLITS, Dataset, Split, TaskSource, split_title
from quickstudy.data.decode import Resize, decode_image, square
from quickstudy.data.images import ImageClasses
from quickstudy.data.paths import source_folders, store_folder
from quickstudy.data.progress import track
from quickstudy.data.registry import dataset_entry
from quickstudy.data.store import open_store, write_store
from quickstudy.data.transformed import transformed
from quickstudy.data.transforms import Transform
from quickstudy.errors import DataError

VERSION = 1
"""Raised with every change that changes a pixel of the packed stores."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Endings of image files, in small letters; other files are ignored."""

Files = Mapping[Split, Mapping[str, Sequence[Path | Member]]]
"""The image files of every class of every split."""


class ClassFolders(Dataset):
    """A dataset of colour photographs in folders of classes, decoded and packed once.

    A subclass says where such a folder is and which of its classes are in which split. What has been packed stays as
    it is when the files change: remove the packed folder, which :meth:`location` names, to pack them again.

    Args:
        image_size: height and width of the packed images, in pixels.
        resize: how photographs become squares. ``"squash"``: both sides to ``image_size``, whatever the aspect (as
            Ravi and Larochelle, 2017, and Huisman et al., 2023). ``"crop"``: the shorter side to ``image_size``, then
            the central square. Both with Pillow's bilinear filter, which averages over all that a new pixel covers.
        train_transforms: applied in turn to the images of meta-training tasks, support and query alike.
        test_transforms: the same for meta-validation and meta-test tasks.
        root: folder that holds the data; if not given, ``$QUICKSTUDY_DATA/<name of the dataset>``,
            ``$QUICKSTUDY_DATA``, and the folder of downloads in the cache.
    """

    layout: ClassVar[str]
    """What is looked for, in words."""

    def __init__(
        self,
        image_size: int = 84,
        resize: Resize = "squash",
        train_transforms: list[Transform] | None = None,
        test_transforms: list[Transform] | None = None,
        root: str | None = None,
    ) -> None:
        if image_size < 1:
            raise DataError(f"{self.name}: image_size is at least 1 pixel; got {image_size}")
        if resize not in get_args(Resize):
            raise DataError(f"{self.name}: resize is 'squash' or 'crop', not {resize!r}")
        self.image_size = image_size
        self.resize: Resize = resize
        self.train_transforms = train_transforms or []
        self.test_transforms = test_transforms or []
        self.root = root

    @classmethod
    @abstractmethod
    def find(cls, place: Path) -> Path | None:
        """Return the folder (or archive) of the data: ``place``, or one in it, or ``None`` if there is none."""

    @classmethod
    @abstractmethod
    def files(cls, folder: Path) -> Files:
        """Return the image files of every class of every split, classes and files in order of name.

        Args:
            folder: as :meth:`find` found it.

        Raises:
            DataError: the folder cannot be read, or a class is not where it should be.
        """

    def split(self, split: Split) -> TaskSource:
        """Return the tasks of one split; without transforms its :class:`ImageClasses`, uint8 ``[n, 3, size, size]``.

        Raises:
            DataError: the data is not on this machine, or damaged.
        """
        everything = open_store(self.prepare(), self.name)
        classes = classes_of_split(everything, split, split_title(self.name, split))
        return transformed(classes, self.train_transforms if split == "train" else self.test_transforms)

    def location(self) -> str | None:
        """Return in words where the packed images or the image files are, or ``None`` if nowhere."""
        if self._folder.exists():
            return f"packed in {self._folder}"
        try:
            return f"{self._source()}; packed at first use"
        except DataError:
            return None

    def prepare(self) -> Path:
        """Decode and pack all images, unless that has been done, and return the folder of the packed store.

        Raises:
            DataError: the data is not on this machine, a split has no classes, an image cannot be read, or the cache
                cannot be written.
        """
        folder = self._folder
        if folder.exists():
            return folder
        source = self._source()
        files = self.files(source)
        for split in SPLITS:
            if not files[split]:
                raise DataError(
                    f"{split_title(self.name, split)}: there are none in {source}; expected {self.layout}. "
                    "The copy is not complete: add what is missing"
                )
        classes = read_classes(
            {f"{split}/{name}": files[split][name] for split in SPLITS for name in files[split]},
            self.image_size,
            self.resize,
            f"packing {self.name} at {self.image_size}×{self.image_size}",
        )
        origin = {"dataset": self.name, "version": VERSION, "resize": self.resize, "source": str(source)}
        return write_store(folder, classes, (3, self.image_size, self.image_size), origin)

    @classmethod
    def get(cls) -> None:
        """Do nothing if the data is here; it cannot be downloaded.

        Raises:
            DataError: it is not; the message says what to fetch, and where to put it.
        """
        dataset = cls()
        if not dataset._folder.exists():
            dataset._source()

    @property
    def _folder(self) -> Path:
        return store_folder(f"{self.name}-{self.image_size}-{self.resize}-v{VERSION}", self.root)

    def _source(self) -> Path:
        """Return the folder of the data, from the first place that has it."""
        places = source_folders(self.name, self.root)
        for place in places:
            folder = self.find(place)
            if folder is not None:
                return folder
        looked = "".join(f"\n  {place}" for place in places)
        raise DataError(
            f"{self.name}: {self.layout} is in none of these folders:{looked}\n{dataset_entry(self.name).how}"
        )


def classes_of_split(everything: ImageClasses, split: Split, title: str) -> ImageClasses:
    """Return the classes named ``"<split>/<name>"``, as ``"<name>"``; they lie one after the other.

    The images are a view of their own part of the array, so that moving them to a device moves no other split.
    """
    prefix = f"{split}/"
    members = [i for i, name in enumerate(everything.names) if name.startswith(prefix)]
    starts, counts = everything.starts[members], everything.counts[members]
    first, last = int(starts[0]), int(starts[-1] + counts[-1])
    names = tuple(everything.names[i].removeprefix(prefix) for i in members)
    return ImageClasses(everything.images[first:last], starts - first, counts, names, title)


@cache
def published_split(title: str) -> dict[str, Split]:
    """Return the split of each class of a dataset, from the list of that title that comes with the library."""
    text = (resources.files("quickstudy.data") / "splits" / f"{title}.json").read_text(encoding="utf-8")
    names = json.loads(text)
    return {name: split for split in SPLITS for name in names[split]}


def check_split(files: Files, known: Mapping[str, Split], title: str, whose: str) -> None:
    """Raise unless every class is in one split only, and a known one in its own.

    Args:
        files: of every class of every split.
        known: the published split of each class; others may be in any.
        title: what messages call the data, such as ``"miniimagenet: /data/miniImagenet"``.
        whose: split it is, such as ``"Ravi and Larochelle's"``.

    Raises:
        DataError: the message names the classes.
    """
    placed: list[tuple[Split, str]] = [(split, name) for split in SPLITS for name in files[split]]
    wrong = [f"{split}/{name} belongs in {known[name]}/" for split, name in placed if known.get(name, split) != split]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(
            f"{title} has {len(wrong)} classes in another split than {whose}: {'; '.join(wrong[:5])}{more}; "
            "move their folders"
        )
    seen: dict[str, Split] = {}
    for split, name in placed:
        if name in seen:
            raise DataError(
                f"{title} has the class {name} in both {seen[name]}/ and {split}/, and no class may be in two splits: "
                "remove one of its folders"
            )
        seen[name] = split


def class_files(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of each folder in ``folder``; classes and files in order of name, hidden ones ignored.

    Raises:
        DataError: a folder cannot be read, or has no image.
    """
    try:
        found = {
            entry.name: sorted(
                file for file in entry.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
            )
            for entry in sorted(folder.iterdir())
            if entry.is_dir() and not entry.name.startswith(".")
        }
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror}; make it readable") from error
    for name, files in found.items():
        if not files:
            raise DataError(f"{folder / name} has no image ({', '.join(SUFFIXES)}): fill it or remove it")
    return found


def read_classes(
    classes: Mapping[str, Sequence[Path | Member]], side: int, resize: Resize, title: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and images, uint8 ``[count, 3, side, side]``, of one class after the other.

    Args:
        classes: the image files of each class.
        side: height and width of the images, in pixels.
        resize: how they become square.
        title: a few words in front of the progress bar.

    Raises:
        DataError: an image cannot be read; the message names its file.
    """
    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter while it decodes and resizes
        for name in track(classes, title):
            images = pool.map(lambda file: read_image(file, side, resize), classes[name])
            yield name, np.stack(list(images))


def read_image(file: Path | Member, side: int, resize: Resize) -> np.ndarray:
    """Return an image file in RGB, uint8 ``[3, side, side]``.

    Raises:
        DataError: it cannot be read, or is damaged.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    picture = square(decode_image(content, str(file), mode="RGB"), side, resize)
    return np.asarray(picture).transpose(2, 0, 1)
