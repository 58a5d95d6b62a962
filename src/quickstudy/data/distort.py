"""Random distortions that make one printed character look like many hands' drawings of it."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 28
"""Height and width of a distorted picture, in pixels."""

FINE = 2
"""Pictures are made this many times as large, and then shrunk."""

CONTROL = 4
"""Each axis has this many control points of the elastic displacement."""

NUMBERS = 7 + 2 * CONTROL**2
"""Random numbers that one picture is made of."""

ROTATION = math.radians(14)
SHEAR = 0.22
SCALE = 0.22
SHIFT = 0.10
ELASTIC = 0.055
INK = (0.26, 0.56)


def distort(bitmaps: Tensor, noise: np.ndarray) -> Tensor:
    """Turn, shear, stretch, shift, bend and thicken each picture by its own random numbers.

    Args:
        bitmaps: float32 ``[n, FINE * SIDE, FINE * SIDE]`` in [0, 1], ink 1.
        noise: ``[n, NUMBERS]``, uniform in [-1, 1].

    Returns:
        uint8 ``[n, 1, SIDE, SIDE]``, ink 255.
    """
    numbers = torch.from_numpy(noise.astype(np.float32))
    side = FINE * SIDE
    axis = (torch.arange(side, dtype=torch.float32) + 0.5) * (2 / side) - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    matrix, shift = _affine(numbers)
    place = torch.stack([x, y], -1).expand(len(bitmaps), -1, -1, -1)
    control = ELASTIC * numbers[:, 7:].reshape(-1, 2, CONTROL, CONTROL)
    bend = F.interpolate(control, (side, side), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    grid = torch.einsum("nij,nhwj->nhwi", matrix, place) + shift[:, None, None] + bend
    drawn = F.grid_sample(bitmaps[:, None], grid, mode="bilinear", align_corners=False)
    # A stroke gets thicker or thinner by drawing the contour of its blurred picture at another height.
    soft = F.avg_pool2d(F.avg_pool2d(drawn, 3, 1, 1), 3, 1, 1)
    height = INK[0] + (INK[1] - INK[0]) * (1 - numbers[:, 6].reshape(-1, 1, 1, 1)) / 2
    peak = soft.amax((2, 3), keepdim=True).clamp_min(1e-3)  # so that hairlines do not vanish
    inked = ((soft / peak - height) * 6 + 0.5).clamp(0, 1)
    return (F.avg_pool2d(inked, FINE) * 255).round().to(torch.uint8)


def _affine(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the map from a place in the new picture to its place in the old one: ``[n, 2, 2]`` and ``[n, 2]``."""
    turn, shear = ROTATION * numbers[:, 0], SHEAR * numbers[:, 1]
    wide, high = torch.exp(SCALE * numbers[:, 2]), torch.exp(SCALE * numbers[:, 3])
    cos, sin = torch.cos(turn), torch.sin(turn)
    matrix = torch.stack([cos * wide, (shear * cos - sin) * wide, sin * high, (shear * sin + cos) * high], -1)
    return matrix.reshape(-1, 2, 2), SHIFT * numbers[:, 4:6]
