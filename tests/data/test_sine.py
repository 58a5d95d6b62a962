import math

import pytest
import torch

from quickstudy.data.sine import Sine
from quickstudy.errors import DataError
from quickstudy.task import TaskShape

SHAPE = TaskShape(None, 10, 20)


def test_points_lie_on_a_wave_in_range() -> None:
    task = Sine().split("train").tasks(SHAPE, 0, 2000, seed=0)
    assert task.support_x.shape == task.support_y.shape == (2000, 10, 1)
    assert task.query_x.shape == task.query_y.shape == (2000, 20, 1)
    assert task.way is None
    x, y = torch.cat([task.support_x, task.query_x], 1).double(), torch.cat([task.support_y, task.query_y], 1).double()
    assert x.min() >= -5
    assert x.max() <= 5
    assert x.std() == pytest.approx(10 / math.sqrt(12), rel=0.01)
    # y = a sin x + b cos x, so amplitude and phase are found by least squares, and nothing is left over.
    basis = torch.cat([x.sin(), x.cos()], -1)
    found = torch.linalg.lstsq(basis, y).solution
    assert (basis @ found - y).abs().max() < 1e-4
    amplitude, phase = found.norm(dim=1), torch.atan2(found[:, 1], found[:, 0])
    assert 0.1 - 1e-3 <= amplitude.min() < 0.2
    assert 4.9 < amplitude.max() <= 5 + 1e-3
    assert -1e-3 <= phase.min() < 0.05
    assert math.pi - 0.05 < phase.max() <= math.pi + 1e-3


def test_streams_of_splits_and_seeds_never_meet() -> None:
    waves = [
        Sine().split(s).tasks(SHAPE, 0, 300, seed=seed).query_y for s in ("train", "val", "test") for seed in (0, 1)
    ]
    assert len({tuple(wave.flatten().tolist()) for stream in waves for wave in stream}) == 6 * 300


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (250, 260), (256, 512)])
def test_a_wave_does_not_depend_on_what_is_drawn_with_it(start: int, stop: int) -> None:
    source = Sine().split("val")
    whole, part = source.tasks(SHAPE, 0, 600, seed=5), source.tasks(SHAPE, start, stop, seed=5)
    assert all(torch.equal(a[start:stop], b) for a, b in zip(whole.tensors, part.tensors))


def test_classes_are_refused() -> None:
    with pytest.raises(DataError, match="set way to none, not 5"):
        Sine().split("train").tasks(TaskShape(5, 1, 1), 0, 1, seed=0)
