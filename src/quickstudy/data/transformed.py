"""Tasks whose images go through transforms, with random numbers that belong to the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from quickstudy.data.base import TaskSource, generator
from quickstudy.data.images import BLOCK, Blocks
from quickstudy.data.transforms import Transform, transform_images
from quickstudy.errors import DataError
from quickstudy.task import Task, TaskShape

STREAM = 0x7472616E
"""Sets these draws apart from those of the images, which are numbered by block alone: larger than any block is, for
NumPy gives ``(seed, STREAM, 0)`` the same generator as ``(seed, STREAM)``."""


@dataclass(frozen=True)
class TransformedTasks(TaskSource):
    """The tasks of another source, with transformed images, on the device where they are.

    Task ``i`` of a seed always gets the same random numbers, whatever is drawn with it or before. The values agree up
    to the rounding of sums, which PyTorch may order differently for batches of different sizes.

    Args:
        source: where the tasks come from; its images are floats in [0, 1].
        transforms: applied in turn to every image, support and query alike.
    """

    source: TaskSource
    transforms: tuple[Transform, ...]
    _blocks: Blocks = field(default_factory=Blocks, repr=False, compare=False)

    def to(self, device: torch.device | str) -> TransformedTasks:
        """Return the same tasks, made and transformed on ``device``."""
        return replace(self, source=self.source.to(device))

    def tasks(self, shape: TaskShape, start: int, stop: int, *, seed: int) -> Task:
        """Return tasks ``start .. stop-1``.

        Raises:
            DataError: the source cannot make such tasks, their examples are not images, or do not suit a transform.
        """
        task = self.source.tasks(shape, start, stop, seed=seed)
        if task.support_x.ndim != 5:
            raise DataError(
                "transforms are for images [channels, height, width], and the examples of these tasks have the shape "
                f"{list(task.support_x.shape[2:])}: leave the transforms out"
            )
        support, query = task.support_x.shape[1], task.query_x.shape[1]
        unit = self._unit(start, stop, seed, support + query).to(task.support_x.device, non_blocking=True)
        unit = self._shared_by_class(unit, task)
        return replace(
            task,
            support_x=self._apply(task.support_x, unit[:, :support]),
            query_x=self._apply(task.query_x, unit[:, support:]),
        )

    def _unit(self, start: int, stop: int, seed: int, images: int) -> Tensor:
        """Return the random numbers of some tasks, ``[stop - start, images, numbers]``."""
        numbers = sum(transform.numbers for transform in self.transforms)

        def draw(block: int) -> Tensor:
            drawn = generator(seed, STREAM, block).random((BLOCK, images, numbers), dtype=np.float32)
            return torch.from_numpy(drawn)

        return self._blocks.rows((seed, images), start, stop, draw)

    def _shared_by_class(self, unit: Tensor, task: Task) -> Tensor:
        """Give all images of a class the numbers of its first, for transforms by class; ``[B, images, numbers]``."""
        if not any(transform.by_class for transform in self.transforms):
            return unit
        labels = torch.cat([task.support_y, task.query_y], 1)
        first = (labels[:, :, None] == labels[:, None]).int().argmax(2)  # image of the same class, [B, images]
        shared = unit.gather(1, first[:, :, None].expand_as(unit))
        by_class = [transform.by_class for transform in self.transforms for _ in range(transform.numbers)]
        return torch.where(torch.tensor(by_class, device=unit.device), shared, unit)

    def _apply(self, images: Tensor, unit: Tensor) -> Tensor:
        """Transform images ``[B, M, C, H, W]`` by their numbers ``[B, M, numbers]``."""
        done = transform_images(self.transforms, images.flatten(0, 1), unit.flatten(0, 1))
        return done.unflatten(0, images.shape[:2])


def transformed(source: TaskSource, transforms: Sequence[Transform]) -> TaskSource:
    """Return the source with its images transformed, or the source itself if there are no transforms."""
    return TransformedTasks(source, tuple(transforms)) if transforms else source
