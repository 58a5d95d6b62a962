"""Reptile: an initialisation near the weights that training on each task ends at."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quickstudy.errors import RecipeError
from quickstudy.methods.base import Norm, task_loss
from quickstudy.methods.inner import InnerOptimizer, Weights, descend, minibatches
from quickstudy.methods.maml import Adapted, Learner
from quickstudy.task import Support, Task


class Reptile(Learner):
    r"""Reptile (Nichol, Achiam & Schulman, 2018).

    In a task, from :math:`\theta_0 = \theta`, an optimiser takes :math:`T` steps on minibatches to :math:`\theta_T`.
    In meta-training it learns from support and query set alike, and then the initialisation moves towards where it
    came to:

    .. math:: \theta \leftarrow \theta + \epsilon \, \mathrm{mean}_\mathrm{tasks} (\theta_T - \theta)

    So the meta-gradient is :math:`\theta - \theta_T`, a constant, and :math:`\epsilon` the learning rate of an outer
    SGD, published with a linear decay from 1 to 0. The value of the meta-loss is the mean loss of the minibatches.
    With one step of gradient descent on all examples Reptile is joint training: the meta-gradient is the inner
    learning rate times the gradient of the loss.

    The optimiser starts anew in every task. The published code carries the running mean of squared gradients of its
    Adam from task to task, and into each test.

    Args:
        backbone: network from ``[M, ...]`` to ``[M, features]``.
        optimizer: of the inner steps (:class:`~quickstudy.methods.inner.SGD`, or as published
            :class:`~quickstudy.methods.inner.Adam` with ``beta1`` of 0).
        steps: inner steps :math:`T` in meta-training.
        test_steps: inner steps in meta-validation and meta-test; as many as in training if ``None``.
        batch: examples of each step in meta-training; all of them if ``None``.
        test_batch: examples of each step in meta-validation and meta-test; as in training if ``None``. Where it is more
            than there are, some are in it twice.
        norm: whose statistics normalise queries (:class:`Method`). Without transduction the published code normalises
            a query with the support set and itself, which is nearest to ``support``; with transduction it is ``batch``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: InnerOptimizer,
        steps: int = 5,
        test_steps: int | None = None,
        batch: int | None = None,
        test_batch: int | None = None,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(backbone, steps, test_steps, norm)
        if steps < 1:
            raise RecipeError(f"Reptile learns from where its steps lead: take at least one in training, not {steps}")
        if (batch is not None and batch < 1) or (test_batch is not None and test_batch < 1):
            raise RecipeError(
                f"a minibatch of Reptile has at least one example, not {batch} (training), {test_batch} (test)"
            )
        self.optimizer = optimizer
        self.batch = batch
        self.test_batch = batch if test_batch is None else test_batch

    def descend(self, x: Tensor, y: Tensor, way: int | None) -> tuple[Weights, list[Tensor]]:
        """Train on labelled examples; return the weights, and the losses of the minibatches, all of them constants."""

        def loss(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
            return task_loss(functional_call(self, weights, (x,)), y, way)

        size = self.batch if self.training else self.test_batch
        return descend(loss, self.initial, self.optimizer, x, y, minibatches(x, size, self.steps_now))

    def adapt(self, support: Support) -> Adapted:
        return self.finish(self.descend(*support)[0], support)

    def loss(self, task: Task) -> Tensor:
        """Return the mean loss of the minibatches, with :math:`\\theta - \\theta_T` as its gradient."""
        x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
        ends, losses = self.descend(x, y, task.way)
        pull = torch.stack([(w * (w - ends[name]).detach()).sum() for name, w in self.initial.items()]).sum()
        return torch.stack(losses).mean() + (pull - pull.detach())
