"""MAML: an initialisation from which a few gradient steps learn a task."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quickstudy.errors import RecipeError
from quickstudy.methods.base import Method, Norm, task_loss
from quickstudy.methods.inner import Weights, gradient
from quickstudy.methods.protonet import prototypes
from quickstudy.nn import Statistics, recorded, replayed
from quickstudy.task import Support


class Adapted(NamedTuple):
    """The learner of one task: its fast weights, and the statistics its queries are normalised by."""

    weights: Weights
    statistics: Statistics | None


class Learner(Method):
    """A network with weights that adapt in a task, the learner: what MAML and its relatives have in common.

    Args:
        backbone: network from ``[M, ...]`` to ``[M, features]``; a linear head follows.
        steps: inner steps in meta-training.
        test_steps: inner steps in meta-validation and meta-test; as many as in training if ``None``.
        norm: whose statistics normalise queries (:class:`Method`).
    """

    adapted: set[str]
    """The names of the weights that adapt."""

    def __init__(self, backbone: nn.Module, steps: int, test_steps: int | None = None, norm: Norm = "batch") -> None:
        super().__init__(backbone, norm)
        if steps < 0 or (test_steps is not None and test_steps < 0):
            name = type(self).__name__
            raise RecipeError(f"{name} takes zero or more inner steps, not {steps} (training), {test_steps} (test)")
        self.steps = steps
        self.test_steps = steps if test_steps is None else test_steps

    def create(self, features: int, outputs: int) -> None:
        self.head = nn.Linear(features, outputs)
        self.adapted = self.trained("backbone.", "head.")

    def trained(self, *parts: str) -> set[str]:
        """Return the names of the weights that begin with one of these and are not frozen."""
        return {name for name, p in self.named_parameters() if p.requires_grad and name.startswith(parts)}

    def forward(self, x: Tensor) -> Tensor:
        """Run the learner with the weights it has: ``[M, ...]`` to ``[M, outputs]``."""
        return self.head(self.backbone(x))

    @property
    def initial(self) -> Weights:
        """The weights that adapt, as they are before a task."""
        return {name: weight for name, weight in self.named_parameters() if name in self.adapted}

    def finish(self, weights: Weights, support: Support) -> Adapted:
        """Return the learner of these weights, with the statistics of the support set if its queries need them."""
        if self.norm == "batch":
            return Adapted(weights, None)
        with recorded() as statistics:  # of the support set, as the adapted learner sees it
            functional_call(self, weights, (support.x,))
        return Adapted(weights, statistics)

    def predict(self, state: Adapted, query_x: Tensor) -> Tensor:
        with nullcontext() if state.statistics is None else replayed(state.statistics):
            return functional_call(self, state.weights, (query_x,))


class MAML(Learner):
    r"""Model-agnostic meta-learning (Finn, Abbeel & Levine, 2017).

    The learner is the backbone with a linear head, of weights :math:`\theta`. In a task, from
    :math:`\theta_0 = \theta`, full-batch gradient descent on the support loss:

    .. math:: \theta_{s+1} = \theta_s - \alpha \, \mathrm{clip}(\nabla L_\mathrm{support}(\theta_s))

    The meta-loss is the query loss at the last :math:`\theta_S`, differentiated through all steps (second
    order), or with the inner gradients taken for constants (first order).

    The published relatives are settings:

    - FOMAML is ``order=1``, ANIL (Raghu et al., 2020) ``adapts="head"``, BOIL (Oh et al., 2021) ``adapts="body"``.
    - Meta-SGD (Li et al., 2017) is ``inner_lr_learned="weight"``: a learning rate for every single number in
      :math:`\theta`, of either sign, is meta-learned with it.
    - ProtoMAML (Triantafillou et al., 2020) is ``head_start="prototypes"``: the head of a task starts as a
      prototypical network, :math:`w_k = 2 c_k` and :math:`b_k = -\lVert c_k \rVert^2` with the mean embedding
      :math:`c_k` of the class's support examples, for
      :math:`-\lVert z - c_k \rVert^2 = w_k^\top z + b_k - \lVert z \rVert^2`. The meta-gradient passes through
      it, and tasks may have any number of classes.

    The inner loss is a mean over the support set; Finn's code sums it over the ``way`` classes, so that its inner
    learning rate is ``way`` times smaller than ours.

    Args:
        backbone: network from ``[M, ...]`` to ``[M, features]``.
        inner_lr: inner learning rate :math:`\alpha`.
        steps: inner steps in meta-training.
        test_steps: inner steps in meta-validation and meta-test; as many as in training if ``None``.
        order: 2 differentiates through the inner gradients, 1 does not.
        adapts: which weights change in a task.
        clip: bound on the absolute value of each element of an inner gradient.
        inner_lr_learned: which inner learning rates are meta-learned, from :math:`\alpha`: ``none``, one of each
            ``layer`` (more precisely, of each weight matrix, kernel or bias), or one of each single ``weight``.
        inner_lr_range: the learned ones start instead from one value drawn between these two (Meta-SGD).
        head_start: whether the head that a task starts with is ``learned``, or made of the task's ``prototypes``.
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
        inner_lr_learned: Literal["none", "layer", "weight"] = "none",
        inner_lr_range: tuple[float, float] | None = None,
        head_start: Literal["learned", "prototypes"] = "learned",
        norm: Norm = "batch",
    ) -> None:
        super().__init__(backbone, steps, test_steps, norm)
        if inner_lr_range is not None and inner_lr_learned == "none":
            raise RecipeError("inner_lr_range is where learned rates start: set inner_lr_learned, or inner_lr alone")
        if head_start == "prototypes" and adapts == "body":
            raise RecipeError("head_start: prototypes is for heads that adapt, and with adapts: body none does")
        self.inner_lr = inner_lr
        self.order = order
        self.adapts = adapts
        self.clip = clip
        self.inner_lr_learned = inner_lr_learned
        self.inner_lr_range = inner_lr_range
        self.head_start = head_start
        self.any_way = head_start == "prototypes" and inner_lr_learned != "weight"  # of the head's single weights

    def create(self, features: int, outputs: int) -> None:
        super().create(features, outputs)
        parts = {"all": ("backbone.", "head."), "head": ("head.",), "body": ("backbone.",)}[self.adapts]
        self.adapted = self.trained(*parts)
        if self.head_start == "prototypes":
            self.head.requires_grad_(False)  # it holds the place of those that tasks make
        if self.inner_lr_learned != "none":
            rate = torch.empty(()).uniform_(*self.inner_lr_range or (self.inner_lr, self.inner_lr))
            single = self.inner_lr_learned == "weight"
            self.inner_lrs = nn.ParameterList(
                rate.expand(weight.shape if single else ()).clone() for weight in self.initial.values()
            )

    def adapt(self, support: Support) -> Adapted:
        weights, rates = self.initial, self.rates()
        if self.head_start == "prototypes":
            means = prototypes(self.backbone(support.x), support)
            weights |= {"head.weight": 2 * means, "head.bias": -means.square().sum(1)}
        for _ in range(self.steps_now):
            weights = self.step(weights, rates, support)
        return self.finish(weights, support)

    def rates(self) -> Mapping[str, Tensor | float]:
        """Return the inner learning rate of each weight that adapts, or of each of its elements, for one task."""
        if self.inner_lr_learned == "none":
            return dict.fromkeys(self.adapted, self.inner_lr)
        return dict(zip(self.initial, self.inner_lrs))

    def step(
        self, weights: Weights, rates: Mapping[str, Tensor | float], support: Support, given: Weights | None = None
    ) -> Weights:
        """Take one inner step.

        Args:
            weights: before the step.
            rates: as of :meth:`rates`.
            support: what to learn from.
            given: values of parameters that do not adapt, in place of their own.
        """

        def loss(weights: Weights) -> Tensor:
            return task_loss(functional_call(self, weights | (given or {}), (support.x,)), support.y, support.way)

        slopes = gradient(loss, weights, second_order=self.order == 2)
        if self.clip is not None:
            slopes = {name: slope.clamp(-self.clip, self.clip) for name, slope in slopes.items()}
        return {name: weight - rates[name] * slopes[name] for name, weight in weights.items()}
