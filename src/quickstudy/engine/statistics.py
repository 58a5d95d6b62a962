"""Means and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean and the half-width of its 95 % Student-t interval over ``count`` values."""

    mean: float
    interval: float
    count: int

    def percent(self, digits: int = 2) -> str:
        """Return it as a percentage, such as ``98.20 % ± 0.31``."""
        return f"{100 * self.mean:.{digits}f} % ± {100 * self.interval:.{digits}f}"

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.interval:.2g}"

    def show(self, metric: str) -> str:
        """Return it in the unit of its metric: ``accuracy`` as a percentage, ``mse`` as a number."""
        return self.percent() if metric == "accuracy" else str(self)


def estimate(values: Tensor | Sequence[float]) -> Estimate:
    """Return the mean of some values and its 95 % interval, ``t(0.975, n-1) * s / sqrt(n)`` (``s`` of ``n-1``)."""
    from scipy.special import stdtrit

    tensor = torch.as_tensor(values, dtype=torch.float64).flatten()
    count = len(tensor)
    if count < 2:
        return Estimate(tensor.mean().item(), math.nan, count)
    deviation = tensor.std(correction=1).item()
    return Estimate(tensor.mean().item(), float(stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count), count)
