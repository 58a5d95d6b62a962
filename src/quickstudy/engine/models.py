"""One-task functions of a method, run over batches of tasks and over several seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from quickstudy.engine.tracing import Program, trace
from quickstudy.errors import BackboneError
from quickstudy.methods import Method, task_loss, task_score
from quickstudy.task import Task

LOOP = 0
"""The chunk size that stands for a plain loop over tasks, without ``vmap``."""

TaskFunction = Callable[[Method, Task], Tensor]
"""A function of one task, written for one method with its own parameters."""


def meta_loss(method: Method, task: Task) -> Tensor:
    """Return the meta-loss of one task, a scalar."""
    return method.loss(task)


def scores(method: Method, task: Task) -> Tensor:
    """Return the query loss and the score (accuracy or mean squared error) after adaptation, ``[2]``."""
    prediction = method.predict(method.adapt(task.support), task.query_x)
    return torch.stack([task_loss(prediction, task.query_y, task.way), task_score(prediction, task.query_y, task.way)])


class _Bound(nn.Module):
    """Lets ``functional_call`` swap the parameters of a method while any function of it runs."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, function: TaskFunction, task: Task) -> Tensor:
        return function(self.method, task)


class Models:
    """A method with the parameters of one seed, or with those of several stacked on a leading axis.

    Args:
        methods: one built method for each seed.

    With several seeds (``stacked``) every parameter, and every batch of tasks, has an axis of seeds in
    front, and nothing that is computed for one seed depends on another.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        self.method = methods[0]
        self.seeds = len(methods)
        self.stacked = len(methods) > 1
        self._bound = _Bound(self.method)
        self._programs: dict[Hashable, Program | None] = {}  # None: cannot be traced

        def gather(named: Callable[[Method], Iterator[tuple[str, Tensor]]]) -> dict[str, Tensor]:
            tensors = [dict(named(method)) for method in methods]
            return {
                name: torch.stack([own[name].detach() for own in tensors]) if self.stacked else tensor.detach().clone()
                for name, tensor in tensors[0].items()
            }

        trained = {name: p.requires_grad for name, p in self.method.named_parameters()}
        self.parameters = {
            name: tensor.requires_grad_(trained[name]) for name, tensor in gather(Method.named_parameters).items()
        }
        self.buffers = gather(Method.named_buffers)

    @property
    def trained(self) -> dict[str, Tensor]:
        """The meta-learned parameters."""
        return {name: tensor for name, tensor in self.parameters.items() if tensor.requires_grad}

    def state(self, seed: int) -> dict[str, Tensor]:
        """Return the parameters and buffers of one seed (by position), detached copies."""
        tensors = {**self.parameters, **self.buffers}
        return {name: (t[seed] if self.stacked else t).detach().clone() for name, t in tensors.items()}

    @torch.no_grad()
    def load_state(self, seed: int, state: dict[str, Tensor]) -> None:
        """Set the parameters and buffers of one seed (by position)."""
        for name, tensor in {**self.parameters, **self.buffers}.items():
            (tensor[seed] if self.stacked else tensor).copy_(state[name])

    def run(self, function: TaskFunction, batch: Task, chunk: int, *, traced: bool = False) -> Iterator[Tensor]:
        """Run a one-task function over a batch of tasks.

        Args:
            function: what to compute for each task.
            batch: tasks ``[B, ...]``, or ``[seeds, B, ...]`` when stacked.
            chunk: tasks that run at once under ``vmap``; :data:`LOOP` runs them one by one without it.
            traced: run it as a flat program, traced once (then without gradients).

        Yields:
            The results of one chunk after the other, ``[c, ...]`` or ``[seeds, c, ...]``.
        """
        trained, fixed = self._tensors()
        for piece in self._pieces(batch, chunk):

            def compute(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
                return [self._call(function, inputs, batch.way, chunk)]

            inputs = [*trained, *fixed, *piece.tensors]
            program = self._program((function, chunk, batch.way), compute, inputs) if traced else compute
            result = program(inputs)[0]
            yield result[None] if chunk == LOOP else result

    def differentiate(
        self, function: TaskFunction, batch: Task, chunk: int, *, traced: bool = False, each_task: bool = False
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Run a scalar one-task function over a batch of tasks, and differentiate it.

        Args:
            function, batch, chunk, traced: as of :meth:`run`.
            each_task: give the gradient of every task, and not that of the sum of a chunk.

        Yields:
            For one chunk after the other, the values, ``[c]`` or ``[seeds, c]``, and the gradient with respect to
            every trained parameter, ``[...]`` or ``[seeds, ...]``; of each task, ``[c, ...]`` or ``[seeds, c, ...]``.
        """
        trained, fixed = self._tensors()
        count = len(trained)
        axis = int(self.stacked)
        for piece in self._pieces(batch, chunk):
            mapped = each_task and chunk != LOOP
            inputs = [*trained, *fixed, *piece.tensors]

            def compute(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
                own = list(inputs[:count])
                if mapped:  # noqa: B023
                    tasks = inputs[-1].shape[axis]
                    own = [p.unsqueeze(axis).expand(*p.shape[:axis], tasks, *p.shape[axis:]) for p in own]
                values = self._call(function, [*own, *inputs[count:]], batch.way, chunk, own_weights=mapped)  # noqa: B023
                return [values.detach(), *torch.autograd.grad(values.sum(), own, materialize_grads=True)]

            purpose = (function, chunk, batch.way, "gradient", each_task)
            program = self._program(purpose, compute, inputs) if traced else compute
            values, *gradients = program(inputs)
            if chunk == LOOP:
                values, gradients = values[None], [g[None] for g in gradients] if each_task else gradients
            yield values, gradients

    def _tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the trained parameters, then everything else that is swapped into the method."""
        frozen = [tensor for tensor in self.parameters.values() if not tensor.requires_grad]
        return list(self.trained.values()), [*frozen, *self.buffers.values()]

    def _call(
        self, function: TaskFunction, inputs: Sequence[Tensor], way: int | None, chunk: int, own_weights: bool = False
    ) -> Tensor:
        """Run the function of one task on one (``LOOP``), or vmapped over an axis of tasks, and of seeds.

        With ``own_weights`` the trained parameters too have an axis of tasks.
        """
        frozen = [name for name, tensor in self.parameters.items() if not tensor.requires_grad]
        names = [f"method.{name}" for name in (*self.trained, *frozen, *self.buffers)]

        def one(tensors: dict[str, Tensor], *task: Tensor) -> Tensor:
            return functional_call(self._bound, tensors, (function, Task(*task, way=way)))

        tensors, tasks = dict(zip(names, inputs)), inputs[len(names) :]
        if chunk == LOOP:
            return one(tensors, *tasks)
        if self.stacked and tasks[0].shape[1] == 1 and not own_weights:  # one level of vmap is enough
            return vmap(one, randomness="different")(tensors, *(tensor.squeeze(1) for tensor in tasks)).unsqueeze(1)
        weights = {name: 0 if own_weights and i < len(self.trained) else None for i, name in enumerate(names)}
        mapped = vmap(one, in_dims=(weights, 0, 0, 0, 0), randomness="different")
        if self.stacked:
            mapped = vmap(mapped, randomness="different")
        return mapped(tensors, *tasks)

    def _pieces(self, batch: Task, chunk: int) -> Iterator[Task]:
        """Cut a batch into chunks along its axis of tasks."""
        if chunk == LOOP:
            if self.stacked:
                raise ValueError("several seeds at once need vmap: choose a chunk of at least one task")
            yield from (batch[index] for index in range(len(batch)))
            return
        for start in range(0, batch.support_x.shape[int(self.stacked)], chunk):
            part = slice(start, start + chunk)
            yield batch.map(lambda tensor: tensor[:, part]) if self.stacked else batch[part]  # noqa: B023

    def _program(self, purpose: Hashable, compute: Program, inputs: Sequence[Tensor]) -> Program:
        """Return the traced program for inputs of these shapes; the function itself where tracing fails."""
        shapes = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)
        autocast = torch.is_autocast_enabled(inputs[0].device.type)
        key = (purpose, shapes, self.method.training, self.method.norm, self.method.steps_now, autocast)
        if key not in self._programs:
            try:
                self._programs[key] = trace(compute, inputs)
            except Exception:  # whatever the network does that cannot be traced, it still runs as it is
                self._programs[key] = None
        return self._programs[key] or compute


def fastest_chunk(
    trial: Callable[[int], object],
    tasks: int,
    *,
    loop: bool,
    only_loop: bool = False,
    final: Callable[[int], object] | None = None,
) -> int:
    """Return the chunk size with which ``trial`` takes the least time, by trying them.

    All candidates take turns, so that a busy machine slows down all of them alike; those that fall behind drop out.

    Args:
        trial: does the work once with a given chunk size.
        tasks: size of the batch, the largest chunk.
        loop: whether :data:`LOOP` is among the candidates.
        only_loop: whether it is the only one.
        final: decides between the two fastest instead of ``trial``, such as the same work traced.

    Raises:
        BackboneError: no candidate works.
    """
    if only_loop:
        return LOOP
    sizes = [tasks]
    while sizes[-1] > 2 and len(sizes) < 5:
        sizes.append(-(-sizes[-1] // 2))
    candidates = [*sizes, LOOP] if loop else sizes
    if len(candidates) == 1:
        return candidates[0]
    seconds: dict[int, float] = {}
    failure = None
    for chunk in candidates:
        try:
            seconds[chunk] = _seconds(trial, chunk)
        except (RuntimeError, NotImplementedError) as error:  # no rule for vmap, or out of memory
            failure = error
    if not seconds:
        raise BackboneError(
            f"the network can be batched neither over tasks (vmap) nor run in a loop: {failure}"
        ) from failure
    seconds = _near(seconds, 4.0)  # this first time also warmed up
    seconds = {chunk: _seconds(trial, chunk) for chunk in seconds}
    seconds = _near(seconds, 2.0)
    seconds = {chunk: min(before, _seconds(trial, chunk)) for chunk, before in seconds.items()}
    finalists = sorted(_near(seconds, 1.5), key=seconds.__getitem__)[:2]
    if len(finalists) == 1:
        return finalists[0]
    if final is not None:
        for chunk in finalists:
            final(chunk)  # to warm up
    turns = [{chunk: _seconds(final or trial, chunk) for chunk in finalists} for _ in range(3)]
    seconds = {chunk: min(turn[chunk] for turn in turns) for chunk in finalists}
    return min(seconds, key=seconds.__getitem__)


def _near(seconds: dict[int, float], factor: float) -> dict[int, float]:
    """Keep those that take at most ``factor`` times as long as the fastest."""
    return {chunk: taken for chunk, taken in seconds.items() if taken <= factor * min(seconds.values())}


def _seconds(trial: Callable[[int], object], chunk: int) -> float:
    start = time.perf_counter()
    trial(chunk)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()
    return time.perf_counter() - start
