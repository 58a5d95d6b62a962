"""Layers whose input size the first batch of data decides."""

from __future__ import annotations

import warnings

from torch import nn


class Linear(nn.LazyLinear):
    """``nn.Linear`` whose input size is inferred; it turns into a plain ``nn.Linear`` with the first batch.

    Args:
        outputs: size of the output.
        zero_bias: start from a bias of zero, not from PyTorch's uniform draw.
    """

    cls_to_become = nn.Linear  # type: ignore[assignment]

    def __init__(self, outputs: int, zero_bias: bool = False) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "lazy modules are under development", since 2020
            super().__init__(outputs)
        self.zero_bias = zero_bias

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.in_features and self.zero_bias:
            nn.init.zeros_(self.bias)


class Conv2d(nn.LazyConv2d):
    """``nn.Conv2d`` whose number of input channels is inferred from the first batch.

    Args:
        channels: of the output.
        kernel_size: height and width of the kernel.
        padding: pixels of zeros on each side.
        stride: pixels from one place of the kernel to the next.
        bias: whether something is added to every output; a batch norm that follows takes it away again.
        he_normal: start from He et al.'s normal draw of variance ``2 / (channels * kernel_size**2)``, which residual
            networks are published with, not from PyTorch's uniform draw.
    """

    cls_to_become = nn.Conv2d  # type: ignore[assignment]

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        padding: int = 0,
        *,
        stride: int = 1,
        bias: bool = True,
        he_normal: bool = False,
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            super().__init__(channels, kernel_size, stride, padding, bias=bias)
        self.he_normal = he_normal

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.in_channels and self.he_normal:
            nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
