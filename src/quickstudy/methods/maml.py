"""MAML: an initialisation from which a few gradient steps learn a task."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call

from quickstudy.errors import RecipeError
from quickstudy.methods.base import Method, Norm, task_loss
from quickstudy.methods.inner import Weights, gradient
from quickstudy.nn import Statistics, recorded, replayed
from quickstudy.task import Support


class Adapted(NamedTuple):
    """The learner of one task: its fast weights, and the statistics its queries are normalised by."""

    weights: Weights
    statistics: Statistics | None


class MAML(Method):
    r"""Model-agnostic meta-learning (Finn, Abbeel & Levine, 2017).

    The learner is the backbone with a linear head, of weights :math:`\theta`. In a task, from
    :math:`\theta_0 = \theta`, full-batch gradient descent on the support loss:

    .. math:: \theta_{s+1} = \theta_s - \alpha \, \mathrm{clip}(\nabla L_\mathrm{support}(\theta_s))

    The meta-loss is the query loss at the last :math:`\theta_S`, differentiated through all steps (second
    order), or with the inner gradients taken for constants (first order).

    The published relatives are settings: ANIL (Raghu et al., 2020) is ``adapts="head"``, BOIL (Oh et al.,
    2021) ``adapts="body"``, FOMAML ``order=1``. The inner loss is a mean over the support set; Finn's code
    sums it over the ``way`` classes, so that its inner learning rate is ``way`` times smaller than ours.

    Args:
        backbone: network from ``[M, ...]`` to ``[M, features]``.
        inner_lr: inner learning rate :math:`\alpha`.
        steps: inner steps in meta-training.
        test_steps: inner steps in meta-validation and meta-test; as many as in training if ``None``.
        order: 2 differentiates through the inner gradients, 1 does not.
        adapts: which weights change in a task.
        clip: bound on the absolute value of each element of an inner gradient.
        norm: whose statistics normalise queries (:class:`Method`).
    """

    def __init__(
        self,
        backbone: nn.Module,
        inner_lr: float = 0.01,
        steps: int = 5,
        test_steps: int | None = None,
        order: Literal[1, 2] = 2,
        adapts: Literal["all", "head", "body"] = "all",
        clip: float | None = None,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(backbone, norm)
        if steps < 0 or (test_steps is not None and test_steps < 0):
            raise RecipeError(f"MAML takes zero or more inner steps, not {steps} (training), {test_steps} (test)")
        self.inner_lr = inner_lr
        self.steps = steps
        self.test_steps = steps if test_steps is None else test_steps
        self.order = order
        self.adapts = adapts
        self.clip = clip

    def create(self, features: int, outputs: int) -> None:
        self.head = nn.Linear(features, outputs)
        parts = {"all": ("backbone.", "head."), "head": "head.", "body": "backbone."}[self.adapts]
        self.adapted = {name for name, p in self.named_parameters() if p.requires_grad and name.startswith(parts)}

    def forward(self, x: Tensor) -> Tensor:
        """Run the learner with the weights it has: ``[M, ...]`` to ``[M, outputs]``."""
        return self.head(self.backbone(x))

    def adapt(self, support: Support) -> Adapted:
        weights: Weights = {name: weight for name, weight in self.named_parameters() if name in self.adapted}

        def loss(weights: Weights) -> Tensor:
            return task_loss(functional_call(self, weights, (support.x,)), support.y, support.way)

        steps = self.steps if self.training or self.test_steps is None else self.test_steps
        for _ in range(steps):
            slopes = gradient(loss, weights, second_order=self.order == 2)
            if self.clip is not None:
                slopes = {name: slope.clamp(-self.clip, self.clip) for name, slope in slopes.items()}
            weights = {name: weight - self.inner_lr * slopes[name] for name, weight in weights.items()}
        if self.norm == "batch":
            return Adapted(weights, None)
        with recorded() as statistics:  # of the support set, as the adapted learner sees it
            functional_call(self, weights, (support.x,))
        return Adapted(weights, statistics)

    def predict(self, state: Adapted, query_x: Tensor) -> Tensor:
        with nullcontext() if state.statistics is None else replayed(state.statistics):
            return functional_call(self, state.weights, (query_x,))
