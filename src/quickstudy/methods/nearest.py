"""The nearest support example: learns nothing, and is the floor that every learner must rise above."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from quickstudy.methods.base import Method, Norm
from quickstudy.methods.protonet import Distance, distances
from quickstudy.nn import Statistics
from quickstudy.task import Support


class Neighbours(NamedTuple):
    """The state of one task: ``points [M, features]``, ``members [way, M]``, and the statistics of the queries."""

    points: Tensor
    members: Tensor
    statistics: Statistics | None


class NearestNeighbour(Method):
    """A query gets the class of the support example that it is nearest to (Cover & Hart, 1967).

    The logit of a class is minus the distance to the nearest of its examples. With the default backbone, which
    only flattens, distances are between pixels and nothing is meta-learned.

    Args:
        backbone: the embedding in which distances are taken, from ``[M, ...]`` to ``[M, features]``.
        distance: ``euclidean`` is the squared Euclidean distance, ``cosine`` one minus the cosine.
        norm: whose statistics normalise queries (:class:`Method`).
    """

    any_way = True

    def __init__(
        self, backbone: nn.Module | None = None, distance: Distance = "euclidean", norm: Norm = "batch"
    ) -> None:
        super().__init__(nn.Flatten() if backbone is None else backbone, norm)
        self.distance: Distance = distance

    def adapt(self, support: Support) -> Neighbours:
        embedding, statistics = self.embed_support(support.x)
        return Neighbours(embedding, support.members, statistics)

    def predict(self, state: Neighbours, query_x: Tensor) -> Tensor:
        far = distances(self.embed(query_x, state.statistics), state.points, self.distance)  # [Q, M]
        return far[:, None, :].neg().masked_fill(~state.members, -torch.inf).amax(-1)
