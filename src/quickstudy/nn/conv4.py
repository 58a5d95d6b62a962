"""The four-block convolutional network that most published tables use."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from quickstudy.nn.layers import Conv2d
from quickstudy.nn.norm import BatchNorm, Scale


class Conv4(nn.Module):
    """Blocks of ``conv 3x3 (padding 1, bias) -> batch norm -> ReLU -> max-pool 2x2``, then flattened.

    Vinyals et al. (2016), Snell et al. (2017). With 64 channels an image of 28x28 gives 64 features and
    one of 84x84 gives 1,600.

    Args:
        channels: filters of every block.
        blocks: number of blocks.
        eps: of the batch norms (the LSTM meta-learner uses 1e-3).
        scale: of the batch norms, what it starts from (:class:`~quickstudy.nn.BatchNorm`).

    Shapes: ``[M, C, H, W]`` to ``[M, channels * (H // 2**blocks) * (W // 2**blocks)]``.
    """

    def __init__(self, channels: int = 64, blocks: int = 4, eps: float = 1e-5, scale: Scale = "ones") -> None:
        super().__init__()
        self.convs = nn.ModuleList(Conv2d(channels, 3, padding=1) for _ in range(blocks))
        self.norms = nn.ModuleList(BatchNorm(channels, eps, scale) for _ in range(blocks))

    def block(self, number: int, x: Tensor) -> Tensor:
        """Run one block: ``[M, C, H, W]`` to ``[M, channels, H // 2, W // 2]``."""
        x = self.norms[number](self.convs[number](x))
        return F.relu(F.max_pool2d(x, 2))  # as ReLU before pooling, gradients included, on a quarter of the data

    def forward(self, x: Tensor) -> Tensor:
        for number in range(len(self.convs)):
            x = self.block(number, x)
        return x.flatten(1)
