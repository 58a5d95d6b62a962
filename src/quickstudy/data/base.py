"""What the engine asks of a dataset."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from quickstudy.errors import DataError
from quickstudy.task import Task, TaskShape

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class TaskSource(ABC):
    """An endless, numbered stream of tasks for every seed.

    Task ``i`` of a seed depends on ``(seed, i)``, the split and the task shape alone: not on how many
    tasks are drawn at a time, by which process, or what was drawn before. So a resumed, a sharded and
    an unbroken training see the same tasks.
    """

    @abstractmethod
    def tasks(self, shape: TaskShape, start: int, stop: int, *, seed: int) -> Task:
        """Return the tasks ``start .. stop-1`` of the stream of ``seed`` as one batch.

        Raises:
            DataError: the source cannot make tasks of this shape (too few classes, too few images).
        """

    def to(self, device: torch.device | str) -> TaskSource:
        """Return this source with its data on ``device``, where its tasks are then made."""
        return self


class Dataset(ABC):
    """Meta-train, meta-validation and meta-test tasks, made of disjoint classes."""

    name: str
    metric: Literal["accuracy", "mse"] = "accuracy"
    fixed: ClassVar[tuple[int, TaskShape] | None] = None
    """How many tasks there are and of what size, if the test is of certain tasks and no others."""
    pictures: bool = True
    """Whether images, if it has any, are square pictures with values from 0 to 1, as can be made of any picture."""
    ink: ClassVar[bool] = False
    """Whether the images are of characters, bright on dark."""

    @abstractmethod
    def split(self, split: Split) -> TaskSource:
        """Return the source of the tasks of one split.

        Raises:
            DataError: the data is not on this machine; the message names every way to get it.
        """

    @classmethod
    def get(cls) -> None:
        """Download what the dataset is made from; nothing to do unless a dataset says otherwise.

        Raises:
            DataError: it cannot be downloaded; the message names every other way to get it.
        """
        return

    def location(self) -> str | None:
        """Return in words where the data is on this machine, or ``None`` if it is not; makes and fetches nothing."""
        return "made as it is used"

    @property
    def store(self) -> Path | None:
        """The folder of the packed images, whether they are there or not; ``None`` if it is not made of such."""
        return None

    def prepare(self, *, skip: bool = False) -> Path | None:
        """Do now what the first use would have to do, such as packing all images, and return where the result lies.

        Args:
            skip: leave out images that cannot be read, where the dataset can do without some.

        Raises:
            DataError: the data is not on this machine, or damaged.
        """
        return None


def check_split_name(split: str) -> None:
    """Raise unless a split is one of :data:`SPLITS`.

    Raises:
        DataError: it is not.
    """
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}: they are {', '.join(SPLITS)}")


def split_title(dataset: str, split: Split) -> str:
    """Return what messages call the classes of a split, such as ``"omniglot, meta-validation classes"``."""
    return f"{dataset}, meta-{'validation' if split == 'val' else split} classes"


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Return the generator of one stream of draws; it depends on its arguments alone.

    Raises:
        DataError: the seed is below zero.
    """
    if seed < 0:
        raise DataError(f"a seed is a whole number from zero up, not {seed}")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *stream))))
