"""Prototypical networks: a class is the mean of its embedded examples."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from quickstudy.methods.base import Method, Norm
from quickstudy.nn import Statistics
from quickstudy.task import Support

Distance = Literal["euclidean", "cosine"]


class Prototypes(NamedTuple):
    """The state of one task: ``means [way, features]``, and the statistics its queries are normalised by."""

    means: Tensor
    statistics: Statistics | None


class ProtoNet(Method):
    r"""Prototypical networks (Snell, Swersky & Zemel, 2017).

    .. math:: c_k = \frac{1}{K} \sum_{y_i = k} f(x_i), \qquad p(k \mid x) \propto \exp(-d(f(x), c_k))

    Nothing depends on the number of classes, so the way in meta-training may differ from the way in test.

    Args:
        backbone: the embedding ``f``, from ``[M, ...]`` to ``[M, features]``.
        distance: ``euclidean`` is the squared Euclidean distance, ``cosine`` one minus the cosine.
        norm: whose statistics normalise queries (:class:`Method`). With ``joint`` support and query pass
            the embedding together in meta-training, as Snell's code does, and in test.
    """

    norms = ("batch", "support", "joint")
    any_way = True

    def __init__(self, backbone: nn.Module, distance: Distance = "euclidean", norm: Norm = "batch") -> None:
        super().__init__(backbone, norm)
        self.distance: Distance = distance

    def adapt(self, support: Support) -> Prototypes | Support:
        if self.norm == "joint":  # nothing can be embedded before the queries are there
            return support
        embedding, statistics = self.embed_support(support.x)
        return Prototypes(prototypes(embedding, support), statistics)

    def predict(self, state: Prototypes | Support, query_x: Tensor) -> Tensor:
        if isinstance(state, Support):
            embedding = self.embed(torch.cat([state.x, query_x]))
            means, queries = prototypes(embedding[: len(state.x)], state), embedding[len(state.x) :]
        else:
            means, queries = state.means, self.embed(query_x, state.statistics)
        return -distances(queries, means, self.distance)


def prototypes(embedding: Tensor, support: Support) -> Tensor:
    """Return the mean embedding of every class, ``[way, features]``, of ``embedding [M, features]``."""
    member = support.members.to(embedding.dtype)
    return member @ embedding / member.sum(1, keepdim=True)


def distances(queries: Tensor, points: Tensor, kind: Distance) -> Tensor:
    """Return the distance of every query ``[Q, D]`` to every point ``[P, D]``, ``[Q, P]``."""
    if kind == "cosine":
        return 1 - _unit(queries) @ _unit(points).T
    # |q - p|^2 = |q|^2 - 2 q.p + |p|^2: one matrix product, and no [Q, P, D] of differences
    return queries.square().sum(1, keepdim=True) - 2 * queries @ points.T + points.square().sum(1)


def _unit(x: Tensor) -> Tensor:
    """Scale rows to length one; a row of zeros stays one, and has a gradient of zero."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-8)
