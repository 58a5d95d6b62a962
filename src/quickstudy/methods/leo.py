"""LEO: gradient descent in a small latent space, from which the classifier is decoded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quickstudy.errors import RecipeError
from quickstudy.methods.base import Method, Norm, task_loss
from quickstudy.methods.inner import gradient
from quickstudy.nn import Statistics
from quickstudy.task import Support, Task

SMALLEST = 1e-10
"""Lower bound on a standard deviation; at the bound it has no gradient."""


class Decoded(NamedTuple):
    """The classifier of one task, and what the meta-loss says of its latents.

    Attributes:
        weights: of each class, ``[way, features]``.
        statistics: those that a query is normalised by in the backbone.
        kl: divergence of the latents from their prior, a scalar; 0 in evaluation.
        encoder_penalty: mean squared way from the first to the last latents, a scalar; 0 in evaluation.
    """

    weights: Tensor
    statistics: Statistics | None
    kl: Tensor
    encoder_penalty: Tensor


class LEO(Method):
    r"""Latent embedding optimization (Rusu et al., 2019).

    Every support example :math:`i` has latents :math:`z_i`, and a linear classifier :math:`w_i` of its class that is
    decoded from them. With its embedding :math:`x_i`, and the :math:`M` examples of the support set:

    .. math::
        e_i &= W_e x_i \\
        r_i &= \frac{1}{M} \sum_j \mathrm{MLP}([e_i; e_j]) \\
        (\mu_i, s_i) &= \text{mean of } r_j \text{ over the examples } j \text{ of the class of } i \\
        z_i &\sim \mathcal{N}(\mu_i, \sigma(s_i, 0)^2) \\
        (\mu^w_i, s^w_i) &= W_d z_i, \qquad w_i \sim \mathcal{N}(\mu^w_i, \sigma(s^w_i, o)^2) \\
        \sigma(s, o) &= \max(e^s - 1 + o, \; 10^{-10}), \qquad o = \sqrt{2 / (\mathrm{features} + \mathrm{way})}

    The logit of a class is :math:`\langle x, w_i \rangle`, averaged over its support examples. The latents take some
    steps down the cross-entropy of the support set, *summed* over its examples, through the decoder; then the decoded
    classifiers take some. Each dimension of either has a learned step size. No map has a bias.

    The meta-loss of a task, differentiated through all steps:

    .. math::
        L_\mathrm{query} + \lambda_\mathrm{kl} \, D + \lambda_e \, \overline{(\mathrm{sg}[z'] - z)^2}
        + \lambda_2 \, \tfrac12 \sum_W \lVert W \rVert^2 + \lambda_o \, \overline{(C - I)^2}

    Here :math:`D` is the mean over all latents of :math:`\log \mathcal{N}(z; \mu, \sigma) - \log \mathcal{N}(z; 0, 1)`,
    :math:`z'` are the last latents and :math:`\mathrm{sg}` takes them for constants, :math:`W` are the matrices of
    LEO (not step sizes or backbone), and :math:`C` are the correlations of the rows of :math:`W_d`, one for each latent
    dimension. The last two terms are of the parameters alone. The authors count them once an update, beside a mean over
    the tasks; so does ``train.reduction: mean``, for in a mean over tasks what each adds counts once.

    Sampling and dropout are for meta-training only: evaluation takes means everywhere and is deterministic.

    Args:
        backbone: network from ``[M, ...]`` to ``[M, features]``; ``torch.nn.Flatten`` for embeddings.
        latents: size of the latents of an example.
        steps: steps of the latents in meta-training.
        test_steps: the same in meta-validation and meta-test; as many as in training if ``None``.
        finetuning_steps: steps of the decoded classifiers, always.
        inner_lr: initial value of the step sizes of the latents.
        finetuning_lr: initial value of the step sizes of the classifiers.
        dropout: rate at which numbers of embeddings are dropped wherever they are read.
        kl_weight: :math:`\lambda_\mathrm{kl}`.
        encoder_penalty_weight: :math:`\lambda_e`.
        l2_penalty_weight: :math:`\lambda_2`.
        orthogonality_penalty_weight: :math:`\lambda_o`.
        normalise: divide each embedding by its length, as the authors always do.
        norm: whose statistics normalise queries in the backbone (:class:`Method`).
    """

    any_way = True

    def __init__(
        self,
        backbone: nn.Module,
        latents: int = 64,
        steps: int = 5,
        test_steps: int | None = None,
        finetuning_steps: int = 5,
        inner_lr: float = 1.0,
        finetuning_lr: float = 0.001,
        dropout: float = 0.5,
        kl_weight: float = 1e-3,
        encoder_penalty_weight: float = 1e-9,
        l2_penalty_weight: float = 1e-8,
        orthogonality_penalty_weight: float = 1e-3,
        normalise: bool = True,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(backbone, norm)
        if latents < 1:
            raise RecipeError(f"LEO needs at least one latent dimension, not {latents}")
        if min(steps, finetuning_steps) < 0 or (test_steps is not None and test_steps < 0):
            raise RecipeError(
                f"LEO takes zero or more steps, not {steps} (training), {test_steps} (test), {finetuning_steps} "
                "(finetuning)"
            )
        if not 0 <= dropout < 1:
            raise RecipeError(f"LEO drops a part of the embeddings, from 0 to below 1, not {dropout}")
        self.latents = latents
        self.steps = steps
        self.test_steps = steps if test_steps is None else test_steps
        self.finetuning_steps = finetuning_steps
        self.rates = inner_lr, finetuning_lr
        self.dropout = dropout
        self.kl_weight = kl_weight
        self.encoder_penalty_weight = encoder_penalty_weight
        self.l2_penalty_weight = l2_penalty_weight
        self.orthogonality_penalty_weight = orthogonality_penalty_weight
        self.normalise = normalise

    def create(self, features: int, outputs: int) -> None:
        pair = 2 * self.latents
        self.encoder = nn.Linear(features, self.latents, bias=False)
        self.relation = nn.ModuleList(nn.Linear(pair, pair, bias=False) for _ in range(3))
        self.decoder = nn.Linear(self.latents, 2 * features, bias=False)
        for weight in self.matrices:
            nn.init.xavier_uniform_(weight)
        inner_lr, finetuning_lr = self.rates
        self.inner_lr = nn.Parameter(torch.full((self.latents,), float(inner_lr)))
        self.finetuning_lr = nn.Parameter(torch.full((features,), float(finetuning_lr)))

    @property
    def matrices(self) -> list[Tensor]:
        """The weights of encoder, relation network and decoder."""
        return [self.encoder.weight, *self.relation.parameters(), self.decoder.weight]

    def adapt(self, support: Support) -> Decoded:
        x, statistics = self.embed_support(support.x)
        x = self._scaled(x)
        members = support.members.to(x.dtype)
        share = members / members.sum(1, keepdim=True)  # averages over the examples of each class, [way, M]

        first, kl = self.encode(x, members.T @ share)
        latents = _descend(
            lambda z: self.support_loss(self.decode(z, len(share)), x, share, support.y),
            first,
            self.inner_lr,
            self.steps_now,
        )
        classifiers = _descend(
            lambda w: self.support_loss(w, x, share, support.y),
            self.decode(latents, len(share)),
            self.finetuning_lr,
            self.finetuning_steps,
        )
        penalty = (latents.detach() - first).square().mean() if self.training else torch.zeros_like(kl)
        return Decoded(share @ classifiers, statistics, kl, penalty)

    def predict(self, state: Decoded, query_x: Tensor) -> Tensor:
        return self.logits(state.weights, self._scaled(self.embed(query_x, state.statistics)))

    def loss(self, task: Task) -> Tensor:
        state = self.adapt(task.support)
        return (
            task_loss(self.predict(state, task.query_x), task.query_y, task.way)
            + self.kl_weight * state.kl
            + self.encoder_penalty_weight * state.encoder_penalty
            + self.l2_penalty_weight * self.l2_penalty()
            + self.orthogonality_penalty_weight * self.orthogonality_penalty()
        )

    def encode(self, x: Tensor, same_class: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first latents of each support example, ``[M, latents]``, and their divergence from the prior.

        Args:
            x: embeddings, ``[M, features]``.
            same_class: gives each example the mean of its class, ``[M, M]``.
        """
        mean, raw = (same_class @ self.relate(self.encoder(self.drop(x)))).chunk(2, dim=-1)
        if not self.training:
            return mean, mean.new_zeros(())
        deviation, noise = _deviation(raw, 0.0), self.noise(mean)
        latents = mean + deviation * noise
        return latents, ((latents.square() - noise.square()) / 2 - deviation.log()).mean()

    def relate(self, encoded: Tensor) -> Tensor:
        """Return the mean of what the relation network says of an example with each: ``[M, L]`` to ``[M, 2 L]``."""
        first, second, third = self.relation.parameters()
        # A linear map of a pair is the sum of two maps, each of one example; and the mean may come before the last map.
        left, right = (encoded @ half.T for half in first.chunk(2, dim=1))
        pairs = F.relu(F.relu(left[:, None] + right[None]) @ second.T)
        return pairs.mean(1) @ third.T

    def decode(self, latents: Tensor, way: int) -> Tensor:
        """Return the classifier of each support example, ``[M, features]``, from its latents ``[M, latents]``."""
        mean, raw = self.decoder(latents).chunk(2, dim=-1)
        if not self.training:
            return mean
        return mean + _deviation(raw, math.sqrt(2 / (mean.shape[-1] + way))) * self.noise(mean)

    def support_loss(self, classifiers: Tensor, x: Tensor, share: Tensor, y: Tensor) -> Tensor:
        """Return the summed cross-entropy of the support set.

        Args:
            classifiers: of each support example, ``[M, features]``.
            x: embeddings, ``[M, features]``.
            share: averages over the examples of each class, ``[way, M]``.
            y: labels, ``[M]``.
        """
        return F.cross_entropy(self.logits(share @ classifiers, x), y, reduction="sum")

    def logits(self, weights: Tensor, x: Tensor) -> Tensor:
        """Return the logits ``[Q, way]`` of embeddings ``[Q, features]``, given the weights of the classes."""
        return self.drop(x) @ weights.T

    def l2_penalty(self) -> Tensor:
        """Return half the sum of the squares of all matrices."""
        return torch.stack([weight.square().sum() for weight in self.matrices]).sum() / 2

    def orthogonality_penalty(self) -> Tensor:
        """Return the mean square by which the correlations of the decoder's rows differ from the identity."""
        rows = self.decoder.weight.T
        rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + 1e-32)
        return (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).square().mean()

    def drop(self, x: Tensor) -> Tensor:
        """Return ``x`` with other numbers dropped at each call, and the rest scaled up; in evaluation ``x`` itself."""
        if not self.training or not self.dropout:
            return x
        return x * (torch.rand_like(x) >= self.dropout) / (1 - self.dropout)

    def noise(self, like: Tensor) -> Tensor:
        """Return standard normal noise of the shape of ``like``, other at each call."""
        return torch.randn(like.shape, dtype=like.dtype, device=like.device)

    def _scaled(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp(min=1e-12)) if self.normalise else x


def _deviation(raw: Tensor, offset: float) -> Tensor:
    return (torch.expm1(raw) + offset).clamp(min=SMALLEST)


def _descend(loss: Callable[[Tensor], Tensor], point: Tensor, rates: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        slope = gradient(lambda weights: loss(weights["point"]), {"point": point}, second_order=True)["point"]
        point = point - rates * slope
    return point
