"""The LSTM meta-learner: an LSTM whose cell state is the weights of the learner."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quickstudy.errors import RecipeError
from quickstudy.methods.base import Method, Norm, task_loss
from quickstudy.methods.inner import Weights, value_and_gradient
from quickstudy.methods.maml import Adapted
from quickstudy.nn import CoordinateLSTM, Statistics, recorded, replayed
from quickstudy.task import Support


class InnerStep(NamedTuple):
    """One inner step; ``P`` weights, in the order of the parameters of backbone and head.

    Attributes:
        gradient: of the inner loss at the weights before the step, as it enters the update, ``[P]``.
        inputs: what the first layer reads, ``[4, P]``: the loss, then the gradient, preprocessed.
        state: of the first layer, ``h`` and then ``c``, ``[2 * hidden, P]``.
        gates: forget and input gate before their sigmoids, ``[2, P]``.
        weights: after the step, ``[P]``.
        statistics: of each batch norm in the inner batch, with unbiased variances; empty where queries need none.
    """

    gradient: Tensor
    inputs: Tensor
    state: Tensor
    gates: Tensor
    weights: Tensor
    statistics: Statistics


class MetaLSTM(Method):
    r"""LSTM meta-learner (Ravi & Larochelle, 2017).

    The learner is the backbone with a linear head. Its weights :math:`\theta` are the cell state of an LSTM that
    every weight has for itself, with common parameters; their learned values before a task are its first
    cell state. With the loss :math:`L_t` and the gradient :math:`g_t` of an inner batch at :math:`\theta_{t-1}`,
    preprocessed by :func:`preprocess`, for each weight:

    .. math::
        h_t &= \mathrm{LSTM}(L_t, g_t; h_{t-1}) \\
        f_t &= W_F \, [h_t; \theta_{t-1}; f_{t-1}] + b_F \\
        i_t &= W_I \, [h_t; \theta_{t-1}; i_{t-1}] + b_I \\
        \theta_t &= \sigma(f_t) \, \theta_{t-1} - \sigma(i_t) \, g_t

    Gates of one and :math:`\alpha` are gradient descent of step size :math:`\alpha`. The gates are fed back before
    their sigmoids, as in the authors' code. Losses and gradients are constants of the meta-gradient: it has no second
    derivatives.

    Batch norms of the learner use the statistics of the inner batch, and of the query batch in meta-training. In
    evaluation, ``norm="support"`` (published) uses an average over the inner steps of the task, from mean 0 and
    variance 1.

    Args:
        backbone: network from ``[M, ...]`` to ``[M, features]``; published: ``Conv4(32, eps=1e-3)``.
        hidden: size of the first layer.
        steps: passes over the support set in meta-training (published: 8, and 12 with one shot).
        test_steps: passes in meta-validation and meta-test; as many as in training if ``None``.
        batch_size: examples of one inner step, in the order of the support set; all of it if ``None``.
        divide_by_batch: divide the gradient of the mean loss once more by the number of examples (published).
        momentum: weight of the newest statistics in the average (published: 0.95, and 0.9 with one shot).
        gates: how the meta-learner is drawn: the first layer as PyTorch does and :math:`b_F` from 4 to 6, ``wide``,
            or all but the biases of the gates within 0.01 and :math:`b_F` from 4 to 5, ``narrow`` (the authors').
        norm: whose statistics normalise queries in evaluation (:class:`Method`).
    """

    norms = ("support", "batch")

    def __init__(
        self,
        backbone: nn.Module,
        hidden: int = 20,
        steps: int = 8,
        test_steps: int | None = None,
        batch_size: int | None = None,
        divide_by_batch: bool = True,
        momentum: float = 0.95,
        gates: Literal["wide", "narrow"] = "wide",
        norm: Norm = "support",
    ) -> None:
        super().__init__(backbone, norm)
        if hidden < 1:
            raise RecipeError(f"MetaLSTM needs at least one hidden unit, not {hidden}")
        if steps < 1 or (test_steps is not None and test_steps < 0):
            raise RecipeError(f"MetaLSTM takes at least one pass, not {steps} (training), {test_steps} (test)")
        if batch_size is not None and batch_size < 1:
            raise RecipeError(f"MetaLSTM takes at least one example a step, not batch_size {batch_size}")
        if not 0 < momentum <= 1:
            raise RecipeError(f"the newest statistics have a weight above 0 and up to 1, not momentum {momentum}")
        self.steps = steps
        self.test_steps = steps if test_steps is None else test_steps
        self.batch_size = batch_size
        self.divide_by_batch = divide_by_batch
        self.momentum = momentum
        self.lstm = CoordinateLSTM(4, (hidden,))
        self.W_F, self.W_I = (nn.Parameter(torch.empty(hidden + 2).uniform_(-0.01, 0.01)) for _ in range(2))
        self.b_F = nn.Parameter(torch.empty(()).uniform_(4, 6 if gates == "wide" else 5))
        self.b_I = nn.Parameter(torch.empty(()).uniform_(-5, -4))
        if gates == "narrow":
            for parameter in self.lstm.parameters():
                nn.init.uniform_(parameter, -0.01, 0.01)
            nn.init.zeros_(self.lstm.get_parameter("cells.0.bias_hh"))  # the authors' LSTM has one bias

    def create(self, features: int, outputs: int) -> None:
        self.head = nn.Linear(features, outputs)
        parts = ("backbone.", "head.")
        self.adapted = {name for name, p in self.named_parameters() if p.requires_grad and name.startswith(parts)}

    def forward(self, x: Tensor) -> Tensor:
        """Run the learner with the weights it has: ``[M, ...]`` to ``[M, outputs]``."""
        return self.head(self.backbone(x))

    def adapt(self, support: Support) -> Adapted:
        flat, running = None, None
        for step in self.inner_steps(support):
            flat, running = step.weights, self._averaged(running, step.statistics)
        weights = self.learner if flat is None else self.unflatten(flat)
        if not self._records:
            return Adapted(weights, None)
        if running is None:  # no step was taken
            running = self._averaged(None, self._loss(weights, support)[1])
        return Adapted(weights, running)

    def predict(self, state: Adapted, query_x: Tensor) -> Tensor:
        with nullcontext() if state.statistics is None else replayed(state.statistics):
            return functional_call(self, state.weights, (query_x,))

    @property
    def learner(self) -> Weights:
        """The learned weights of backbone and head before a task: the first cell state."""
        return {name: weight for name, weight in self.named_parameters() if name in self.adapted}

    def unflatten(self, flat: Tensor) -> Weights:
        """Return the weights of the learner that lie one after the other in ``flat [P]``."""
        own = self.learner
        parts = flat.split([weight.numel() for weight in own.values()])
        return {name: part.view(weight.shape) for (name, weight), part in zip(own.items(), parts)}

    def inner_steps(self, support: Support) -> Iterator[InnerStep]:
        """Yield the inner steps, one for each batch of each pass over the support set."""
        flat = _flatten(self.learner)
        first_layer = self.lstm.unroll()
        second_layer = torch.stack([self.W_F, self.W_I]), torch.stack([self.b_F, self.b_I])[:, None]
        state, gates = None, None
        size = len(support.x) if self.batch_size is None else self.batch_size
        batches = [Support(x, y, support.way) for x, y in zip(support.x.split(size), support.y.split(size))]
        for batch in batches * self.steps_now:
            loss, slopes, statistics = value_and_gradient(
                lambda weights: self._loss(weights, batch),  # noqa: B023
                self.unflatten(flat),
                second_order=False,
            )
            gradient = _flatten(slopes)
            if self.divide_by_batch:
                gradient = gradient / len(batch.x)
            # A forget gate near one has no digits to spare: half precision is for the learner alone.
            with torch.autocast(flat.device.type, enabled=False):
                inputs = torch.cat([preprocess(loss)[:, None].expand(2, len(flat)), preprocess(gradient)])
                h, state = first_layer(inputs, state)
                gates = _gates(*second_layer, h, flat, gates)
                keep, rate = torch.sigmoid(gates)
                flat = keep * flat - rate * gradient
            yield InnerStep(gradient, inputs, state, gates, flat, statistics)

    @property
    def _records(self) -> bool:
        """Whether queries are normalised by statistics of the support set."""
        return self.norm == "support" and not self.training

    def _loss(self, weights: Weights, batch: Support) -> tuple[Tensor, Statistics]:
        with recorded(unbiased=True) if self._records else nullcontext([]) as statistics:
            prediction = functional_call(self, weights, (batch.x,))
        return task_loss(prediction, batch.y, batch.way), statistics

    def _averaged(self, running: Statistics | None, new: Statistics) -> Statistics:
        if running is None:
            running = [(torch.zeros_like(mean), torch.ones_like(variance)) for mean, variance in new]
        return [
            (mean.lerp(new_mean, self.momentum), variance.lerp(new_variance, self.momentum))
            for (mean, variance), (new_mean, new_variance) in zip(running, new)
        ]


def preprocess(x: Tensor) -> Tensor:
    r"""Return two numbers for each in ``x [...]``, ``[2, ...]``: its magnitude and its sign, at any scale.

    .. math::
        x \mapsto \begin{cases}
        (\log(|x| + 10^{-8}) / 10, \; \mathrm{sign}\, x) & |x| \ge e^{-10} \\
        (-1, \; e^{10} x) & \text{otherwise}
        \end{cases}

    Andrychowicz et al. (2016), with their ``p`` of 10; the summand inside the logarithm is that of the code behind
    the published numbers.
    """
    size = x.abs()
    large = size >= math.exp(-10)
    logarithm = torch.log(torch.where(large, size, 1.0) + 1e-8) / 10  # never of zero
    return torch.stack([torch.where(large, logarithm, -1.0), torch.where(large, x.sign(), x * math.exp(10))])


def _gates(weight: Tensor, bias: Tensor, h: Tensor, theta: Tensor, before: Tensor | None) -> Tensor:
    """Return the gates of the second layer ``[2, P]``, of weights ``[2, hidden + 2]`` and biases ``[2, 1]``."""
    of_h, of_theta, of_gate = weight.split([len(h), 1, 1], dim=1)
    gates = of_h @ h + of_theta * theta + bias
    return gates if before is None else gates + of_gate * before


def _flatten(weights: Weights) -> Tensor:
    return torch.cat([weight.flatten() for weight in weights.values()])
