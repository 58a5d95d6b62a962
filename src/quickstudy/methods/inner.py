"""Gradients inside a task: what every method with an inner loop is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

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
        if not second_order:
            weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        value, extra = loss(weights)
        gradients = torch.autograd.grad(
            value, list(weights.values()), create_graph=second_order, materialize_grads=True
        )
    if not second_order:
        value, extra = value.detach(), tree_map(Tensor.detach, extra)
    return value, dict(zip(weights, gradients)), extra
