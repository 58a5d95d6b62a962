"""Prototypical networks: a class is the mean of its embedded examples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from quickstudy.errors import RecipeError
from quickstudy.methods.base import Method, Norm
from quickstudy.nn import Statistics
from quickstudy.task import Support, Task

Distance = Literal["euclidean", "cosine"]


class Prototypes(NamedTuple):
    """The state of one task: ``means [way, features]``, and the statistics its queries are normalised by."""

    means: Tensor
    statistics: Statistics | None


class ProtoNet(Method):
    r"""Prototypical networks (Snell, Swersky & Zemel, 2017).

    .. math:: c_k = \frac{1}{K} \sum_{y_i = k} f(x_i), \qquad p(k \mid x) \propto \exp(-d(f(x), c_k) / \tau)

    Nothing depends on the number of classes, so the way in meta-training may differ from the way in test.

    Without meta-training, on a backbone that was trained to tell all meta-training classes apart (a recipe's
    ``pretrained``) or on its embeddings, it is the nearest centroid of SimpleShot (Wang et al., 2019), whose UN, L2N
    and CL2N are the values of ``normalise``.

    Args:
        backbone: the embedding ``f``, from ``[M, ...]`` to ``[M, features]``.
        distance: ``euclidean`` is the squared Euclidean distance, ``cosine`` one minus the cosine.
        normalise: what is done to each embedding before means and distances are taken: nothing; ``l2`` scales it to
            length one; ``centred-l2`` first subtracts the mean embedding of the meta-training classes, which is
            measured before a test (:meth:`calibrate`), and zero until then.
        temperature: :math:`\tau`, by which distances are divided. Which class is the most probable does not depend
            on it, how probable it is does: distances of embeddings of length one are at most 4.
        norm: whose statistics normalise queries (:class:`Method`). With ``joint`` support and query pass
            the embedding together in meta-training, as Snell's code does, and in test.
    """

    norms = ("batch", "support", "joint")
    any_way = True

    def __init__(
        self,
        backbone: nn.Module,
        distance: Distance = "euclidean",
        normalise: Literal["none", "l2", "centred-l2"] = "none",
        temperature: float = 1.0,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(backbone, norm)
        if not temperature > 0:
            raise RecipeError(f"ProtoNet divides distances by a temperature above zero, not by {temperature}")
        self.distance: Distance = distance
        self.normalise = normalise
        self.temperature = temperature
        self.calibration_tasks = 100 if normalise == "centred-l2" else 0

    def create(self, features: int, outputs: int) -> None:
        if self.normalise == "centred-l2":
            self.register_buffer("centre", torch.zeros(features))

    def calibrate(self, tasks: Iterable[Task]) -> None:
        means = [self.embed(torch.cat([task.support_x, task.query_x])).mean(0) for task in tasks]
        self.centre = torch.stack(means).mean(0)

    def adapt(self, support: Support) -> Prototypes | Support:
        if self.norm == "joint":  # nothing can be embedded before the queries are there
            return support
        embedding, statistics = self.embed_support(support.x)
        return Prototypes(prototypes(self.normalised(embedding), support), statistics)

    def predict(self, state: Prototypes | Support, query_x: Tensor) -> Tensor:
        if isinstance(state, Support):
            embedding = self.normalised(self.embed(torch.cat([state.x, query_x])))
            means, queries = prototypes(embedding[: len(state.x)], state), embedding[len(state.x) :]
        else:
            means, queries = state.means, self.normalised(self.embed(query_x, state.statistics))
        return -distances(queries, means, self.distance) / self.temperature

    def normalised(self, embedding: Tensor) -> Tensor:
        """Return embeddings ``[M, features]`` as means and distances are to see them."""
        if self.normalise == "none":
            return embedding
        return _unit(embedding - self.centre if self.normalise == "centred-l2" else embedding)


def prototypes(embedding: Tensor, support: Support) -> Tensor:
    """Return the mean embedding of every class, ``[way, features]``, of ``embedding [M, features]``."""
    member = support.members.to(embedding.dtype)
    return member @ embedding / member.sum(1, keepdim=True)


def distances(queries: Tensor, points: Tensor, kind: Distance) -> Tensor:
    """Return the distance of every query ``[Q, D]`` to every point ``[P, D]``, ``[Q, P]``."""
    if kind == "cosine":
        return 1 - _unit(queries) @ _unit(points).T
    # |q - p|^2 = |q|^2 - 2 q.p + |p|^2: one matrix product, and no [Q, P, D] of differences. The origin is put
    # among the points, for far from it squares are so large that their difference is rounding.
    centre = points.detach().mean(0)
    queries, points = queries - centre, points - centre
    return queries.square().sum(1, keepdim=True) - 2 * queries @ points.T + points.square().sum(1)


def _unit(x: Tensor) -> Tensor:
    """Scale rows to length one; a row of zeros stays one, and has a gradient of zero."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-8)
