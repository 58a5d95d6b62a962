"""The loop everyone else writes: meta-training in plain PyTorch, one task after the other.

This is the other side of the comparison, written as a competent user writes it today: networks as functions of a
list of weights, ``torch.autograd.grad`` in the inner loop, a backward pass for each task (as in learn2learn's
examples; a single one over the mean of all losses is :attr:`Loop.one_backward`), and ``torch.optim.Adam``. It
imports nothing of Quickstudy.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Weights = Sequence[Tensor]
Network = Callable[[Weights, Tensor], Tensor]
Example = tuple[Tensor, Tensor, Tensor, Tensor]
"""Support inputs and labels, query inputs and labels, of one task; examples ordered by class."""


# ---------------------------------------------------------------------------------------------- networks


def mlp(weights: Weights, x: Tensor) -> Tensor:
    """Linear, ReLU, ..., linear; ``weights`` holds weight and bias of each layer."""
    x = x.flatten(1)
    for i in range(0, len(weights) - 2, 2):
        x = F.relu(F.linear(x, weights[i], weights[i + 1]))
    return F.linear(x, weights[-2], weights[-1])


def mlp_norm(weights: Weights, x: Tensor) -> Tensor:
    """Linear, batch norm, ReLU, ...; four tensors a layer, and two for a linear head if there is one."""
    x = x.flatten(1)
    layers = len(weights) // 4
    for i in range(layers):
        weight, bias, scale, shift = weights[4 * i : 4 * i + 4]
        x = F.relu(F.batch_norm(F.linear(x, weight, bias), None, None, scale, shift, training=True))
    return F.linear(x, weights[-2], weights[-1]) if len(weights) % 4 else x


def conv4(weights: Weights, x: Tensor) -> Tensor:
    """Blocks of convolution, batch norm, ReLU and max-pooling; then a linear head if there is one."""
    layers = len(weights) // 4
    for i in range(layers):
        weight, bias, scale, shift = weights[4 * i : 4 * i + 4]
        x = F.batch_norm(F.conv2d(x, weight, bias, padding=1), None, None, scale, shift, training=True)
        x = F.max_pool2d(F.relu(x), 2)
    x = x.flatten(1)
    return F.linear(x, weights[-2], weights[-1]) if len(weights) % 4 else x


# ---------------------------------------------------------------------------------------------- methods


@dataclass
class MAML:
    """The meta-loss of MAML for one task."""

    network: Network
    steps: int
    inner_lr: float
    order: int
    clip: float | None = None
    regression: bool = False

    def __call__(self, weights: Weights, task: Example) -> Tensor:
        criterion = F.mse_loss if self.regression else F.cross_entropy
        support_x, support_y, query_x, query_y = task
        fast = list(weights)
        for _ in range(self.steps):
            loss = criterion(self.network(fast, support_x), support_y)
            gradients = torch.autograd.grad(loss, fast, create_graph=self.order == 2)
            if self.clip is not None:
                gradients = [gradient.clamp(-self.clip, self.clip) for gradient in gradients]
            fast = [weight - self.inner_lr * gradient for weight, gradient in zip(fast, gradients)]
        return criterion(self.network(fast, query_x), query_y)


@dataclass
class ProtoNet:
    """The loss of a prototypical network for one task."""

    network: Network
    way: int
    joint: bool = False
    """Whether support and query pass the network (and its batch norms) together, as in Snell's code."""

    def __call__(self, weights: Weights, task: Example) -> Tensor:
        support_x, _, query_x, query_y = task
        if self.joint:
            both = self.network(weights, torch.cat([support_x, query_x]))
            support, query = both[: len(support_x)], both[len(support_x) :]
        else:
            support, query = self.network(weights, support_x), self.network(weights, query_x)
        prototypes = support.view(self.way, -1, support.shape[-1]).mean(1)
        distances = (query[:, None] - prototypes[None]).pow(2).sum(-1)
        return F.cross_entropy(-distances, query_y)


# ---------------------------------------------------------------------------------------------- the loop


@dataclass
class Loop:
    """Meta-training.

    Args:
        loss: of one task.
        weights: what is trained; changed in place.
        draw: returns the next task.
        meta_batch: tasks of an update.
        lr: of Adam.
        mean: average the task losses of a meta-batch, not sum them.
        clip_each_task: bound on the running sum of the meta-gradient, applied after every task.
        one_backward: one backward pass over all losses of a meta-batch; needs the memory of all tasks at once.
    """

    loss: Callable[[Weights, Example], Tensor]
    weights: list[Tensor]
    draw: Callable[[], Example]
    meta_batch: int
    lr: float
    mean: bool = False
    clip_each_task: float | None = None
    one_backward: bool = False

    def __post_init__(self) -> None:
        self.weights = [weight.detach().clone().requires_grad_() for weight in self.weights]
        self.optimizer = torch.optim.Adam(self.weights, lr=self.lr)

    def backward(self, draw: Callable[[], Example]) -> None:
        """Leave the meta-gradient of one meta-batch in ``weight.grad``."""
        scale = 1 / self.meta_batch if self.mean else 1.0
        if self.one_backward and self.clip_each_task is None:
            losses = [self.loss(self.weights, draw()) for _ in range(self.meta_batch)]
            (torch.stack(losses).sum() * scale).backward()
            return
        for _ in range(self.meta_batch):
            (self.loss(self.weights, draw()) * scale).backward()
            if self.clip_each_task is not None:
                for weight in self.weights:
                    assert weight.grad is not None
                    weight.grad.clamp_(-self.clip_each_task, self.clip_each_task)

    def update(self) -> None:
        """Do one update."""
        self.optimizer.zero_grad()
        self.backward(self.draw)
        self.optimizer.step()


# ---------------------------------------------------------------------------------------------- data


@dataclass
class PngTasks:
    """Tasks of images that are loaded one by one, as a PyTorch ``Dataset`` with ``ToTensor`` does.

    The files are held in memory and were resized before: no disk, and no more decoding than there has to be.

    Args:
        classes: the PNG files of each class.
        way: classes of a task.
        shot: support images of a class.
        queries: query images of a class.
    """

    classes: Sequence[Sequence[bytes]]
    way: int
    shot: int
    queries: int

    @staticmethod
    def load(png: bytes) -> Tensor:
        """Decode an image; float ``[1, height, width]`` in [0, 1]."""
        with Image.open(io.BytesIO(png)) as picture:
            pixels = np.array(picture.convert("L"))
        return torch.from_numpy(pixels)[None].float().div(255)

    def __call__(self) -> Example:
        support, query = [], []
        for files in random.sample(self.classes, self.way):
            images = [self.load(png) for png in random.sample(files, self.shot + self.queries)]
            support += images[: self.shot]
            query += images[self.shot :]
        return torch.stack(support), labels(self.way, self.shot), torch.stack(query), labels(self.way, self.queries)


@dataclass
class TensorTasks:
    """Tasks of images that lie in memory, decoded: the best that any loader, with however many workers, can do.

    Args:
        images: float ``[classes, images of a class, 1, height, width]``.
        way: classes of a task.
        shot: support images of a class.
        queries: query images of a class.
    """

    images: Tensor
    way: int
    shot: int
    queries: int

    def __call__(self) -> Example:
        support, query = [], []
        for index in torch.randperm(len(self.images))[: self.way].tolist():
            images = self.images[index]
            order = torch.randperm(len(images))
            support.append(images[order[: self.shot]])
            query.append(images[order[self.shot : self.shot + self.queries]])
        return torch.cat(support), labels(self.way, self.shot), torch.cat(query), labels(self.way, self.queries)


@dataclass
class SineTasks:
    """Sine waves, made as they are needed."""

    shot: int
    queries: int

    def __call__(self) -> Example:
        amplitude, phase = random.uniform(0.1, 5.0), random.uniform(0.0, np.pi)
        x = torch.rand(self.shot + self.queries, 1) * 10 - 5
        y = amplitude * torch.sin(x + phase)
        return x[: self.shot], y[: self.shot], x[self.shot :], y[self.shot :]


def labels(way: int, count: int) -> Tensor:
    """Return the labels of examples ordered by class."""
    return torch.arange(way).repeat_interleave(count)
