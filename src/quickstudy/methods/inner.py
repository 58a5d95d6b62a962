"""Gradients and descent inside a task: what every method with an inner loop is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Weights = dict[str, Tensor]
"""Named tensors: (fast) weights, or their gradients."""

Extra = TypeVar("Extra")


def gradient(loss: Callable[[Weights], Tensor], weights: Weights, *, second_order: bool) -> Weights:
    """Return the gradient of ``loss`` at ``weights``.

    Args:
        loss: from weights to a scalar.
        weights: where to differentiate.
        second_order: whether the result is a function of the weights that can be differentiated again;
            otherwise it is a constant. Without gradients outside (evaluation) it always is.

    Weights that the loss does not depend on have a gradient of zero.
    """
    return value_and_gradient(lambda weights: (loss(weights), []), weights, second_order=second_order)[1]


def value_and_gradient(
    loss: Callable[[Weights], tuple[Tensor, Extra]], weights: Weights, *, second_order: bool
) -> tuple[Tensor, Weights, Extra]:
    """Return the value of ``loss`` at ``weights``, its :func:`gradient`, and what else was found on the way.

    Args:
        loss: from weights to a scalar and anything else, any nested structure of tensors.
        weights, second_order: as of :func:`gradient`; not only the gradient is a constant, but all results.
    """
    second_order = second_order and torch.is_grad_enabled()
    if torch._C._are_functorch_transforms_active():  # inside vmap: autograd.grad cannot see the batched values
        differentiate = torch.func.grad_and_value(loss, has_aux=True)
        if second_order:
            gradients, (value, extra) = differentiate(weights)
            return value, gradients, extra
        with torch.no_grad():  # the inner derivative is taken all the same, but no outer graph is kept of it
            gradients, (value, extra) = differentiate({name: weight.detach() for name, weight in weights.items()})
            return value, gradients, extra
    with torch.enable_grad():
        if second_order:  # at views of them: some may depend on others, but not inside the loss
            weights = {name: weight.view_as(weight) for name, weight in weights.items()}
        else:
            weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        value, extra = loss(weights)
        gradients = torch.autograd.grad(
            value, list(weights.values()), create_graph=second_order, materialize_grads=True
        )
    if not second_order:
        value, extra = value.detach(), tree_map(Tensor.detach, extra)
    return value, dict(zip(weights, gradients)), extra


class InnerOptimizer(ABC):
    """An optimiser as a pure function, to descend with inside a task."""

    @abstractmethod
    def step(self, weights: Weights, slopes: Weights, state: Any | None) -> tuple[Weights, Any]:
        """Take one step; return the new weights, and the state that the next step is to be given (``None``: the first).

        Args:
            weights: before the step.
            slopes: the gradient of the loss at these weights.
            state: what the step before has returned.
        """


class SGD(InnerOptimizer):
    """Stochastic gradient descent with momentum, as ``torch.optim.SGD`` has it.

    Args:
        lr: learning rate.
        momentum: share of the running sum of gradients that a step keeps.
        dampening: share of a new gradient that is not added to it.
        weight_decay: how many times the weights are added to the gradient.
    """

    def __init__(self, lr: float, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0) -> None:
        self.lr, self.momentum, self.dampening, self.weight_decay = lr, momentum, dampening, weight_decay

    def step(self, weights: Weights, slopes: Weights, state: Weights | None) -> tuple[Weights, Weights]:
        if self.weight_decay:
            slopes = {name: slope + self.weight_decay * weights[name] for name, slope in slopes.items()}
        if self.momentum and state is not None:
            fresh = 1 - self.dampening
            slopes = {name: self.momentum * state[name] + fresh * slope for name, slope in slopes.items()}
        return {name: weight - self.lr * slopes[name] for name, weight in weights.items()}, slopes


class Adam(InnerOptimizer):
    """Adam (Kingma & Ba, 2015), as ``torch.optim.Adam`` has it.

    Args:
        lr: learning rate.
        beta1: share of the running mean of gradients that a step keeps; Reptile is published with 0.
        beta2: share of the running mean of their squares that a step keeps.
        eps: added to the root of that mean.
    """

    def __init__(self, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.lr, self.beta1, self.beta2, self.eps = lr, beta1, beta2, eps

    def step(
        self, weights: Weights, slopes: Weights, state: tuple[int, Weights, Weights] | None
    ) -> tuple[Weights, tuple[int, Weights, Weights]]:
        zeros = {name: torch.zeros_like(slope) for name, slope in slopes.items()}
        count, means, squares = state or (0, zeros, zeros)
        count += 1
        means = {name: self.beta1 * means[name] + (1 - self.beta1) * slope for name, slope in slopes.items()}
        squares = {name: self.beta2 * squares[name] + (1 - self.beta2) * slope**2 for name, slope in slopes.items()}
        rate, root = self.lr / (1 - self.beta1**count), (1 - self.beta2**count) ** 0.5
        weights = {
            name: weight - rate * means[name] / (squares[name].sqrt() / root + self.eps)
            for name, weight in weights.items()
        }
        return weights, (count, means, squares)


def descend(
    loss: Callable[[Weights, Tensor, Tensor], Tensor],
    weights: Weights,
    optimizer: InnerOptimizer,
    x: Tensor,
    y: Tensor,
    batches: Iterable[Tensor | slice],
) -> tuple[Weights, list[Tensor]]:
    """Train weights on the examples of a task; return them, and the loss before each step. Both are constants.

    Args:
        loss: from weights, ``[batch, ...]`` examples and their targets to a scalar.
        weights: to start from.
        optimizer: takes the steps.
        x: examples ``[M, ...]``.
        y: their targets ``[M, ...]``.
        batches: which examples each step is to learn from (:func:`minibatches`).
    """
    weights, state, losses = {name: weight.detach() for name, weight in weights.items()}, None, []
    for chosen in batches:
        value, slopes, _ = value_and_gradient(
            lambda weights: (loss(weights, x[chosen], y[chosen]), []),  # noqa: B023
            weights,
            second_order=False,
        )
        weights, state = optimizer.step(weights, slopes, state)
        losses.append(value)
    return weights, losses


def minibatches(x: Tensor, size: int | None, count: int) -> Sequence[Tensor | slice]:
    """Return which examples of a task make up each minibatch, int64 ``[size]``; without a size all of them do.

    The examples are shuffled, dealt out, shuffled again, and so on: a minibatch may end one round and begin the next.

    Args:
        x: the examples ``[M, ...]`` as the task gives them, for they are what shuffles them (:func:`random_bits`).
        size: examples of a minibatch.
        count: how many.
    """
    if size is None:
        return [slice(None)] * count
    rounds = -(-count * size // len(x))
    order = random_bits(x, rounds * len(x)).view(rounds, len(x)).argsort(1).flatten()
    return order[: count * size].view(count, size).unbind()


def random_bits(x: Tensor, count: int) -> Tensor:
    """Return pseudo-random int64 numbers from 0 to 2^63 - 1, ``[count]``, that depend on the values in ``x`` alone.

    What a task draws with them is its own, and the same however tasks are batched, and whenever the task comes again:
    no generator has a state. They are the hash of a counter and a key, as of SplitMix64 (Steele et al., 2014); the key
    is of all bits of ``x``, so give the task's own inputs, and nothing computed that is rounded here so and there so.
    """
    key = x.detach().to(torch.float32).view(torch.int32).sum()  # of the bits, as whole numbers: in any order
    bits = torch.arange(count, device=x.device) + key * 0x1E3779B97F4A7C15
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):  # odd numbers, as of 64 bits
        bits = (bits ^ (bits >> shift)) * factor
    return (bits ^ (bits >> 31)) & 0x7FFFFFFFFFFFFFFF
