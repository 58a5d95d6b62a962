"""Statistics of batch norms taken once, of many images, for networks that must embed a single one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from quickstudy.nn.norm import Statistics, recorded, replayed


class FixedStatistics(nn.Module):
    """A network whose batch norms use given statistics, which are buffers: an image is embedded on its own.

    Our :class:`~quickstudy.nn.BatchNorm` has no running statistics. A network that was trained on large batches, each
    normalised by its own statistics, gets those of all its training images from :func:`population_statistics` instead.

    Args:
        backbone: the network.
        statistics: of its batch norms, in the order of its forward pass.

    Shapes: those of the network.
    """

    def __init__(self, backbone: nn.Module, statistics: Statistics) -> None:
        super().__init__()
        self.backbone = backbone
        self.norms = len(statistics)
        for number, (mean, variance) in enumerate(statistics):
            self.register_buffer(f"mean_{number}", mean)
            self.register_buffer(f"variance_{number}", variance)

    @classmethod
    def restore(cls, backbone: nn.Module, state: Mapping[str, Tensor]) -> Self:
        """Return a network of the same kind with the weights and the statistics of a ``state_dict()``."""
        norms = sum(name.startswith("mean_") for name in state)
        fixed = cls(backbone, [(state[f"mean_{i}"], state[f"variance_{i}"]) for i in range(norms)])
        fixed.load_state_dict(dict(state))
        return fixed

    @property
    def statistics(self) -> Statistics:
        """Mean and variance of every batch norm."""
        return [(getattr(self, f"mean_{i}"), getattr(self, f"variance_{i}")) for i in range(self.norms)]

    def forward(self, x: Tensor) -> Tensor:
        with replayed(self.statistics):
            return self.backbone(x)


@torch.no_grad()
def population_statistics(network: nn.Module, batches: Iterable[Tensor]) -> Statistics:
    r"""Return the statistics of many images, for :class:`FixedStatistics` (Wu & Johnson, 2021, "precise BatchNorm").

    Batches of them pass through the network as in training, each normalised by its own statistics :math:`\mu_b, v_b` in
    every layer; with the share :math:`w_b` of images in batch :math:`b`,

    .. math:: \mu = \sum_b w_b \mu_b, \qquad v = \sum_b w_b \left( v_b + (\mu_b - \mu)^2 \right)

    A moving average over training would mix in those of weights that are no more.

    Args:
        network: in the mode (training or evaluation) whose statistics are wanted.
        batches: of images ``[M, ...]`` of all classes, as large as those it was trained on.
    """
    sizes, parts = [], []
    for batch in batches:
        with recorded() as statistics:
            network(batch)
        sizes.append(len(batch))
        parts.append(statistics)
    pooled: Statistics = []
    for norm in zip(*parts):
        means, variances = (torch.stack(tensors).cpu().double() for tensors in zip(*norm))  # [batches, channels]
        shares = means.new_tensor(sizes)[:, None] / sum(sizes)
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        pooled.append((mean.to(norm[0][0]), variance.to(norm[0][0])))
    return pooled
