"""Warp-MAML: an initialisation, and between its blocks layers that warp the space it descends in."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quickstudy.errors import RecipeError
from quickstudy.methods.base import Norm, task_loss
from quickstudy.methods.maml import MAML, Adapted
from quickstudy.nn import Conv4, Statistics, recorded, replayed
from quickstudy.task import Support, Task


class WarpMAML(MAML):
    r"""Warp-MAML (Flennerhag, Rusu, Pascanu, Visin, Yin & Hadsell, 2020), as Huisman et al. (2023) ran it.

    After the blocks of the backbone stand convolutions without a non-linearity, the warps, of weights
    :math:`\phi`. They are the same in every task, and what adapts between them, :math:`\theta`, descends in a geometry
    that they set:

    .. math::
        U(\theta; \phi) = \theta - \alpha \nabla_\theta L_\mathrm{support}(\theta; \phi), \qquad
        \theta_t = U(\theta_{t-1}; \phi)

    The initialisation :math:`\theta_0` is meta-learned for the query losses after every step. The warps are
    meta-learned to make one step good from wherever the learner comes to: the points of its trajectory are
    constants to them. With :math:`\bar\phi` the warps as a constant, both are the gradient of

    .. math::
        \sum_{t=1}^{T} L_\mathrm{query}\big(U(\theta_{t-1}; \phi); \phi\big), \qquad
        \theta_t = U(\theta_{t-1}; \bar\phi)

    (:math:`\theta_{t-1}` depends on :math:`\theta_0` but not on :math:`\phi`). With ``order=1`` the inner gradients
    are constants, and :math:`\phi` has only the gradient of the query losses at :math:`\theta_t`.

    Huisman et al. put no warp after the first block, and do not adapt it: ``fixed_blocks=1``. With 0 each block has
    a warp and adapts, as in the paper. Their warps start as zeros, ``warp_init="zero"``. Then all images look the same
    to the head, only the last warp's and the head's bias have a gradient that is more than a rounding error, and
    training waits for Adam to blow these up.

    Args:
        backbone: a :class:`~quickstudy.nn.Conv4`.
        inner_lr: inner learning rate :math:`\alpha`.
        steps: inner steps :math:`T` in meta-training.
        test_steps: inner steps in meta-validation and meta-test; as many as in training if ``None``.
        order: 2 differentiates through the inner gradients, 1 does not.
        fixed_blocks: how many of the first blocks do not adapt, and are not followed by a warp.
        warp_init: whether the kernels of the warps start as the ``identity`` or as ``zero``; biases start as zeros.
        clip: bound on the absolute value of each element of an inner gradient.
        norm: whose statistics normalise queries (:class:`~quickstudy.methods.Method`).
    """

    backbone: Conv4

    def __init__(
        self,
        backbone: nn.Module,
        inner_lr: float = 0.1,
        steps: int = 5,
        test_steps: int | None = None,
        order: Literal[1, 2] = 2,
        fixed_blocks: int = 1,
        warp_init: Literal["identity", "zero"] = "identity",
        clip: float | None = None,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(backbone, inner_lr, steps, test_steps, order, clip=clip, norm=norm)
        if not isinstance(backbone, Conv4):
            raise RecipeError(
                f"WarpMAML puts its warps between the blocks of quickstudy.nn.Conv4, and {type(backbone).__name__} "
                "has none: use that backbone"
            )
        if steps < 1:
            raise RecipeError(f"WarpMAML learns from every inner step: take at least one in training, not {steps}")
        if not 0 <= fixed_blocks < len(backbone.convs):
            raise RecipeError(
                f"of {len(backbone.convs)} blocks at least one adapts and none is missing: fixed_blocks is at least 0 "
                f"and below {len(backbone.convs)}, not {fixed_blocks}"
            )
        self.fixed_blocks = fixed_blocks
        self.warp_init = warp_init

    def create(self, features: int, outputs: int) -> None:
        super().create(features, outputs)
        fixed = tuple(f"backbone.{kind}.{n}." for kind in ("convs", "norms") for n in range(self.fixed_blocks))
        self.adapted = {name for name in self.adapted if not name.startswith(fixed)}
        channels = len(self.backbone.norms[-1].get_parameter("weight"))
        self.warps = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in self.backbone.convs[self.fixed_blocks :]
        )
        for name, parameter in self.warps.named_parameters():
            if name.endswith("weight") and self.warp_init == "identity":
                nn.init.dirac_(parameter)
            else:
                nn.init.zeros_(parameter)

    def fixed(self, x: Tensor) -> Tensor:
        """Run the blocks that do not adapt: ``[M, C, H, W]`` to what the others read."""
        for number in range(self.fixed_blocks):
            x = self.backbone.block(number, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Run the rest of the learner with the weights it has: what :meth:`fixed` returns to ``[M, outputs]``."""
        for number, warp in enumerate(self.warps, start=self.fixed_blocks):
            x = warp(self.backbone.block(number, x))
        return self.head(x.flatten(1))

    def adapt(self, support: Support) -> Adapted:
        support, first = self._read(support)
        weights, others = super().adapt(support)
        return Adapted(weights, None if others is None else [*first, *others])

    def predict(self, state: Adapted, query_x: Tensor) -> Tensor:
        with nullcontext() if state.statistics is None else replayed(state.statistics):
            return functional_call(self, state.weights, (self.fixed(query_x),))

    def loss(self, task: Task) -> Tensor:
        """Return the sum of the query losses after each inner step, the second equation of the class."""
        support, first = self._read(task.support)
        with nullcontext() if self.norm == "batch" else replayed(first):
            query_x = self.fixed(task.query_x)
        constant = {name: p.detach() for name, p in self.named_parameters() if name.startswith("warps.")}
        weights, rates, losses = self.initial, self.rates(), []
        for more in reversed(range(self.steps)):
            after = self.step(weights, rates, support)
            prediction = super().predict(self.finish(after, support), query_x)
            losses.append(task_loss(prediction, task.query_y, task.way))
            if more:  # the same step, constant in the warps; a traced program computes once what the two have in common
                weights = after if self.order == 1 else self.step(weights, rates, support, constant)
        return torch.stack(losses).sum()

    def _read(self, support: Support) -> tuple[Support, Statistics]:
        """Run the fixed blocks on the support set, once for all steps; return what they make of it."""
        with nullcontext([]) if self.norm == "batch" else recorded() as statistics:
            return support._replace(x=self.fixed(support.x)), statistics
