"""SAP: gradient descent on small operations around the layers, in proportions that are meta-learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from quickstudy.errors import RecipeError
from quickstudy.methods.base import Norm
from quickstudy.methods.maml import MAML
from quickstudy.nn import MLP, Conv4


class SAP(MAML):
    r"""Subspace adaptation prior (Huisman, Plaat & van Rijn, 2023).

    Around the layers of a base network stand mixtures of small operations :math:`o_k`, most of them the identity
    at first:

    .. math:: O(z) = \sum_k w_k \, o_k(z), \qquad w = \mathrm{softmax}(\lambda)

    In a task, gradient descent as of :class:`MAML` changes only the operations' own numbers :math:`\varphi` (and,
    with images, the head). Meta-learned are the base network, the initial :math:`\varphi`, and the proportions
    :math:`\lambda`: in which directions to adapt.

    With a :class:`~quickstudy.nn.Conv4`, on images and after the ReLU of each block, before its pooling:
    :class:`Filters`; on the kernel of each block: :class:`KernelScales`; on the logits: :class:`LinearGate`. With an
    :class:`~quickstudy.nn.MLP`, after the ReLU of each layer: :class:`Matrices`; on inputs and outputs:
    :class:`ScalarGates`. Every mixture is of maps that are linear up to a shift, and applied as one such map.

    Args:
        backbone: a :class:`~quickstudy.nn.Conv4` or an :class:`~quickstudy.nn.MLP`.
        inner_lr, steps, test_steps, order, clip: as of :class:`MAML`.
        adapts_head: adapt the head too (published with images; not in sine regression).
        adapts_input_scale: adapt the scale of the inputs of an MLP. The published code leaves it out of the inner
            loop, it seems by oversight.
        depthwise: let the rank-one kernels of :class:`Filters` act on each channel alone. The published code has one
            for every pair of channels; but those of two different channels start from zeros where their gradient is
            zero, and stay there.
        ranks: of the factored matrices of an MLP (at most its width).
        keep: operations that each mixture keeps in meta-validation and meta-test, those of the largest proportions;
            all of them if ``None`` (published).
        norm: whose statistics normalise queries (:class:`Method`).
    """

    def __init__(
        self,
        backbone: nn.Module,
        inner_lr: float = 0.01,
        steps: int = 1,
        test_steps: int | None = None,
        order: Literal[1, 2] = 2,
        clip: float | None = None,
        adapts_head: bool = True,
        adapts_input_scale: bool = True,
        depthwise: bool = True,
        ranks: Sequence[int] = (5, 10, 15),
        keep: int | None = None,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(backbone, inner_lr, steps, test_steps, order, clip=clip, norm=norm)
        if not isinstance(backbone, Conv4 | MLP):
            raise RecipeError(
                f"SAP has operations for quickstudy.nn.Conv4 and quickstudy.nn.MLP, not for {type(backbone).__name__}: "
                "use one of these two"
            )
        if keep is not None and keep < 1:
            raise RecipeError(f"SAP keeps at least one operation of each mixture, not {keep}; keep: null keeps all")
        if not ranks or min(ranks) < 1:
            raise RecipeError(f"SAP needs ranks of factored matrices, each at least 1; got {[*ranks]}")
        self.adapts_head = adapts_head
        self.adapts_input_scale = adapts_input_scale
        self.depthwise = depthwise
        self.ranks = ranks
        self.keep = keep

    def create(self, features: int, outputs: int) -> None:
        super().create(features, outputs)
        if isinstance(self.backbone, Conv4):
            convs = [conv for conv in self.backbone.convs if isinstance(conv, nn.Conv2d)]
            self.input = Filters(convs[0].in_channels, self.depthwise)
            self.kernels = nn.ModuleList(KernelScales(conv) for conv in convs)
            self.hidden = nn.ModuleList(Filters(conv.out_channels, self.depthwise) for conv in convs)
            self.output = LinearGate(outputs)
        elif isinstance(self.backbone, MLP):
            linears = [linear for linear in self.backbone.linears if isinstance(linear, nn.Linear)]
            self.input = ScalarGates()
            self.hidden = nn.ModuleList(Matrices(linear.out_features, self.ranks) for linear in linears)
            self.output = ScalarGates()
            nn.init.zeros_(self.head.bias)  # as published; MLP(zero_bias=True) does so with its own
        names = self.trained("input.", "kernels.", "hidden.", "output.", *["head."] * self.adapts_head)
        self.adapted = {name for name in names if not name.endswith("logits")}
        if not self.adapts_input_scale:
            self.adapted -= {"input.factor"}

    def forward(self, x: Tensor) -> Tensor:
        """Run the learner with the weights it has: ``[M, ...]`` to ``[M, outputs]``."""
        keep = None if self.training else self.keep
        if isinstance(self.backbone, Conv4):
            x = self.input(x, keep)
            layers = zip(self.backbone.convs, self.backbone.norms, self.kernels, self.hidden)
            for conv, norm, scales, filters in layers:
                x = functional_call(conv, {"weight": scales(conv.weight, keep)}, (x,))
                # Unlike in Conv4, ReLU comes before pooling: what the filters between them read depends on it.
                x = F.max_pool2d(filters(F.relu(norm(x)), keep), 2)
        elif isinstance(self.backbone, MLP):
            x = self.input(x.flatten(1), keep)
            for linear, norm, matrices in zip(self.backbone.linears, self.backbone.norms, self.hidden):
                x = matrices(F.relu(norm(linear(x))), keep)
        return self.output(self.head(x.flatten(1)), keep)


class Mixture(nn.Module):
    """Proportions of operations, all equal at first.

    Args:
        logits: how many there are: one for each operation; or one alone for two operations, whose sigmoid is the
            proportion of the second.
    """

    def __init__(self, logits: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(logits))

    def shares(self, keep: int | None = None) -> Tensor:
        """Return the proportions, ``[operations]``, with a sum of 1; all zero but the ``keep`` largest."""
        logits = self.logits if len(self.logits) > 1 else F.pad(self.logits, (1, 0))
        if keep is not None:
            rank = logits.argsort(descending=True, stable=True).argsort()
            logits = logits.masked_fill(rank >= keep, -torch.inf)
        return logits.softmax(0)


class Shift(Mixture):
    """Add nothing, one number, or a number for each channel.

    Args:
        channels: size of the vector.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(3)
        self.scalar = nn.Parameter(torch.zeros(()))
        self.vector = nn.Parameter(torch.zeros(channels))

    def forward(self, keep: int | None = None) -> Tensor:
        """Return what is added in all, ``[channels]``."""
        _, scalar, vector = self.shares(keep)
        return scalar * self.scalar + vector * self.vector


class Filters(Mixture):
    """Leave images as they are, convolve them by 1x1 or 3x3 kernels or by 3x3 kernels of rank one; then shift.

    Images are padded by zeros at the right and at the bottom, so that the first tap of a kernel is the pixel itself.
    The kernels of all operations are added up, and images are convolved once.

    Args:
        channels: of the images.
        depthwise: let the kernels of rank one act on each channel alone.

    Shapes: ``[M, channels, height, width]`` to the same.
    """

    def __init__(self, channels: int, depthwise: bool) -> None:
        super().__init__(4)
        self.depthwise = depthwise
        identity = torch.eye(channels)
        factor = F.pad(torch.ones(channels, 1) if depthwise else identity[..., None], (0, 2))
        self.pointwise = nn.Parameter(identity)
        self.kernel = nn.Parameter(_first_tap(identity))
        self.U = nn.Parameter(factor)
        self.S = nn.Parameter(torch.ones(factor.shape[:-1]))
        self.V = nn.Parameter(factor.clone())
        self.shift = Shift(channels)

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        """Apply the mixtures."""
        same, pointwise, full, factored = self.shares(keep)
        identity = torch.eye(len(self.kernel), dtype=self.kernel.dtype, device=self.kernel.device)
        rank_one = (self.U * self.S[..., None])[..., :, None] * self.V[..., None, :]
        if self.depthwise:
            rank_one = identity[..., None, None] * rank_one
        kernel = full * self.kernel + factored * rank_one + _first_tap(same * identity + pointwise * self.pointwise)
        return F.conv2d(F.pad(x, (0, 2, 0, 2)), kernel, self.shift(keep))


class KernelScales(Mixture):
    """Leave the kernel of a convolution as it is, or scale each of its slices, or each of its output channels.

    Scales of slices are those of meta-transfer learning (Sun et al., 2019).

    Args:
        conv: the convolution.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(3)
        self.slices = nn.Parameter(torch.ones(conv.out_channels, conv.in_channels))
        self.channels = nn.Parameter(torch.ones(conv.out_channels))

    def forward(self, kernel: Tensor, keep: int | None = None) -> Tensor:
        """Return the scaled kernel, ``[out, in, height, width]``."""
        same, slices, channels = self.shares(keep)
        return kernel * (same + slices * self.slices + channels * self.channels[:, None])[..., None, None]


class LinearGate(Mixture):
    """Leave logits as they are, or map them linearly.

    Args:
        outputs: number of logits.

    Shapes: ``[M, outputs]`` to the same.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__(1)
        self.matrix = nn.Parameter(torch.eye(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        """Apply the mixture."""
        same, mapped = self.shares(keep)
        return same * x + mapped * F.linear(x, self.matrix, self.bias)


class Matrices(Mixture):
    r"""Leave features as they are, multiply them by a number, a vector, a matrix, or a factored matrix; then shift.

    Rows are examples: a matrix multiplies from the right, a factored one is :math:`U \mathrm{diag}(S) V^\top`. Those
    of a rank below the width are no identity at first, but keep the first coordinates only.

    Args:
        width: of the layer.
        ranks: of the factored matrices.

    Shapes: ``[M, width]`` to the same.
    """

    def __init__(self, width: int, ranks: Sequence[int]) -> None:
        super().__init__(4 + len(ranks))
        self.ranks = [min(rank, width) for rank in ranks]
        identity = torch.eye(width)
        factor = torch.cat([identity[:, :rank] for rank in self.ranks], dim=1)
        self.scalar = nn.Parameter(torch.ones(()))
        self.vector = nn.Parameter(torch.ones(width))
        self.matrix = nn.Parameter(identity)
        self.U = nn.Parameter(factor)
        self.S = nn.Parameter(torch.ones(factor.shape[1]))
        self.V = nn.Parameter(factor.clone())
        self.shift = Shift(width)

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        """Apply the mixtures."""
        same, scalar, vector, matrix, *factored = self.shares(keep)
        diagonal = same + scalar * self.scalar + vector * self.vector
        strength = self.S * torch.cat([share.expand(rank) for share, rank in zip(factored, self.ranks)])
        return x @ (torch.diag(diagonal) + matrix * self.matrix + (self.U * strength) @ self.V.T) + self.shift(keep)


class ScalarGates(nn.Module):
    """Leave numbers as they are, or multiply them by one number; then leave them, or add one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = Mixture(1), Mixture(1)
        self.factor = nn.Parameter(torch.ones(()))
        self.term = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        """Apply the mixtures, to any shape."""
        same, scaled = self.scale.shares(keep)
        _, shifted = self.shift.shares(keep)
        return x * (same + scaled * self.factor) + shifted * self.term


def _first_tap(matrix: Tensor) -> Tensor:
    """Return 3x3 kernels that are a matrix ``[out, in]`` at their first tap, and zero elsewhere."""
    return F.pad(matrix[..., None, None], (0, 2, 0, 2))
