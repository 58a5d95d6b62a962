"""Datasets of photographs, a class a folder or as they come, decoded and packed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import ClassVar, get_args

import numpy as np

from quickstudy.data.base import SPLITS, Dataset, Split, TaskSource, check_split_name, split_title
from quickstudy.data.decode import Resize
from quickstudy.data.download import Remote, fetch
from quickstudy.data.images import ImageClasses
from quickstudy.data.layouts import Layout
from quickstudy.data.paths import check_room, download_folder, source_folders, store_folder
from quickstudy.data.pictures import Picture, read_image
from quickstudy.data.progress import track
from quickstudy.data.registry import dataset_entry
from quickstudy.data.store import Packed, open_store, write_store
from quickstudy.data.transformed import transformed
from quickstudy.data.transforms import Transform
from quickstudy.errors import DataError


class ClassFolders(Dataset):
    """A dataset of colour photographs in folders of classes, or in another of its layouts, decoded and packed once.

    A subclass says in which layouts it may lie. What has been packed stays as it is when the files change: remove the
    packed folder, which :meth:`location` names, to pack them again.

    Args:
        image_size: height and width of the packed images, in pixels.
        resize: how photographs become squares. ``"squash"``: both sides to ``image_size``, whatever the aspect (as
            Ravi and Larochelle, 2017, and Huisman et al., 2023). ``"crop"``: the shorter side to ``image_size``, then
            the central square. Both with Pillow's bilinear filter, which averages over all that a new pixel covers.
        train_transforms: applied in turn to the images of meta-training tasks, support and query alike.
        test_transforms: the same for meta-validation and meta-test tasks.
        root: folder that holds the data; if not given, that of ``quickstudy data prepare``,
            ``$QUICKSTUDY_DATA/<name of the dataset>``, ``$QUICKSTUDY_DATA``, and the folder of downloads in the cache.
    """

    layouts: ClassVar[tuple[Layout, ...]]
    """What is looked for in each place, best first."""

    folders: ClassVar[tuple[str, ...]] = ()
    """Names under which copies are kept, if not that of the dataset alone; the last is that of downloads."""

    remotes: ClassVar[tuple[Remote, ...]] = ()
    """What ``quickstudy data get`` downloads."""

    version: ClassVar[int] = 1
    """Raised with every change that changes a pixel of the packed stores."""

    upright: ClassVar[bool] = False
    """Whether photographs are turned as their EXIF orientation says; published results were made without."""

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

    def split(self, split: Split) -> TaskSource:
        """Return the tasks of one split; without transforms its :class:`ImageClasses`, uint8 ``[n, 3, size, size]``.

        Raises:
            DataError: the data is not on this machine, or damaged.
        """
        check_split_name(split)
        everything = open_store(self.prepare(), self.name)
        classes = classes_of_split(everything, split, split_title(self.name, split))
        return transformed(classes, self.train_transforms if split == "train" else self.test_transforms)

    def location(self) -> str | None:
        """Return in words where the packed images or the image files are, or ``None`` if nowhere."""
        try:
            if self.store.exists():
                return f"packed in {self.store}"
            path, layout = self.source()
        except DataError:
            return None
        return f"{path} ({layout.title}); packed at first use"

    def prepare(self, *, skip: bool = False) -> Path:
        """Decode and pack all images, unless that has been done, and return the folder of the packed store.

        An interrupted packing is continued by the next.

        Args:
            skip: leave out images that cannot be read, and keep their names in the store; else they are an error.

        Raises:
            DataError: the data is not on this machine, a split has no classes, an image cannot be read, or the cache
                cannot be written.
        """
        folder = self.store
        if folder.exists():
            return folder
        path, layout = self.source()
        files = layout.files(path)
        for split in SPLITS:
            if not files[split]:
                raise DataError(
                    f"{split_title(self.name, split)}: there are none in {path}; expected {layout.title}. "
                    "The copy is not complete: add what is missing"
                )
        classes = {f"{split}/{name}": files[split][name] for split in SPLITS for name in files[split]}
        count = sum(map(len, classes.values()))
        check_room(folder, 3 * self.image_size**2 * count, f"the {count:,} packed images of {self.name}")
        listing = json.dumps([[name, [str(picture) for picture in pictures]] for name, pictures in classes.items()])
        origin = {
            "dataset": self.name,
            "version": self.version,
            "resize": self.resize,
            "source": str(path),
            "layout": layout.title,
            "unreadable": "left out" if skip else "refused",
            "listing": hashlib.sha256(listing.encode()).hexdigest(),
        }

        def packed(done: int) -> Iterator[Packed]:
            title = f"packing {self.name} at {self.image_size}×{self.image_size}"
            left = dict(islice(classes.items(), done, None))
            return read_classes(left, self.image_size, self.resize, title, skip, self.remedy, self.upright)

        return write_store(folder, packed, (3, self.image_size, self.image_size), origin)

    @classmethod
    def get(cls) -> None:
        """Download the data, unless it is here.

        Raises:
            DataError: no mirror has it, or none may have it; the message says what to fetch, and where to put it.
        """
        dataset = cls()
        if dataset.location() is None:
            if not cls.remotes:
                dataset.source()
            for remote in cls.remotes:
                fetch(remote, download_folder(cls._names()[-1]))

    @property
    def remedy(self) -> str:
        """What the message on an image that cannot be read says besides."""
        return f", or leave out what cannot be read: `quickstudy data prepare {self.name}`"

    @property
    def store(self) -> Path:
        """The folder of the packed images, whether they are there or not."""
        return store_folder(f"{self.name}-{self.image_size}-{self.resize}-v{self.version}", self.root)

    def source(self) -> tuple[Path, Layout]:
        """Return the folder or file of the data, from the first place that has it, and how it is laid out.

        Raises:
            DataError: no place has it; the message says what was looked for, where, and how to get it.
        """
        places = source_folders(self._names(), self.root)
        for place in places:
            for layout in self.layouts:
                path = layout.find(place)
                if path is not None:
                    return path, layout
        looked, wanted = (
            "".join(f"\n  {one}" for one in many) for many in (places, (layout.title for layout in self.layouts))
        )
        raise DataError(
            f"{self.name}: in none of these places{looked}\nis any of these{wanted}\n{dataset_entry(self.name).how}"
        )

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        return cls.folders or (cls.name,)


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


def read_classes(
    classes: Mapping[str, Sequence[Picture]],
    side: int,
    resize: Resize,
    title: str,
    skip: bool = False,
    remedy: str = "",
    upright: bool = False,
) -> Iterator[Packed]:
    """Yield name and images, uint8 ``[count, 3, side, side]``, of one class after the other.

    Args:
        classes: the pictures of each class.
        side: height and width of the images, in pixels.
        resize: how they become square.
        title: a few words in front of the progress bar.
        skip: leave out what cannot be read.
        remedy: what else can be done, for the message.
        upright: turn them as their EXIF orientation says.

    Raises:
        DataError: an image cannot be read, or with ``skip`` none of a class; the message names it.
    """

    def read(picture: Picture) -> np.ndarray | DataError:
        try:
            return read_image(picture, side, resize, upright)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter while it decodes and resizes
        for name in track(classes, title):
            found = list(pool.map(read, classes[name]))
            images = [image for image in found if isinstance(image, np.ndarray)]
            errors = [error for error in found if isinstance(error, DataError)]
            if errors and not (skip and images):
                raise DataError(f"{errors[0]}{remedy}") from errors[0]
            unreadable = [str(one) for one, image in zip(classes[name], found) if isinstance(image, DataError)]
            yield Packed(name, np.stack(images), unreadable)
