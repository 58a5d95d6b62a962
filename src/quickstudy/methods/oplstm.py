"""OP-LSTM: an LSTM that rewrites weight matrices by outer products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quickstudy.errors import RecipeError
from quickstudy.methods.base import Method, Norm
from quickstudy.nn import MLP, BatchNorm, CoordinateLSTM, Statistics, recorded, replayed
from quickstudy.task import Support

TINY = 1e-24
"""Added to the squared norm of an update: one of zeros stays one, and has a gradient."""


class Layer(NamedTuple):
    """One linear layer of the learner, of weight matrix ``weight + left^T right``.

    A few outer products more are cheaper to apply one by one than to add to a large matrix; and then tasks still have
    that matrix in common.

    Attributes:
        weight: ``[outputs, inputs]``.
        bias: ``[outputs]``, or one number.
        left: ``[products, outputs]``, if there are any.
        right: ``[products, inputs]``.
    """

    weight: Tensor
    bias: Tensor | None
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """The weight matrix ``[outputs, inputs]``."""
        if self.left is None or self.right is None:
            return self.weight
        return self.weight + self.left.T @ self.right

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: ``[M, inputs]`` to ``[M, outputs]``."""
        y = F.linear(x, self.weight, self.bias)
        return y if self.left is None or self.right is None else y + (x @ self.right.T) @ self.left

    def backward(self, signal: Tensor) -> Tensor:
        """Apply the transposed matrix: ``[M, outputs]`` to ``[M, inputs]``."""
        message = signal @ self.weight
        return message if self.left is None or self.right is None else message + (signal @ self.left.T) @ self.right

    def plus(self, signal: Tensor, activation: Tensor, passes: int) -> Layer:
        """Return the layer with ``signal^T activation`` added, one of several ``passes`` that will be."""
        outputs, inputs = self.weight.shape
        if 4 * passes * len(signal) * (outputs + inputs) > outputs * inputs:  # the factor was measured
            return self._replace(weight=self.weight + signal.T @ activation)
        if self.left is None or self.right is None:
            return self._replace(left=signal, right=activation)
        return self._replace(left=torch.cat([self.left, signal]), right=torch.cat([self.right, activation]))


class Pass(NamedTuple):
    """One pass over the support set.

    Attributes:
        before: the layers as they were.
        signals: outputs of the LSTM for each layer, ``[M, outputs]``.
        scaled: the same, divided by M and scaled for batch norms.
        activations: what was recorded: the inputs of the learner, then of each layer, ``[M, outputs]``.
        after: the layers as they are.
    """

    before: list[Layer]
    signals: list[Tensor]
    scaled: list[Tensor]
    activations: list[Tensor]
    after: list[Layer]

    @property
    def updates(self) -> list[Tensor]:
        """Of each weight matrix the mean outer product, before any step size."""
        return [signal.T @ activation for signal, activation in zip(self.scaled, self.activations)]


class Rewritten(NamedTuple):
    """The state of one task: the rewritten layers, and the statistics the queries are normalised by."""

    layers: list[Layer]
    statistics: Statistics | None


class OPLSTM(Method):
    r"""Outer-product LSTM (Huisman, Moerland, Plaat & van Rijn, 2023).

    The learner's weight matrices are the memory of a small LSTM that is applied to every coordinate of every
    example, with common weights. In pass :math:`t` over the support set, with recorded activations :math:`a^l_j` of
    example :math:`j` in layer :math:`l = 1 \dots L`:

    .. math::
        h^L_j &= \varphi_\mathrm{out}(y_j, a^L_j) \\
        h^l_j &= \varphi_\mathrm{body}(a^l_j, e^l_j), \qquad e^l_j = (W^{l+1}_{t-1})^\top h^{l+1}_j \\
        \Delta W^l &= \frac{1}{M} \sum_j h^l_j (a^{l-1}_j)^\top \\
        W^l_t &= W^l_{t-1} + \gamma \, \Delta W^l / \lVert \Delta W \rVert
        \quad\text{or}\quad W^l_{t-1} + \Delta W^l

    The norm is that of the updates of all layers together. With :math:`h^L = -\partial L / \partial a^L` and
    :math:`\varphi_\mathrm{body}(a, e) = e \, [a > 0]` this is gradient descent by back-propagation. Examples meet
    in the mean only (and in batch norms), so their order is of no influence.

    ``adapts="all"`` rewrites all layers of an :class:`~quickstudy.nn.MLP`, ``adapts="head"`` the last layer on any
    backbone.

    Batch norms stand between the layers of the published Omniglot network, and the published code treats them in
    two ways that are arguable; each is an argument here, with the published way as its default.

    Args:
        backbone: ``adapts="all"``: an :class:`~quickstudy.nn.MLP`; otherwise any network to ``[M, features]``.
        hidden: sizes of the LSTM's cells; the last is 1.
        steps: passes over the support set in meta-training.
        test_steps: passes in meta-validation and meta-test; as many as in training if ``None``.
        gamma: initial value of the learned step size; ``None`` adds the update as it is.
        order: 1 takes what the LSTM reads (predictions, activations, messages) for constants, 2 differentiates
            through it.
        adapts: which layers are rewritten.
        bias: of the head, with ``adapts="head"``: one ``scalar`` for all classes (published, and without influence
            on the predicted class), one each ``class``, or ``none``.
        adapts_bias: also add the (step size times the) mean signal of a layer to its bias.
        activations: what is recorded of a layer with a batch norm: the output of its linear map, ``linear``
            (published), or what the next layer reads, ``output``.
        norm_scale: a signal that passes a batch norm is multiplied by the norm's weight and divided by the
            root of the squared deviations of the support set, their ``sum`` (published) or their ``mean``.
        compiled: run the LSTM as compiled code, on a CPU with a C compiler: the same numbers to rounding, faster.
        norm: whose statistics normalise queries (:class:`Method`).
    """

    def __init__(
        self,
        backbone: nn.Module,
        hidden: Sequence[int] = (5, 5, 1),
        steps: int = 1,
        test_steps: int | None = None,
        gamma: float | None = None,
        order: Literal[1, 2] = 2,
        adapts: Literal["all", "head"] = "all",
        bias: Literal["scalar", "class", "none"] = "scalar",
        adapts_bias: bool = False,
        activations: Literal["linear", "output"] = "linear",
        norm_scale: Literal["sum", "mean"] = "sum",
        compiled: bool = False,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(backbone, norm)
        if not hidden or hidden[-1] != 1:
            raise RecipeError(f"OPLSTM gives one number a coordinate: the last of hidden is 1; got {[*hidden]}")
        if steps < 1 or (test_steps is not None and test_steps < 0):
            raise RecipeError(f"OPLSTM takes at least one pass, not {steps} (training), {test_steps} (test)")
        if adapts == "all" and not isinstance(backbone, MLP):
            raise RecipeError(
                f"OPLSTM rewrites all layers of quickstudy.nn.MLP alone, not of {type(backbone).__name__}: "
                "use adapts: head, which rewrites the last layer on any backbone"
            )
        self.steps = steps
        self.test_steps = steps if test_steps is None else test_steps
        self.order = order
        self.adapts = adapts
        self.bias = bias
        self.adapts_bias = adapts_bias
        self.activations = activations
        self.norm_scale = norm_scale
        self.out_lstm = CoordinateLSTM(2, hidden, compiled)
        if adapts == "all":
            self.body_lstm = CoordinateLSTM(2, hidden, compiled)
        self.gamma = None if gamma is None else nn.Parameter(torch.tensor(float(gamma)))

    def create(self, features: int, outputs: int) -> None:
        if self.adapts == "all":
            self.head = nn.Linear(features, outputs)
            return
        self.head = nn.Linear(features, outputs, bias=self.bias == "class")
        if self.bias == "scalar":
            bound = 2**-0.5  # as PyTorch draws the bias of a layer of two inputs, which those of the LSTM are
            self.head.bias = nn.Parameter(torch.empty(1).uniform_(-bound, bound))

    def adapt(self, support: Support) -> Rewritten:
        statistics = None
        if self.adapts == "head":
            inputs, statistics = self.embed_support(support.x)
        else:
            inputs = support.x.flatten(1)
        layers = self.layers
        for done in self.passes(inputs, support):
            layers = done.after
        if self.adapts == "all" and self.norm == "support":
            with recorded() as statistics:  # of the support set, as the rewritten learner sees it
                self.run(layers, inputs)
        return Rewritten(layers, statistics)

    def predict(self, state: Rewritten, query_x: Tensor) -> Tensor:
        if self.adapts == "head":
            return state.layers[0].forward(self.embed(query_x, state.statistics))
        with nullcontext() if state.statistics is None else replayed(state.statistics):
            return self.run(state.layers, query_x.flatten(1))[0][-1]

    @property
    def layers(self) -> list[Layer]:
        """The layers that are rewritten, as they are before a task."""
        linears = [*self.backbone.linears, self.head] if isinstance(self.backbone, MLP) else [self.head]
        return [Layer(linear.weight, linear.bias) for linear in linears[-1 if self.adapts == "head" else 0 :]]

    def passes(self, inputs: Tensor, support: Support) -> Iterator[Pass]:
        """Yield the passes over the support set.

        Args:
            inputs: what the first rewritten layer reads of the support set, ``[M, D]``.
            support: the support set.
        """
        target = support.targets(inputs.dtype)
        rules = [lstm.unroll() for lstm in ([self.body_lstm] if self.adapts == "all" else []) + [self.out_lstm]]
        states: list[Tensor | None] = [None] * len(self.layers)
        layers = self.layers
        count = self.steps_now
        share = 1 / len(inputs)
        for _ in range(count):
            activations, scales, _ = self.run(layers, inputs)
            read = [a.detach() for a in activations] if self.order == 1 else activations
            first, second, rule = target, read[-1], rules[-1]
            signals: list[Tensor] = []
            for number in reversed(range(len(layers))):
                pair = torch.stack([first.flatten(), second.flatten()])
                out, states[number] = rule(pair, states[number])
                signals.insert(0, out.view_as(second))
                if number:
                    message = layers[number].backward(signals[0])
                    first, second = read[number], message.detach() if self.order == 1 else message
                    rule = rules[0]
            scaled = [s * (share if scale is None else share * scale) for s, scale in zip(signals, scales)]
            yield Pass(
                layers, signals, scaled, activations, layers := self._updated(layers, scaled, activations, count)
            )

    def _updated(
        self, layers: list[Layer], signals: list[Tensor], activations: list[Tensor], passes: int
    ) -> list[Layer]:
        if self.gamma is None:
            new = [layer.plus(s, a, passes) for layer, s, a in zip(layers, signals, activations)]
        else:
            # All matrices as one vector: a fourth of the operations, and each as long as the largest alone.
            update = torch.cat([(signal.T @ activation).flatten() for signal, activation in zip(signals, activations)])
            step = self.gamma * torch.rsqrt((update * update).sum() + TINY)
            vector = torch.cat([layer.weight.flatten() for layer in layers]) + step * update
            parts = vector.split([layer.weight.numel() for layer in layers])
            new = [layer._replace(weight=part.view_as(layer.weight)) for layer, part in zip(layers, parts)]
        if self.adapts_bias:
            new = [layer._replace(bias=self._shifted(layer.bias, signal)) for layer, signal in zip(new, signals)]
        return new

    def _shifted(self, bias: Tensor | None, signal: Tensor) -> Tensor | None:
        if bias is None:
            return None
        shift = signal.sum(0) if self.gamma is None else self.gamma * signal.sum(0)
        return bias + (shift if bias.shape == shift.shape else shift.mean())

    def run(self, layers: list[Layer], x: Tensor) -> tuple[list[Tensor], list[Tensor | None], Tensor]:
        """Run the learner on what its first rewritten layer reads, ``[M, D]``.

        Returns:
            What is recorded (``x``, then of each layer, the last being the prediction), what the signal of each layer
            is multiplied by, and what the last layer reads.
        """
        activations, scales = [x], []
        norms = self.backbone.norms if isinstance(self.backbone, MLP) and self.adapts == "all" else []
        for layer, norm in zip(layers, norms):
            linear = layer.forward(x)
            x = F.relu(norm(linear))
            normed = isinstance(norm, BatchNorm)
            activations.append(linear if normed and self.activations == "linear" else x)
            scales.append(norm.weight * torch.rsqrt(self._deviation(linear)) if normed else None)
        return [*activations, layers[-1].forward(x)], [*scales, None], x

    def _deviation(self, linear: Tensor) -> Tensor:
        squares = (linear - linear.mean(0)).square()
        return (squares.sum(0) if self.norm_scale == "sum" else squares.mean(0)) + 1e-7
