"""Sine regression (Finn et al., 2017): guess a wave from a few of its points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from quickstudy.data.base import SPLITS, Dataset, Split, TaskSource, check_split_name, generator
from quickstudy.data.images import BLOCK
from quickstudy.errors import DataError
from quickstudy.task import Task, TaskShape


@dataclass(frozen=True)
class SineWaves(TaskSource):
    """``y = A sin(x + p)`` with ``A ~ U[0.1, 5]``, ``p ~ U[0, pi]``, ``x ~ U[-5, 5]``, without noise.

    Tasks: ``x`` and ``y`` float32 ``[shot, 1]`` and ``[queries, 1]``.
    """

    stream: int
    device: torch.device | str = "cpu"

    def to(self, device: torch.device | str) -> SineWaves:
        """Return the same stream of waves, made on ``device``."""
        return SineWaves(self.stream, device)

    def tasks(self, shape: TaskShape, start: int, stop: int, *, seed: int) -> Task:
        """Return tasks ``start .. stop-1``, a wave each."""
        if shape.way is not None:
            raise DataError(f"sine: regression tasks have no classes; set way to none, not {shape.way}")
        points = shape.shot + shape.queries
        blocks = range(start // BLOCK, (stop - 1) // BLOCK + 1)
        first = blocks[0] * BLOCK
        draws = [_block(seed, self.stream, block, points + 2) for block in blocks]
        unit = torch.from_numpy(np.concatenate(draws)[start - first : stop - first]).to(self.device)[..., None]
        amplitude = 0.1 + 4.9 * unit[:, :1]
        phase = math.pi * unit[:, 1:2]
        x = 10 * unit[:, 2:] - 5
        y = amplitude * torch.sin(x + phase)
        shot = shape.shot
        return Task(x[:, :shot], y[:, :shot], x[:, shot:], y[:, shot:])


@lru_cache(maxsize=16)
def _block(seed: int, stream: int, block: int, numbers: int) -> np.ndarray:
    """Return the random numbers of the tasks of one block, ``[BLOCK, numbers]`` in [0, 1); never written to."""
    return generator(seed, stream, block).random((BLOCK, numbers), dtype=np.float32)


class Sine(Dataset):
    """Sine regression; the three splits are streams of waves that never meet."""

    name = "sine"
    metric = "mse"

    def split(self, split: Split) -> SineWaves:
        """Return the stream of waves of one split; there is nothing to get.

        Raises:
            DataError: there is no such split.
        """
        check_split_name(split)
        return SineWaves(SPLITS.index(split))
