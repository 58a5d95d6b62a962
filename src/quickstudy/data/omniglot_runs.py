"""Omniglot's one-shot runs (Lake et al., 2015): twenty fixed tasks, on which people were tested too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
import torch

from quickstudy.data.archive import GIB, Member, Source, open_files
from quickstudy.data.base import Dataset, Split
from quickstudy.data.download import Remote, fetch
from quickstudy.data.images import ImageClasses, unit_floats
from quickstudy.data.omniglot import read_ink
from quickstudy.data.paths import download_folder, source_folders, store_folder
from quickstudy.data.store import open_store, write_store
from quickstudy.errors import DataError
from quickstudy.task import Task, TaskShape

VERSION = 1
"""Raised with every change that changes a pixel of the packed store."""

RUNS = 20
WAY = 20

ARCHIVE = Remote(
    "all_runs.zip",
    None,  # no checksum has been published; what is read is checked for being complete
    (
        "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/one-shot-classification/all_runs.zip",
        "https://github.com/brendenlake/omniglot/raw/master/python/one-shot-classification/all_runs.zip",
    ),
)


@dataclass(frozen=True)
class Runs(ImageClasses):
    """The twenty tasks: task ``i`` is run ``i + 1``, whatever the seed; a class is its support image and its query."""

    def tasks(self, shape: TaskShape, start: int, stop: int, *, seed: int) -> Task:
        """Return runs ``start + 1 .. stop`` as tasks, images as float32 in [0, 1], examples ordered by class.

        Raises:
            DataError: these are not twenty tasks with twenty classes, one support image and one query of each.
        """
        if shape != TaskShape(WAY, 1, 1) or not 0 <= start < stop <= RUNS:
            raise DataError(
                f"{self.title}: there are {RUNS} tasks, each {WAY}-way 1-shot with one query a class, and no others: "
                f"test with --tasks {RUNS} --way {WAY} --shot 1 --queries 1"
            )
        rows = torch.arange(2 * WAY * start, 2 * WAY * stop, device=self.images.device)
        pairs = unit_floats(self.images[rows]).unflatten(0, (stop - start, WAY, 2))
        labels = torch.arange(WAY, device=self.images.device).expand(stop - start, -1)
        return Task(pairs[:, :, 0], labels, pairs[:, :, 1], labels, WAY)


class OmniglotRuns(Dataset):
    """Lake et al.'s one-shot classification: 20 runs, each within one alphabet, 20-way 1-shot, one query of each class.

    They are of evaluation characters: a model is to be trained on background characters alone (Omniglot's split
    ``background``). Lake et al. report 4.5 % errors of people.

    Args:
        image_size: height and width, in pixels.
        root: folder that holds ``all_runs.zip``, or ``all_runs/`` that it is unpacked in; if not given,
            ``$QUICKSTUDY_DATA/omniglot``, ``$QUICKSTUDY_DATA``, and what ``quickstudy data get omniglot-runs`` has
            downloaded.
    """

    name = "omniglot-runs"
    ink = True
    fixed: ClassVar[tuple[int, TaskShape] | None] = (RUNS, TaskShape(WAY, 1, 1))

    def __init__(self, image_size: int = 28, root: str | None = None) -> None:
        if image_size < 1:
            raise DataError(f"{self.name}: image_size is at least 1 pixel; got {image_size}")
        self.image_size = image_size
        self.root = root

    def split(self, split: Split) -> Runs:
        """Return the twenty tasks; the images are uint8 ``[800, 1, image_size, image_size]``, ink 255.

        Raises:
            DataError: the split is not ``test``, or the data is not on this machine, incomplete or damaged.
        """
        if split != "test":
            raise DataError(f"{self.name} has tasks to test on alone: train on omniglot, split background")
        packed = open_store(self.prepare(), self.name)
        return Runs(packed.images, packed.starts, packed.counts, packed.names, f"{self.name}, meta-test tasks")

    @property
    def store(self) -> Path:
        """The folder of the packed images, whether they are there or not."""
        return store_folder(f"{self.name}-{self.image_size}-v{VERSION}", self.root)

    def location(self) -> str | None:
        """Return in words where the packed images or the archive are, or ``None`` if nowhere."""
        if self.store.exists():
            return f"packed in {self.store}"
        try:
            return f"{self._source()}; packed at first use"
        except DataError:
            return None

    def prepare(self, *, skip: bool = False) -> Path:
        """Decode and pack all images, unless that has been done, and return the folder of the packed store.

        Args:
            skip: has no effect, for no task can do without an image.

        Raises:
            DataError: the data is not on this machine, incomplete or damaged, or the cache cannot be written.
        """
        if self.store.exists():
            return self.store
        path = self._source()
        origin = {"dataset": self.name, "version": VERSION, "source": str(path)}
        with open_files(path, limit=GIB) as source:
            return write_store(
                self.store, read_runs(source, self.image_size), (1, self.image_size, self.image_size), origin
            )

    @classmethod
    def get(cls) -> None:
        """Download the archive into the cache, 0.4 MB, unless the data is here.

        Raises:
            DataError: no mirror has it; the message says how to fetch it by hand.
        """
        if cls().location() is None:
            fetch(ARCHIVE, download_folder("omniglot"))

    def _source(self) -> Path:
        places = source_folders((self.name, "omniglot"), self.root)
        for place in places:
            for path in (place / ARCHIVE.name, place / "all_runs", place):
                if (path.name == ARCHIVE.name and path.is_file()) or (path / "run01" / "class_labels.txt").is_file():
                    return path
        looked = "".join(f"\n  {place}" for place in places)
        raise DataError(
            f"{self.name}: {ARCHIVE.name}, or a folder all_runs/ with run01/ to run20/, is in none of these "
            f"folders:{looked}\nrun `quickstudy data get {self.name}` to download it (0.4 MB), or set QUICKSTUDY_DATA "
            "to the folder of your own copy, or name that folder as the dataset's `root`"
        )


def read_runs(source: Source, image_size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the classes of one run after the other, such as ``"run01/class01"``: its support image, then its query.

    Args:
        source: ``run01/training/class01.png``, ``run01/test/item01.png``, ``run01/class_labels.txt`` and so on.
        image_size: height and width to shrink to.

    Raises:
        DataError: a run is not complete, or an image cannot be read.
    """
    names = {"/".join(PurePosixPath(name).parts[-3:]): name for name in source.names}
    names |= {"/".join(PurePosixPath(name).parts[-2:]): name for name in source.names if name.endswith(".txt")}
    for run in (f"run{number:02d}" for number in range(1, RUNS + 1)):
        labels = source.read(names.get(f"{run}/class_labels.txt", f"{run}/class_labels.txt")).decode("ascii", "replace")
        pairs = [line.split() for line in labels.splitlines() if line.strip()]
        query_of = {pair[1]: pair[0] for pair in pairs if len(pair) == 2}
        if (
            len(pairs) != WAY
            or len(query_of) != WAY
            or any(name not in names for pair in query_of.items() for name in pair)
        ):
            raise DataError(
                f"{run} in {source.path} is not complete: its class_labels.txt should name a test image and a training "
                f"image, which are there, on each of {WAY} lines; fetch it again (`quickstudy data get omniglot-runs`)"
            )
        for support, query in sorted(query_of.items()):
            images = [read_ink(Member(source, names[name]), image_size) for name in (support, query)]
            yield f"{run}/{PurePosixPath(support).stem}", np.stack(images)
