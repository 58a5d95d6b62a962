"""Multi-layer perceptrons: the sine network and the Omniglot network."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from quickstudy.nn.layers import Linear
from quickstudy.nn.norm import BatchNorm


class MLP(nn.Module):
    """Fully connected hidden layers, each ``linear -> (batch norm) -> ReLU``; the input is flattened.

    The sine network of Finn et al. (2017) is ``MLP([40, 40], zero_bias=True)``, that of Huisman et al.
    (2023) ``MLP([91, 91, 91], zero_bias=True)``, their Omniglot network
    ``MLP([256, 128, 64, 64], batch_norm=True)``; the head of the method follows.

    Args:
        widths: sizes of the hidden layers.
        batch_norm: normalise each layer before its ReLU.
        zero_bias: start from biases of zero.

    Shapes: ``[M, ...]`` to ``[M, widths[-1]]``.
    """

    def __init__(self, widths: Sequence[int] = (40, 40), batch_norm: bool = False, zero_bias: bool = False) -> None:
        super().__init__()
        self.linears = nn.ModuleList(Linear(width, zero_bias) for width in widths)
        self.norms = nn.ModuleList(BatchNorm(width) if batch_norm else nn.Identity() for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for linear, norm in zip(self.linears, self.norms):
            x = F.relu(norm(linear(x)))
        return x
