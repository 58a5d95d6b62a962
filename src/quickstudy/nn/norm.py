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
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack

from quickstudy.choices import choices_checked
from quickstudy.errors import BackboneError

Statistics = list[tuple[Tensor, Tensor]]
"""Mean and variance, each ``[channels]``, of every batch norm of a network in the order of its forward pass."""

_recording: ContextVar[tuple[Statistics, bool] | None] = ContextVar("recording", default=None)
_replaying: ContextVar[Iterator[tuple[Tensor, Tensor]] | None] = ContextVar("replaying", default=None)


@contextmanager
def recorded(*, unbiased: bool = False) -> Iterator[Statistics]:
    """Collect the statistics of every :class:`BatchNorm` that runs inside.

    Args:
        unbiased: collect not the variance that normalises (the mean square deviation of ``n`` values), but
            ``n / (n - 1)`` times it, of which PyTorch makes its running statistics.
    """
    statistics: Statistics = []
    token = _recording.set((statistics, unbiased))
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


Scale = Literal["ones", "uniform"]


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the second, without running statistics (Ioffe & Szegedy, 2015).

    Args:
        channels: size of axis 1 of the input, ``[M, channels]`` or ``[M, channels, height, width]``.
        eps: added to the (biased) variance.
        scale: what the scales of the channels start from: ``ones``, or a ``uniform`` draw from 0 to 1, as PyTorch began
            them until version 1.1 of 2019, and with it much of what was published until then.
    """

    @choices_checked
    def __init__(self, channels: int, eps: float = 1e-5, scale: Scale = "ones") -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels) if scale == "ones" else torch.rand(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        given, taken = _replaying.get(), _recording.get()
        images = x.dim() > 2
        weight, bias = (p.view(-1, *[1] * (x.dim() - 2)) if images else p for p in (self.weight, self.bias))
        if given is not None:
            mean, variance = (statistic.view_as(weight) for statistic in next(given))
            return (x - mean) * (torch.rsqrt(variance + self.eps) * weight) + bias
        if x.numel() == x.shape[1]:
            raise BackboneError(
                "batch normalisation of a single example has nothing to take statistics from: "
                "use norm='support', or more than one example"
            )
        if taken is None and images and not _inside_grad():
            # On a CPU the kernel for channels-last images sums in single precision, one after the other: gradients are
            # off by percents, and networks train badly (PyTorch 2.13).
            return F.batch_norm(x.contiguous(), None, None, self.weight, self.bias, True, 0.0, self.eps)
        y, _, mean, scale = _Normalise.apply(x, weight, bias, self.eps)
        if taken is not None:
            statistics, unbiased = taken
            variance, count = scale.flatten() ** -2 - self.eps, x.numel() // x.shape[1]
            statistics.append((mean.flatten(), variance * (count / (count - 1)) if unbiased else variance))
        return y

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


_GRADIENTS_MATERIALISE = torch.__version__ < (2, 11)  # pyright: ignore[reportOperatorIssue]
"""Whether a gradient that is not there has to be zeros: before, vmap over a derivative failed without (2.6 does)."""


class _Normalise(torch.autograd.Function):
    """``normal * weight + bias`` with ``normal = (x - mean) * scale`` and ``scale = 1 / sqrt(variance + eps)``.

    Returns it, and ``normal``, ``mean`` and ``scale``. The backward pass in closed form takes half the operations
    of PyTorch's derivative of the primitives, and is itself differentiable. (``torch.var_mean`` would be one
    operation, but a slow one on a CPU.)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes, keep = _axes(x)
        mean = x.mean(axes, keepdim=keep)
        centred = x - mean
        scale = torch.rsqrt((centred * centred).mean(axes, keepdim=keep) + eps)
        normal = centred * scale
        return normal * weight + bias, normal, mean, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, weight, _, _ = inputs
        _, normal, _, scale = output
        ctx.set_materialize_grads(_GRADIENTS_MATERIALISE)
        ctx.save_for_backward(weight, normal, scale)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        weight, normal, scale = ctx.saved_tensors
        axes, keep = _axes(normal)
        share = scale.numel() / normal.numel()  # one over the number of values of a channel
        of_y, of_normal, of_mean, of_scale = slopes
        parts: list[Tensor] = []
        of_weight = of_bias = None

        def through(slope: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
            """Add the slope with respect to x of a slope with respect to ``factor * normal / scale``."""
            along, total = (slope * normal).sum(axes, keepdim=keep), slope.sum(axes, keepdim=keep)
            constant = factor * share
            parts.append(slope * factor - normal * (along * constant) - total * constant)
            return along, total

        if of_y is not None:
            along, total = through(of_y, scale * weight)
            of_weight, of_bias = (s.view_as(weight) for s in (along, total)) if keep else (along, total)
        if of_normal is not None:
            through(of_normal, scale)
        if of_mean is not None:
            parts.append((of_mean * share).expand_as(normal))
        if of_scale is not None:
            parts.append(normal * (of_scale * scale * scale * -share))
        return sum(parts[1:], parts[0]) if parts else None, of_weight, of_bias, None


def _axes(x: Tensor) -> tuple[list[int], bool]:
    """Return the axes that statistics are taken over, and whether these stay as axes of size one."""
    return [0, *range(2, x.dim())], x.dim() > 2


def _inside_grad() -> bool:
    """Tell whether ``torch.func.grad`` is at work.

    There the layer is computed from primitives, for PyTorch's fused batch norm is silently wrong when it is
    differentiated twice under ``vmap``: its gradient is treated as a constant (seen in PyTorch 2.13), and a
    second-order method becomes a first-order one. ``tests/nn/test_norm.py`` proves ours against a loop.
    """
    return any(level.key() == TransformType.Grad for level in get_interpreter_stack() or ())
