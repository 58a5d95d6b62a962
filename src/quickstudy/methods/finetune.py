"""Fine-tuning: a new classifier is trained in every task, on a network that was pre-trained, or not at all."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from quickstudy.errors import RecipeError
from quickstudy.methods.base import Norm, task_loss
from quickstudy.methods.inner import InnerOptimizer, Weights, descend, minibatches, random_bits
from quickstudy.methods.maml import Adapted, Learner
from quickstudy.task import Support


class FineTune(Learner):
    r"""Train a new head in every task: the baselines that a meta-learner has to surpass. Nothing is meta-learned.

    With ``adapts="head"`` it is trained on the embeddings of the support set. On a backbone that was trained to tell
    all meta-training classes apart (a recipe's ``pretrained``), the linear head is the Baseline of Chen et al. (2019),
    and the ``cosine`` head their Baseline++:

    .. math:: \mathrm{logit}_k(z) = s \, g_k \, \frac{w_k^\top z}{\lVert w_k \rVert \lVert z \rVert}

    With ``adapts="all"`` the whole network is trained on the support set, from the pre-trained weights or, with
    ``start="scratch"``, from random ones.

    What starts at random is drawn anew in each task: each number of a weight is a random one of those that the weight
    was built with, which is a draw like that of the network's own layers, whatever they are. The draw is a function of
    the support set alone, so that a task has one result.

    Args:
        backbone: network from ``[M, ...]`` to ``[M, features]``.
        optimizer: of the steps (:class:`~quickstudy.methods.inner.SGD` or :class:`~quickstudy.methods.inner.Adam`).
        steps: steps in each task.
        batch: support examples of each step; all of them if ``None``.
        head: ``linear``, or ``cosine``.
        scale: :math:`s` of the cosine head.
        learned_norms: whether :math:`g_k` of the cosine head is trained too, from :math:`\lVert w_k \rVert` (as in the
            published code), or is 1, so that logits are :math:`s` times cosines.
        adapts: what is trained in a task.
        start: where the backbone starts in each task: the weights it has, or random ones.
        norm: whose statistics normalise queries (:class:`Method`).
    """

    any_way = True

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: InnerOptimizer,
        steps: int = 100,
        batch: int | None = None,
        head: Literal["linear", "cosine"] = "linear",
        scale: float = 2.0,
        learned_norms: bool = True,
        adapts: Literal["head", "all"] = "head",
        start: Literal["pretrained", "scratch"] = "pretrained",
        norm: Norm = "batch",
    ) -> None:
        super().__init__(backbone, steps, norm=norm)
        if batch is not None and batch < 1:
            raise RecipeError(f"a minibatch of FineTune has at least one example, not {batch}")
        self.optimizer = optimizer
        self.batch = batch
        self.kind = head
        self.scale = scale
        self.learned_norms = learned_norms
        self.adapts = adapts
        self.start = start

    def create(self, features: int, outputs: int) -> None:
        if self.kind == "cosine" and self.way is None:
            raise RecipeError("a cosine head tells classes apart, and a regression task has none: use head: linear")
        super().create(features, outputs)
        if self.kind == "cosine":
            self.head = CosineHead(features, outputs, self.scale, self.learned_norms)
        heads = self.trained("head.")
        self.adapted = heads if self.adapts == "head" else self.trained("backbone.", "head.")
        self.random = heads if self.start == "pretrained" else self.trained("backbone.", "head.")
        self.requires_grad_(False)  # nothing is meta-learned

    def adapt(self, support: Support) -> Adapted:
        start = self.initial | self.draw(support)

        def loss(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
            network = self.head if self.adapts == "head" else self
            return task_loss(functional_call(network, weights, (x,)), y, support.way)

        x, weights = support.x, start
        if self.adapts == "head":  # the backbone stays as it is: embed once
            x = functional_call(self.backbone, part("backbone.", start), (x,))
            weights = part("head.", start)
        batches = minibatches(support.x, self.batch, self.steps_now)
        weights, _ = descend(loss, weights, self.optimizer, x, support.y, batches)
        if self.adapts == "head":
            weights = start | {f"head.{name}": weight for name, weight in weights.items()}
        return self.finish(weights, support)

    def draw(self, support: Support) -> Weights:
        """Return the random weights that a task starts with: of a head for its classes; from scratch, all of them."""
        outputs = support.y.shape[-1] if support.way is None else support.way
        pools = {name: weight for name, weight in self.named_parameters() if name in self.random}
        shapes = {
            name: (outputs, *pool.shape[1:]) if name.startswith("head.") else pool.shape for name, pool in pools.items()
        }
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        bits = random_bits(support.x, sum(sizes)).split(sizes)
        drawn = {
            name: pool.flatten()[own % pool.numel()].view(shapes[name])
            for (name, pool), own in zip(pools.items(), bits)
        }
        if "head.norms" in drawn:
            drawn["head.norms"] = drawn["head.weight"].norm(dim=1)
        return drawn


class CosineHead(nn.Module):
    """Logits from cosines of embeddings and class weights: ``[M, features]`` to ``[M, outputs]``.

    Args:
        features, outputs: sizes.
        scale: what every cosine is multiplied by.
        learned_norms: multiply it also by a weight of its class.
    """

    def __init__(self, features: int, outputs: int, scale: float, learned_norms: bool) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Linear(features, outputs).weight
        self.norms = nn.Parameter(self.weight.detach().norm(dim=1)) if learned_norms else None

    def forward(self, x: Tensor) -> Tensor:
        cosines = F.normalize(x, eps=1e-5) @ F.normalize(self.weight, eps=1e-5).T
        return self.scale * (cosines if self.norms is None else cosines * self.norms)


def part(prefix: str, weights: Weights) -> Weights:
    """Return the weights whose names begin with a prefix, named without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
