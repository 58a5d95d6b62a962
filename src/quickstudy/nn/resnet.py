"""Residual networks of the few-shot literature: ResNet-12 and the wide residual network WRN-28-10."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quickstudy.errors import RecipeError
from quickstudy.nn.layers import Conv2d
from quickstudy.nn.norm import BatchNorm


def _conv(channels: int, kernel_size: int = 3, stride: int = 1) -> Conv2d:
    """Return a convolution that a batch norm follows, or comes before: it needs no bias."""
    return Conv2d(channels, kernel_size, kernel_size // 2, stride=stride, bias=False, he_normal=True)


class DropBlock(nn.Module):
    r"""In training, set squares of every channel to zero (Ghiasi, Lin & Le, 2018); with ``size`` 1, dropout.

    A square of ``size`` pixels begins at each place where it fits with a probability of

    .. math:: \gamma = \frac{p}{s^2} \cdot \frac{H W}{(H - s + 1)(W - s + 1)}

    (equation 1), so that about ``rate`` of all values are lost; the others are scaled up to make up for it.

    Args:
        rate: share of the values to drop, 0 to less than 1.
        size: height and width of a square; at most that of the image.

    Shapes: ``[M, C, H, W]`` to the same.
    """

    def __init__(self, rate: float, size: int = 1) -> None:
        super().__init__()
        if not 0 <= rate < 1 or size < 1:
            raise RecipeError(f"DropBlock: rate is 0 to less than 1, size at least 1 pixel; got {rate} and {size}")
        self.rate = rate
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        height, width = x.shape[-2:]
        size = min(self.size, height, width)
        inner = height - size + 1, width - size + 1
        gamma = self.rate * height * width / (size * size * inner[0] * inner[1])
        begins = (torch.rand_like(x[..., : inner[0], : inner[1]]) < gamma).to(x.dtype)
        # A pixel is lost if a square begins at it, or at one of the size - 1 before it in each direction.
        kept = 1 - F.max_pool2d(F.pad(begins, (size - 1,) * 4), size, stride=1)
        return x * (kept / kept.mean().clamp_min(1 / x.numel()))

    def extra_repr(self) -> str:
        return f"{self.rate}, size={self.size}"


class ResNet12(nn.Module):
    r"""The residual network of twelve convolutions that most few-shot tables since 2018 use.

    Four blocks of

    .. math:: \mathrm{pool}(\mathrm{lrelu}(f(x) + \mathrm{norm}(\mathrm{conv}_{1 \times 1}(x))))

    where :math:`f` is three times a 3x3 convolution and a batch norm, with leaky ReLUs (slope 0.1) between, and the
    max-pool is 2x2; then the mean over all pixels. Convolutions have no bias. Widths and DropBlock are those of Lee
    et al. (2019, MetaOptNet), who drop from the first two blocks single values, from the last two squares; they raise
    the rate slowly to 0.1 in training, and here it is constant. The original of Oreshkin et al. (2018, TADAM) is
    ``widths=[64, 128, 256, 512]``. Of RGB images it has 12,424,320 parameters (7,996,800 with TADAM's widths).

    Args:
        widths: channels of every block; the last is the size of the embedding.
        drop_rate: share of values that are dropped after every block in training.
        block_size: height and width of the squares, in pixels; MetaOptNet has 5 for 84x84 images, 2 for 32x32.

    Shapes: ``[M, C, H, W]`` to ``[M, widths[-1]]``; images of at least ``2**blocks`` pixels a side.
    """

    def __init__(
        self, widths: Sequence[int] = (64, 160, 320, 640), drop_rate: float = 0.0, block_size: int = 5
    ) -> None:
        super().__init__()
        half = len(widths) // 2
        self.blocks = nn.Sequential(
            *(ResNet12Block(width, drop_rate, 1 if i < half else block_size) for i, width in enumerate(widths))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).mean((-2, -1))


class ResNet12Block(nn.Module):
    """One block of :class:`ResNet12`, of ``width`` channels: ``[M, C, H, W]`` to ``[M, width, H // 2, W // 2]``."""

    def __init__(self, width: int, drop_rate: float, block_size: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv(width) for _ in range(3))
        self.norms = nn.ModuleList(BatchNorm(width) for _ in range(3))
        self.shortcut = nn.Sequential(_conv(width, 1), BatchNorm(width))
        self.drop = DropBlock(drop_rate, block_size)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            y = norm(conv(F.leaky_relu(y, 0.1) if i else y))
        y = F.max_pool2d(y + self.shortcut(x), 2)  # before the leaky ReLU: the same values, on a quarter of the data
        return self.drop(F.leaky_relu(y, 0.1))


class WideResNet(nn.Module):
    """A wide residual network (Zagoruyko & Komodakis, 2016); the default is WRN-28-10, of 36,472,784 parameters.

    A 3x3 convolution of 16 channels, three groups of ``(depth - 4) / 6`` pre-activated blocks (batch norm, ReLU, 3x3
    convolution, twice) of ``16 * width``, ``32 * width`` and ``64 * width`` channels, of which the second and the
    third halve the image, a batch norm, ReLU, and the mean over all pixels. Convolutions have no bias. LEO's embeddings
    of ImageNet (Rusu et al., 2019) come from this network.

    Args:
        depth: number of layers, six times the blocks of a group and four.
        width: how many times as wide as the thin network.
        drop_rate: dropout between the two convolutions of a block, in training.

    Shapes: ``[M, C, H, W]`` to ``[M, 64 * width]``.
    """

    def __init__(self, depth: int = 28, width: int = 10, drop_rate: float = 0.0) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise RecipeError(f"WideResNet: depth is 10, 16, 22, 28, ... (six times the blocks, and 4); got {depth}")
        self.conv = _conv(16)
        blocks, channels = [], 16
        for group in range(3):
            for block in range((depth - 4) // 6):
                after = 16 * width * 2**group
                blocks.append(WideBlock(channels, after, 2 if group and not block else 1, drop_rate))
                channels = after
        self.blocks = nn.Sequential(*blocks)
        self.norm = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.blocks(self.conv(x)))).mean((-2, -1))


class WideBlock(nn.Module):
    """One block of :class:`WideResNet`, from ``before`` to ``after`` channels; the image shrinks by ``stride``."""

    def __init__(self, before: int, after: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([BatchNorm(before), BatchNorm(after)])
        self.convs = nn.ModuleList([_conv(after, stride=stride), _conv(after)])
        self.shortcut = None if before == after and stride == 1 else _conv(after, 1, stride)
        self.drop = DropBlock(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norms[0](x))
        y = self.drop(F.relu(self.norms[1](self.convs[0](active))))
        return self.convs[1](y) + (x if self.shortcut is None else self.shortcut(active))
