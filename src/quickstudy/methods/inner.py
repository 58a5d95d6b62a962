"""Gradients inside a task: what every method with an inner loop is made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Weights = dict[str, Tensor]
"""Named tensors: (fast) weights, or their gradients."""


def gradient(loss: Callable[[Weights], Tensor], weights: Weights, *, second_order: bool) -> Weights:
    """Return the gradient of ``loss`` at ``weights``.

    Args:
        loss: from weights to a scalar.
        weights: where to differentiate.
        second_order: whether the result is a function of the weights that can be differentiated again;
            otherwise it is a constant. Without gradients outside (evaluation) it always is.

    Weights that the loss does not depend on have a gradient of zero.
    """
    second_order = second_order and torch.is_grad_enabled()
    if torch._C._are_functorch_transforms_active():  # inside vmap: autograd.grad cannot see the batched values
        if second_order:
            return torch.func.grad(loss)(weights)
        with torch.no_grad():  # the inner derivative is taken all the same, but no outer graph is kept of it
            return torch.func.grad(loss)({name: weight.detach() for name, weight in weights.items()})
    with torch.enable_grad():
        if not second_order:
            weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        gradients = torch.autograd.grad(
            loss(weights), list(weights.values()), create_graph=second_order, materialize_grads=True
        )
    return dict(zip(weights, gradients))
