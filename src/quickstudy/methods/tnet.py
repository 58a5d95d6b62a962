"""T-Net and MT-Net: MAML in a learned metric, and in a learned subspace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from quickstudy.errors import RecipeError
from quickstudy.methods.base import Norm
from quickstudy.methods.maml import MAML
from quickstudy.nn import MLP, Conv4


class TNet(MAML):
    r"""T-Net and MT-Net (Lee & Choi, 2018).

    Each layer of the learner, the head included, is followed by a square matrix :math:`T` that mixes its outputs:
    it computes :math:`T (W x + b)`. Only :math:`W` and :math:`b` adapt in a task; :math:`T` is meta-learned, from
    the identity. A step of size :math:`\alpha` on :math:`W` moves the layer by

    .. math:: T W \leftarrow T W - \alpha \, T T^\top \nabla_{T W} L

    so that :math:`T T^\top` is a metric of the activations of that layer.

    MT-Net (``masks=True``) also learns how many units to change. Unit :math:`c` of a layer has a logit
    :math:`\zeta_c`, from 0, and adapts (its row of :math:`W`, its bias, and weight and bias of its batch norm) or
    stays in all steps of a task:

    .. math:: M_c = [\zeta_c + g_c > 0], \qquad \theta_{s+1} = \theta_s - \alpha \, M \odot \nabla L(\theta_s)

    In meta-training :math:`g` is drawn for every task from the logistic distribution, the difference of two Gumbel
    variables, so that a unit adapts with probability :math:`\sigma(\zeta_c)`; the meta-gradient passes
    through :math:`\sigma(\zeta_c + g_c)` (straight-through Gumbel-softmax of temperature 1). In evaluation
    :math:`g = 0`, as in the code of Huisman et al. (2023), where Lee & Choi draw as well: units whose logit is still
    at 0 stay.

    Args:
        backbone: a :class:`~quickstudy.nn.Conv4` or an :class:`~quickstudy.nn.MLP`.
        inner_lr: inner learning rate :math:`\alpha`.
        steps: inner steps in meta-training.
        test_steps: inner steps in meta-validation and meta-test; as many as in training if ``None``.
        order: 2 differentiates through the inner gradients, 1 does not.
        masks: MT-Net.
        masks_head: whether the outputs of the head have masks too (Lee & Choi), or always adapt (Huisman et al., on
            images).
        adapts_first_weight: adapt the weight of the first layer too. The code of Huisman et al. leaves it out in sine
            regression without masks, it seems by oversight.
        clip: bound on the absolute value of each element of an inner gradient.
        norm: whose statistics normalise queries (:class:`~quickstudy.methods.Method`).
    """

    def __init__(
        self,
        backbone: nn.Module,
        inner_lr: float = 0.01,
        steps: int = 5,
        test_steps: int | None = None,
        order: Literal[1, 2] = 2,
        masks: bool = False,
        masks_head: bool = False,
        adapts_first_weight: bool = True,
        clip: float | None = None,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(backbone, inner_lr, steps, test_steps, order, clip=clip, norm=norm)
        if not isinstance(backbone, MLP | Conv4):
            raise RecipeError(
                "TNet transforms the layers of quickstudy.nn.Conv4 and quickstudy.nn.MLP, not of "
                f"{type(backbone).__name__}: use one of them"
            )
        if masks_head and not masks:
            raise RecipeError("masks_head masks the head as well as the other layers: set masks too")
        self.masks = masks
        self.masks_head = masks_head
        self.adapts_first_weight = adapts_first_weight
        self.kind = "linears" if isinstance(backbone, MLP) else "convs"

    def create(self, features: int, outputs: int) -> None:
        super().create(features, outputs)
        if isinstance(self.backbone, MLP):
            nn.init.zeros_(self.head.bias)  # as published; MLP(zero_bias=True) does so with its own
        if not self.adapts_first_weight:
            self.adapted -= {f"backbone.{self.kind}.0.weight"}
        units = [len(layer.bias) for layer in self.layers.values()]
        self.transforms = nn.ParameterList(torch.eye(count) for count in units)
        if self.masks:
            self.zetas = nn.ParameterList(torch.zeros(count) for count in (units if self.masks_head else units[:-1]))

    @property
    def layers(self) -> dict[str, Any]:
        """The linear or convolutional layers of the learner by name: those of the backbone, and the head."""
        body = getattr(self.backbone, self.kind)
        return {**{f"backbone.{self.kind}.{number}": layer for number, layer in enumerate(body)}, "head": self.head}

    def forward(self, x: Tensor) -> Tensor:
        """Run the learner with the weights it has: ``[M, ...]`` to ``[M, outputs]``."""
        weights = {}
        for T, (name, layer) in zip(self.transforms, self.layers.items()):
            # T follows W with nothing between: together they are one layer, of weight T W and bias T b.
            weights[f"{name}.weight"] = (T @ layer.weight.flatten(1)).view_as(layer.weight)
            weights[f"{name}.bias"] = T @ layer.bias
        head = weights.pop("head.weight"), weights.pop("head.bias")
        body = {name.removeprefix("backbone."): weight for name, weight in weights.items()}
        return F.linear(functional_call(self.backbone, body, (x,)), *head)

    def rates(self) -> Mapping[str, Tensor | float]:
        rates = super().rates()
        if not self.masks:
            return rates
        masks: dict[str, Tensor] = {}
        for name, logits in zip(self.layers, self.zetas):
            mask = self.mask(logits)
            masks |= {name: mask, name.replace(self.kind, "norms"): mask}

        def masked(name: str, weight: Tensor) -> Tensor | float:
            mask = masks.get(name.rpartition(".")[0])
            return rates[name] if mask is None else rates[name] * mask.view(-1, *[1] * (weight.dim() - 1))

        return {name: masked(name, weight) for name, weight in self.initial.items()}

    def mask(self, logits: Tensor) -> Tensor:
        """Draw which units adapt in a task: 1 or 0 for each of the ``logits [units]``, with a gradient in training."""
        if not self.training:
            return (logits > 0).to(logits.dtype)
        soft = torch.sigmoid(logits + logistic(logits))
        return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


def logistic(like: Tensor) -> Tensor:
    """Draw from the logistic distribution, a number for each of a tensor's."""
    return torch.logit(torch.rand_like(like))
