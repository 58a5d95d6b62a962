"""Batch normalisation whose statistics are a choice, not a hidden state.

In few-shot learning it matters which examples a batch norm takes its mean and variance from, and a
hidden running average cannot be batched over tasks. Here a layer always uses the statistics of the
batch it is given, unless it is told otherwise::

    with recorded() as statistics:      # a pass over the support set writes its statistics down
        network(support_x)
    with replayed(statistics):          # and a pass over the queries uses them
        network(query_x)

Then one query image is enough, and its prediction does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack

from quickstudy.errors import BackboneError

Statistics = list[tuple[Tensor, Tensor]]
"""Mean and biased variance, each ``[channels]``, of every batch norm of a network in the order of its forward pass."""

_recording: ContextVar[Statistics | None] = ContextVar("recording", default=None)
_replaying: ContextVar[Iterator[tuple[Tensor, Tensor]] | None] = ContextVar("replaying", default=None)


@contextmanager
def recorded() -> Iterator[Statistics]:
    """Collect the statistics of every :class:`BatchNorm` that runs inside."""
    statistics: Statistics = []
    token = _recording.set(statistics)
    try:
        yield statistics
    finally:
        _recording.reset(token)


@contextmanager
def replayed(statistics: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let every :class:`BatchNorm` that runs inside use the given statistics, in the order recorded."""
    token = _replaying.set(iter(statistics))
    try:
        yield
    finally:
        _replaying.reset(token)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the second, without running statistics (Ioffe & Szegedy, 2015).

    Args:
        channels: size of axis 1 of the input, ``[M, channels]`` or ``[M, channels, height, width]``.
        eps: added to the (biased) variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        given, taken = _replaying.get(), _recording.get()
        axes = [0, *range(2, x.dim())]
        shape = (1, -1, *[1] * (x.dim() - 2))
        if given is not None:
            mean, variance = next(given)
            normal = (x - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        elif x.numel() == x.shape[1]:
            raise BackboneError(
                "batch normalisation of a single example has nothing to take statistics from: "
                "use norm='support', or more than one example"
            )
        elif taken is None and x.dim() > 2 and not _inside_grad():
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        else:
            normal, mean, scale = _Standardise.apply(x, axes, self.eps)
            if taken is not None:
                taken.append((mean.flatten(), scale.flatten() ** -2 - self.eps))
        return normal * self.weight.view(shape) + self.bias.view(shape)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


class _Standardise(torch.autograd.Function):
    """``(x - mean) * scale`` with ``scale = 1 / sqrt(variance + eps)``; returns it, the mean and the scale.

    The backward pass in closed form takes half the operations of PyTorch's derivative of the primitives, and
    is itself differentiable. (``torch.var_mean`` would be one operation, but a slow one on a CPU.)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean = x.mean(axes, keepdim=True)
        centred = x - mean
        scale = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
        return centred * scale, mean, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, list[int], float], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.axes = inputs[1]
        ctx.set_materialize_grads(False)
        normal, _, scale = output
        ctx.save_for_backward(normal, scale)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, None, None]:
        normal, scale = ctx.saved_tensors
        of_normal, of_mean, of_scale = slopes
        axes = ctx.axes
        slope = None
        if of_normal is not None:
            along = (of_normal * normal).mean(axes, keepdim=True)
            slope = (of_normal - of_normal.mean(axes, keepdim=True) - normal * along) * scale
        count = normal.numel() // scale.numel()
        if of_mean is not None:
            flat = (of_mean / count).expand_as(normal)
            slope = flat if slope is None else slope + flat
        if of_scale is not None:
            bent = normal * (of_scale * scale * scale / -count)
            slope = bent if slope is None else slope + bent
        return slope, None, None


def _inside_grad() -> bool:
    """Tell whether ``torch.func.grad`` is at work.

    There the layer is computed from primitives, for PyTorch's fused batch norm is silently wrong when it is
    differentiated twice under ``vmap``: its gradient is treated as a constant (seen in PyTorch 2.13), and a
    second-order method becomes a first-order one. ``tests/nn/test_norm.py`` proves ours against a loop.
    """
    return any(level.key() == TransformType.Grad for level in get_interpreter_stack() or ())
