"""What a meta-learner is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quickstudy.choices import choices_checked
from quickstudy.errors import RecipeError
from quickstudy.nn import Statistics, adopt, recorded, replayed
from quickstudy.task import Support, Task

Norm = Literal["batch", "support", "joint"]
"""Whose statistics normalise a query: its own batch's (transductive), the support set's, or both sets' together."""


class Method(nn.Module, ABC):
    """A meta-learner: two pure functions, written for one task.

    ::

        state = method.adapt(support)               # learn from the few labelled examples
        predictions = method.predict(state, query_x)  # class logits [Q, way], or targets [Q, D]

    Its parameters are what is meta-learned; all else that it reads (attributes, settings) is constant while
    it trains, for the engine may trace its functions once and for all. It knows nothing of task batches,
    devices, progress or files. ``self.training`` tells meta-training from evaluation, where a method may
    take more inner steps or draw no noise.

    A subclass fills in :meth:`adapt` and :meth:`predict`; :meth:`create` if it has parameters whose size
    the data decides; :meth:`loss` if its meta-loss is more than the query loss.

    Args:
        backbone: any network from ``[M, ...]`` to ``[M, features]``.
        norm: whose statistics the batch norms use on queries. ``batch``: those of the query batch, so that
            predictions are transductive (as most tables were published); ``support``: those of the support
            set, so that each query is predicted on its own; ``joint``: both sets pass together
            (methods that only embed).
    """

    norms: tuple[Norm, ...] = ("batch", "support")
    any_way: bool = False
    """Whether a built method takes tasks of any number of classes, not only of that of the example it was built for."""
    steps: int = 0
    """Inner steps in meta-training, of methods that take some."""
    test_steps: int | None = None
    """The same in meta-validation and meta-test; ``None``: this method takes none."""
    calibration_tasks: int = 0
    """How many meta-training tasks :meth:`calibrate` is to be shown before a test."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = choices_checked(cls.__init__)

    def __init__(self, backbone: nn.Module, norm: Norm = "batch") -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise RecipeError(
                f"the backbone of {type(self).__name__} is a network (a torch.nn.Module, such as Conv4()), not "
                f"{backbone!r}"
            )
        self.backbone = backbone
        self.set_norm(norm)

    def set_norm(self, norm: Norm) -> None:
        """Choose whose statistics normalise queries from now on.

        Raises:
            RecipeError: this method does not offer it.
        """
        if norm not in self.norms:
            raise RecipeError(f"{type(self).__name__} offers norm {' or '.join(self.norms)}, not {norm!r}")
        self.norm: Norm = norm

    @property
    def steps_now(self) -> int:
        """Inner steps to take: those of training, or those of evaluation."""
        return self.steps if self.training or self.test_steps is None else self.test_steps

    def set_test_steps(self, steps: int) -> None:
        """Choose how many inner steps to take in meta-validation and meta-test.

        Raises:
            RecipeError: this method takes none.
        """
        if self.test_steps is None:
            raise RecipeError(f"{type(self).__name__} takes no inner steps")
        if steps < 0:
            raise RecipeError(f"{type(self).__name__} takes zero or more inner steps, not {steps}")
        self.test_steps = steps

    @property
    def built(self) -> bool:
        """Whether :meth:`build` has been called."""
        return hasattr(self, "input_shape")

    def build(self, example: Task) -> Self:
        """Create what depends on the data: layer sizes from one example task.

        Raises:
            BackboneError: the backbone cannot serve (see :func:`quickstudy.nn.adopt`).
        """
        self.way, self.input_shape = example.way, example.support_x.shape[1:]
        try:
            features = adopt(self.backbone, example.support_x)
            outputs = example.way if example.way is not None else example.support_y.shape[-1]
            self.create(features, outputs)
        except BaseException:
            del self.input_shape  # it is not built
            raise
        return self

    def check(self, example: Task) -> None:
        """See whether a built method can take tasks like this one.

        Raises:
            RecipeError: their number of classes, or their inputs, are not those that it was built for.
        """
        name = type(self).__name__
        if example.way != self.way and not self.any_way:
            raise RecipeError(
                f"{name} was built for {self.way}-way tasks and cannot take {example.way}-way ones: its parameters "
                f"depend on the number of classes. Give it {self.way} classes, or train a method that takes any number "
                "(any_way), such as ProtoNet, MatchingNet, LEO, or MAML with head_start: prototypes (ProtoMAML); a "
                "method of your own whose parameters do not says so by any_way = True"
            )
        if example.support_x.shape[1:] != self.input_shape:
            was, now = ("×".join(map(str, shape)) for shape in (self.input_shape, example.support_x.shape[1:]))
            raise RecipeError(f"{name} was built for inputs of {was} and cannot take {now}")

    def create(self, features: int, outputs: int) -> None:
        """Create the parameters beyond the backbone's, for this size of the embedding and of the output."""

    def calibrate(self, tasks: Iterable[Task]) -> None:
        """Look at meta-training tasks once more before a test, for what is measured and not learned.

        The engine calls it without gradients, where :attr:`calibration_tasks` asks for it. What it finds is a buffer.
        """

    @abstractmethod
    def adapt(self, support: Support) -> Any:
        """Learn from the support set; return the state, any nested structure of tensors."""

    @abstractmethod
    def predict(self, state: Any, query_x: Tensor) -> Tensor:
        """Return class logits ``[Q, way]``, or regression targets ``[Q, D]``."""

    def loss(self, task: Task) -> Tensor:
        """Return the meta-loss of one task, a scalar: by default the mean query loss after adaptation."""
        return task_loss(self.predict(self.adapt(task.support), task.query_x), task.query_y, task.way)

    def embed(self, x: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Return the embedding ``[M, features]``, normalised by the given statistics or by the batch's own."""
        if statistics is None:
            return self.backbone(x)
        with replayed(statistics):
            return self.backbone(x)

    def embed_support(self, x: Tensor) -> tuple[Tensor, Statistics | None]:
        """Return the embedding of the support set, and the statistics that its queries are to be given."""
        if self.norm != "support":
            return self.backbone(x), None
        with recorded() as statistics:
            return self.backbone(x), statistics


def task_loss(prediction: Tensor, target: Tensor, way: int | None) -> Tensor:
    """Return the mean cross-entropy (classes) or the mean squared error (regression)."""
    return F.mse_loss(prediction, target) if way is None else F.cross_entropy(prediction, target)


def task_score(prediction: Tensor, target: Tensor, way: int | None) -> Tensor:
    """Return the accuracy in [0, 1] (classes) or the mean squared error (regression)."""
    if way is None:
        return F.mse_loss(prediction, target)
    return (prediction.argmax(-1) == target).to(torch.float32).mean()
