"""Images packed by class, and the sampler that draws tasks of them by index."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from quickstudy.data.base import TaskSource, generator
from quickstudy.errors import DataError
from quickstudy.task import Task, TaskShape

BLOCK = 256
"""Tasks whose indices are drawn at a time: a constant of the streams, never a setting."""


def unit_floats(images: Tensor) -> Tensor:
    """Return images in bytes, 0 to 255, as tasks hold them: float32 from 0 to 1."""
    return images.to(torch.float32).mul_(1 / 255)


def draw_distinct(rng: np.random.Generator, sizes: np.ndarray, count: int) -> np.ndarray:
    """Draw ``count`` distinct numbers of ``range(sizes[r])`` for every row ``r``, in random order.

    Floyd's algorithm over all rows at once: ``count`` steps, whatever the sizes; each looks at all that were drawn, so
    that a hundred or more, of at most four times as many, are the first of a shuffle instead.

    Args:
        rng: source of randomness.
        sizes: ``[R]`` integers, each at least ``count``.
        count: how many to draw.

    Returns:
        ``[R, count]`` int64; every ordered selection is equally likely.
    """
    rows = len(sizes)
    if count >= 100 and sizes.max() <= 4 * count:
        keys = rng.random((rows, int(sizes.max())))
        keys[np.arange(keys.shape[1]) >= sizes[:, None]] = 2.0  # last of all
        return keys.argsort(axis=1)[:, :count]
    chosen = np.full((rows, count), -1, dtype=np.int64)
    for position in range(count):
        highest = sizes - count + position
        pick = (rng.random(rows) * (highest + 1)).astype(np.int64)
        taken = (chosen[:, :position] == pick[:, None]).any(axis=1)
        chosen[:, position] = np.where(taken, highest, pick)
    order = rng.random((rows, count)).argsort(axis=1)
    return np.take_along_axis(chosen, order, axis=1)


class Blocks:
    """The last block of each stream that is read, of up to 64: seeds that train as one job are read in turn."""

    def __init__(self) -> None:
        self._last: dict[Hashable, tuple[int, Tensor]] = {}

    def rows(self, stream: Hashable, start: int, stop: int, draw: Callable[[int], Tensor]) -> Tensor:
        """Return what belongs to tasks ``start .. stop-1``, a copy.

        Args:
            stream: all that the draws depend on besides the block.
            start, stop: numbers of the tasks.
            draw: returns a block, ``[BLOCK, ...]``, given its number.
        """
        parts = []
        for block in range(start // BLOCK, (stop - 1) // BLOCK + 1):
            number, drawn = self._last.get(stream, (None, None))
            if drawn is None or number != block:
                drawn = draw(block)
                while stream not in self._last and len(self._last) >= 64:
                    self._last.pop(next(iter(self._last)))
                self._last[stream] = block, drawn
            parts.append(drawn[max(start - block * BLOCK, 0) : stop - block * BLOCK])
        return torch.cat(parts)


@dataclass(frozen=True)
class ImageClasses(TaskSource):
    """Classes of images in one packed array; class ``c`` holds rows ``starts[c] .. starts[c]+counts[c]-1``.

    Args:
        images: uint8 ``[n, channels, height, width]``, or float32 ``[n, ...]`` (embeddings, say), which tasks hold as
            it is; may be a memory map, or lie on a GPU.
        starts: first row of each class, ``[classes]``.
        counts: images of each class, ``[classes]``.
        names: name of each class.
        title: what error messages call it, such as ``"omniglot, meta-test classes"``.
    """

    images: Tensor
    starts: np.ndarray
    counts: np.ndarray
    names: tuple[str, ...]
    title: str = "images"
    _blocks: Blocks = field(default_factory=Blocks, repr=False, compare=False)

    def __len__(self) -> int:
        """Return the number of classes."""
        return len(self.names)

    @classmethod
    def from_offsets(cls, images: Tensor, offsets: np.ndarray, names: Sequence[str], title: str) -> ImageClasses:
        """Classes that lie one after the other: class ``c`` is rows ``offsets[c] .. offsets[c+1]-1``."""
        return cls(images, np.asarray(offsets[:-1]), np.diff(offsets), tuple(names), title)

    def of_class(self, index: int) -> Tensor:
        """Return the images of one class, uint8 ``[count, channels, height, width]``."""
        start = int(self.starts[index])
        return self.images[start : start + int(self.counts[index])]

    def select(self, indices: Iterable[int], title: str) -> ImageClasses:
        """Return some of the classes; the images are shared, not copied."""
        chosen = np.fromiter(indices, dtype=np.int64)
        names = tuple(self.names[i] for i in chosen)
        return ImageClasses(self.images, self.starts[chosen], self.counts[chosen], names, title)

    def rotated(self) -> ImageClasses:
        """Return four times as many classes: each also turned by 90, 180 and 270 degrees (square images).

        Only the images of these classes are copied.
        """
        rows = torch.from_numpy(np.concatenate([np.arange(s, s + c) for s, c in zip(self.starts, self.counts)]))
        own = self.images[rows]
        starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        return ImageClasses(
            torch.cat([torch.rot90(own, turns, (2, 3)) for turns in range(4)]),
            np.concatenate([starts + turns * len(own) for turns in range(4)]),
            np.tile(self.counts, 4),
            tuple(f"{name}/rot{90 * turns:03d}" for turns in range(4) for name in self.names),
            self.title,
        )

    def to(self, device: torch.device | str) -> ImageClasses:
        """Return the same classes with their images on ``device``."""
        return replace(self, images=self.images.to(device), _blocks=Blocks())

    def tasks(self, shape: TaskShape, start: int, stop: int, *, seed: int) -> Task:
        """Return tasks ``start .. stop-1``: uint8 images as float32 in [0, 1], examples ordered by class."""
        rows = self._blocks.rows((shape, seed), start, stop, lambda block: self._draw(shape, seed, block))
        way, shot, queries = shape.way or 0, shape.shot, shape.queries
        device = self.images.device
        labels = torch.arange(way, device=device)

        def gather(chosen: Tensor) -> Tensor:
            index = chosen.reshape(-1).to(device, non_blocking=True)
            found = self.images.index_select(0, index)
            if found.dtype == torch.uint8:
                found = unit_floats(found)
            return found.view(stop - start, -1, *self.images.shape[1:])

        return Task(
            gather(rows[:, :, :shot]),
            labels.repeat_interleave(shot).expand(stop - start, -1),
            gather(rows[:, :, shot:]),
            labels.repeat_interleave(queries).expand(stop - start, -1),
            way,
        )

    def _draw(self, shape: TaskShape, seed: int, block: int) -> Tensor:
        """Draw the image rows of ``BLOCK`` tasks, ``[BLOCK, way, shot + queries]``."""
        self._check(shape)
        assert shape.way is not None
        rng = generator(seed, block)
        classes = draw_distinct(rng, np.full(BLOCK, len(self)), shape.way).reshape(-1)
        within = draw_distinct(rng, self.counts[classes], shape.shot + shape.queries)
        rows = self.starts[classes][:, None] + within
        return torch.from_numpy(rows.reshape(BLOCK, shape.way, -1))

    def _check(self, shape: TaskShape) -> None:
        if shape.way is None:
            raise DataError(f"{self.title}: these are classes; give the tasks a way (such as 5), not none")
        if len(self) < shape.way:
            raise DataError(
                f"{self.title}: {len(self)} classes cannot make {shape.way}-way tasks; lower the way or add classes"
            )
        need = shape.shot + shape.queries
        few = np.flatnonzero(self.counts < need)
        if len(few):
            listed = ", ".join(f"{self.names[i]} ({self.counts[i]})" for i in few[:5])
            more = f" and {len(few) - 5} more" if len(few) > 5 else ""
            raise DataError(
                f"{self.title}: {shape.shot} support and {shape.queries} query images need {need} images of every "
                f"class, but {len(few)} of {len(self)} classes have fewer: {listed}{more}; lower shot or queries"
            )
