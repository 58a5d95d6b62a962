"""Matching networks: a query has the classes of the support examples that it attends to."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from quickstudy.errors import RecipeError
from quickstudy.methods.base import Method, Norm
from quickstudy.methods.nearest import Neighbours
from quickstudy.methods.protonet import Distance, distances
from quickstudy.nn import BidirectionalLSTM, CellState
from quickstudy.nn.lstm import LSTMCell
from quickstudy.task import Support

Reading = Literal["concat", "sum"]
"""How the state of the attention LSTM and what it read of the support set enter its gates: side by side, or added."""
Context = Literal["none", "concat", "sum"]


class MatchingNet(Method):
    r"""Matching networks (Vinyals, Blundell, Lillicrap, Kavukcuoglu & Wierstra, 2016).

    .. math:: p(k \mid x) = \sum_{y_i = k} a(x, x_i), \qquad a(x, \cdot) = \mathrm{softmax}_i(-d(f(x), g(x_i)) / \tau)

    Predictions are the logarithms of these probabilities, computed from those of the attention, so that a query
    which attends to no example of its class has a finite loss and a gradient like any other.

    Without full context embeddings :math:`f` and :math:`g` are the backbone :math:`f'`. With them, they know the
    whole support set :math:`S`: an LSTM reads it in both directions,

    .. math:: g(x_i, S) = \overrightarrow{h}_i + \overleftarrow{h}_i + f'(x_i),

    and :math:`f(x, S)` is an :class:`AttentionLSTM`. The order of the support set then has an influence; tasks
    of this library are ordered by class.

    Nothing depends on the number of classes, so the way in meta-training may differ from the way in test.

    The cosine is bounded, and with it every prediction: of embeddings that end in a ReLU at :math:`\tau = 1` no class
    gets more than :math:`e / (e + \mathrm{way} - 1)`, which is 0.405 of five classes and 0.125 of twenty. A
    temperature of 0.1 lifts the bound.

    Args:
        backbone: the embedding :math:`f'`, from ``[M, ...]`` to ``[M, features]``.
        distance: ``cosine``, as published, is one minus the cosine, ``euclidean`` the squared Euclidean distance.
        temperature: :math:`\tau`, by which distances are divided.
        fce: full context embeddings with the attention LSTM as published, ``concat``, or in the form of a public
            PyTorch re-implementation, ``sum``; or ``none``.
        processing_steps: steps of the attention LSTM.
        norm: whose statistics normalise queries (:class:`Method`). With ``joint`` support and query pass
            the backbone together, in meta-training and in test.
    """

    norms = ("batch", "support", "joint")
    any_way = True

    def __init__(
        self,
        backbone: nn.Module,
        distance: Distance = "cosine",
        temperature: float = 1.0,
        fce: Context = "none",
        processing_steps: int = 2,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(backbone, norm)
        if not temperature > 0:
            raise RecipeError(f"MatchingNet divides distances by a temperature above zero, not by {temperature}")
        if processing_steps < 1:
            raise RecipeError(f"MatchingNet takes at least one processing step, not {processing_steps}")
        self.distance: Distance = distance
        self.temperature = temperature
        self.fce: Context = fce
        self.processing_steps = processing_steps

    def create(self, features: int, outputs: int) -> None:
        if self.fce != "none":
            self.g = BidirectionalLSTM(features, features)
            self.f = AttentionLSTM(features, self.fce, self.processing_steps)

    def adapt(self, support: Support) -> Neighbours | Support:
        if self.norm == "joint":  # nothing can be embedded before the queries are there
            return support
        embedding, statistics = self.embed_support(support.x)
        return Neighbours(self.in_context(embedding), support.members, statistics)

    def predict(self, state: Neighbours | Support, query_x: Tensor) -> Tensor:
        if isinstance(state, Support):
            embedding = self.embed(torch.cat([state.x, query_x]))
            points, members = self.in_context(embedding[: len(state.x)]), state.members
            queries = embedding[len(state.x) :]
        else:
            points, members = state.points, state.members
            queries = self.embed(query_x, state.statistics)
        if self.fce != "none":
            queries = self.f(queries, points)
        attention = (-distances(queries, points, self.distance) / self.temperature).log_softmax(-1)  # [Q, M]
        return attention[:, None, :].masked_fill(~members, -torch.inf).logsumexp(-1)

    def in_context(self, embedding: Tensor) -> Tensor:
        """Return ``g`` of the support set, ``[M, features]``, of its ``embedding [M, features]``."""
        if self.fce == "none":
            return embedding
        onward, backward = self.g(embedding)
        return onward + backward + embedding


class AttentionLSTM(nn.Module):
    r"""Embeds each query anew while reading the support set, ``f(x, S)`` (Vinyals et al., 2016, appendix A.1).

    With :math:`g_i` the support examples and :math:`f'` a query, in steps :math:`k = 1 \dots K`:

    .. math::
        r_{k-1} &= \sum_i \mathrm{softmax}_i(h_{k-1}^\top g_i) \, g_i \\
        (\hat h_k, c_k) &= \mathrm{LSTM}(f', [h_{k-1}; r_{k-1}], c_{k-1}) \\
        h_k &= \hat h_k + f'

    and :math:`f(x, S) = h_K`, from :math:`\hat h_0 = c_0 = 0`, that is :math:`h_0 = f'`. Queries do not see each
    other, and the order of the examples is of no influence.

    Args:
        features: size of an embedding.
        reading: ``concat`` as above; ``sum`` has :math:`h_{k-1} + r_{k-1}` for the recurrent state, which is the same
            with one weight matrix for both.
        steps: number of steps :math:`K`.
    """

    def __init__(self, features: int, reading: Reading, steps: int) -> None:
        super().__init__()
        self.reading: Reading = reading
        self.steps = steps
        # Gates are linear, so that what is recurrent beside h may as well be an input beside f'.
        self.cell = LSTMCell(2 * features if reading == "concat" else features, features)

    def forward(self, queries: Tensor, points: Tensor) -> Tensor:
        """Return the queries ``[Q, features]`` in the context of the examples ``points [M, features]``."""
        h, c = queries, None
        for _ in range(self.steps):
            read = (h @ points.T).softmax(-1) @ points
            if self.reading == "concat":
                state = self.cell(self.cell.inward(torch.cat([queries, read], 1)), CellState(h, c))
            else:
                state = self.cell(self.cell.inward(queries), CellState(h + read, c))
            h, c = state.h + queries, state.c
        return h
