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


def conv4(weights: Weights, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Blocks of convolution, batch norm, ReLU and max-pooling; then a linear head if there is one."""
    layers = len(weights) // 4
    for i in range(layers):
        weight, bias, scale, shift = weights[4 * i : 4 * i + 4]
        x = F.batch_norm(F.conv2d(x, weight, bias, padding=1), None, None, scale, shift, training=True, eps=eps)
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


@dataclass
class OPLSTM:
    """The meta-loss of OP-LSTM for one task, second order.

    The weights are those of the network layer by layer, then four tensors for each cell of the LSTM of the last layer
    and of that of the others, then gamma if there is one.
    """

    steps: int
    cells: int
    norm: bool
    gamma: bool = False
    regression: bool = False

    def __call__(self, weights: Weights, task: Example) -> Tensor:
        support_x, support_y, query_x, query_y = task
        own = len(weights) - 8 * self.cells - self.gamma
        of_out, of_body = weights[own : own + 4 * self.cells], weights[own + 4 * self.cells : own + 8 * self.cells]
        wide = 4 if self.norm else 2
        layers = [list(weights[:own][i : i + wide]) for i in range(0, own, wide)]
        states: dict[int, list[tuple[Tensor, Tensor]]] = {}
        target = support_y if self.regression else F.one_hot(support_y, len(layers[-1][1])).to(weights[0].dtype)
        inputs = support_x.flatten(1)
        for _ in range(self.steps):
            activations, scales = [inputs], []
            x = inputs
            for weight, bias, *norm in layers[:-1]:
                linear = F.linear(x, weight, bias)
                if norm:
                    x = F.relu(F.batch_norm(linear, None, None, *norm, training=True))
                    deviation = ((linear - linear.mean(0)) ** 2).sum(0)
                    scales.append(norm[0] / torch.sqrt(deviation + 1e-7))
                else:
                    linear = x = F.relu(linear)
                    scales.append(torch.ones_like(bias))
                activations.append(linear)
            activations.append(F.linear(x, layers[-1][0], layers[-1][1]))
            scales.append(torch.ones_like(layers[-1][1]))
            pair = torch.stack([target.flatten(), activations[-1].flatten()], 1)
            signal = self._lstm(of_out, pair, states, len(layers) - 1).view_as(activations[-1])
            signals = [signal]
            for number in reversed(range(len(layers) - 1)):
                message = signals[0] @ layers[number + 1][0]
                pair = torch.stack([activations[number + 1].flatten(), message.flatten()], 1)
                signals.insert(0, self._lstm(of_body, pair, states, number).view_as(message))
            updates = [
                (signal * scale).t() @ activation / len(inputs)
                for signal, scale, activation in zip(signals, scales, activations)
            ]
            if self.gamma:
                norm = torch.sqrt(sum((update**2).sum() for update in updates))
                updates = [weights[-1] * update / norm for update in updates]
            layers = [[layer[0] + update, *layer[1:]] for layer, update in zip(layers, updates)]
        network, criterion = mlp_norm if self.norm else mlp, F.mse_loss if self.regression else F.cross_entropy
        return criterion(network([tensor for layer in layers for tensor in layer], query_x), query_y)

    def _lstm(self, weights: Weights, x: Tensor, states: dict[int, list[tuple[Tensor, Tensor]]], layer: int) -> Tensor:
        new = []
        for number in range(self.cells):
            own = weights[4 * number : 4 * number + 4]
            zeros = x.new_zeros(len(x), own[1].shape[1])
            state = states[layer][number] if layer in states else (zeros, zeros)
            new.append(torch.lstm_cell(x, state, *own))
            x = new[-1][0]
        states[layer] = new
        return x


@dataclass
class PlainLSTM:
    """The meta-loss of a plain LSTM for one task; weights: four tensors a cell, then a linear head."""

    steps: int
    sequential: bool
    regression: bool = False

    def __call__(self, weights: Weights, task: Example) -> Tensor:
        support_x, support_y, query_x, query_y = task
        outputs = len(weights[-1])
        target = support_y if self.regression else F.one_hot(support_y, outputs).to(weights[0].dtype)
        examples = support_x.flatten(1)
        labelled = torch.cat([examples, target], 1)
        unlabelled = torch.cat([examples, torch.zeros_like(target)], 1)
        rows = 1 if self.sequential else len(examples)
        state = [(examples.new_zeros(rows, w.shape[1]),) * 2 for w in weights[1:-2:4]]
        for step in range(self.steps):
            if self.sequential:
                for row in labelled.split(1):
                    state = self._step(weights, row, state)
            else:
                state = self._step(weights, labelled if step or not self.regression else unlabelled, state)
                state = [(h.mean(0, keepdim=True).expand_as(h), c) for h, c in state]
        queries = query_x.flatten(1)
        queries = torch.cat([queries, queries.new_zeros(len(queries), outputs)], 1)
        fresh = [(h[:1].expand(len(queries), -1), c.new_zeros(len(queries), c.shape[1])) for h, c in state]
        prediction = F.linear(self._step(weights, queries, fresh)[-1][0], weights[-2], weights[-1])
        return (F.mse_loss if self.regression else F.cross_entropy)(prediction, query_y)

    def _step(self, weights: Weights, x: Tensor, state: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        new = []
        for number, own in enumerate(state):
            new.append(torch.lstm_cell(x, own, *weights[4 * number : 4 * number + 4]))
            x = new[-1][0]
        return new


@dataclass
class MetaLSTM:
    """The meta-loss of the LSTM meta-learner for one task; weights: network, LSTM cell, then W_F, W_I, b_F, b_I."""

    network: Network
    steps: int

    def __call__(self, weights: Weights, task: Example) -> Tensor:
        support_x, support_y, query_x, query_y = task
        learner, cell, (w_f, w_i, b_f, b_i) = weights[:-8], weights[-8:-4], weights[-4:]
        shapes = [weight.shape for weight in learner]
        theta = torch.cat([weight.flatten() for weight in learner])[:, None]
        h = c = theta.new_zeros(len(theta), cell[1].shape[1])
        f = i = torch.zeros_like(theta)
        for _ in range(self.steps):
            current = self._parts(theta.detach(), shapes)
            for weight in current:
                weight.requires_grad_()
            loss = F.cross_entropy(self.network(current, support_x), support_y)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, current)])[:, None] / len(support_x)
            inputs = torch.cat(
                [self._prepare(loss.detach().view(1, 1)).expand(len(theta), 2), self._prepare(gradient)], 1
            )
            h, c = torch.lstm_cell(inputs, (h, c), *cell)
            f = torch.cat([h, theta, f], 1) @ w_f[:, None] + b_f
            i = torch.cat([h, theta, i], 1) @ w_i[:, None] + b_i
            theta = torch.sigmoid(f) * theta - torch.sigmoid(i) * gradient
        return F.cross_entropy(self.network(self._parts(theta, shapes), query_x), query_y)

    @staticmethod
    def _parts(theta: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        parts = theta.flatten().split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes)]

    @staticmethod
    def _prepare(x: Tensor) -> Tensor:
        large = x.abs() >= np.exp(-10)
        logarithm = torch.where(large, torch.log(x.abs() + 1e-8) / 10, -1.0)
        return torch.cat([logarithm, torch.where(large, x.sign(), x * np.exp(10))], 1)


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
        clip_norm: bound on the norm of the whole meta-gradient.
        clip_each_task: bound on the running sum of the meta-gradient, applied after every task.
        one_backward: one backward pass over all losses of a meta-batch; needs the memory of all tasks at once.
    """

    loss: Callable[[Weights, Example], Tensor]
    weights: list[Tensor]
    draw: Callable[[], Example]
    meta_batch: int
    lr: float
    mean: bool = False
    clip_norm: float | None = None
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
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.weights, self.clip_norm)
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
