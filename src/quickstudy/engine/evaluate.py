"""Scores of adapted models on tasks of classes they have not met."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quickstudy.data.base import TaskSource
from quickstudy.engine.models import Models, TaskFunction, fastest_chunk, scores
from quickstudy.errors import RecipeError
from quickstudy.task import Task, TaskShape

DRAWN_AT_ONCE = 50
"""Tasks held in memory at a time during an evaluation."""


def draw(source: TaskSource, shape: TaskShape, start: int, stop: int, seeds: Sequence[int]) -> Task:
    """Draw tasks ``start .. stop-1`` for one seed, or for several stacked on a leading axis."""
    if len(seeds) == 1:
        return source.tasks(shape, start, stop, seed=seeds[0])
    return Task.stack([source.tasks(shape, start, stop, seed=seed) for seed in seeds])


def seed_randomness(device: str, seed: int, step: int) -> None:
    """Make what methods draw (noise, dropout) a function of seed and step alone.

    ``torch.manual_seed`` would do, but takes longer than many an update: it records a stack trace for GPUs.
    """
    number = hash((seed, step))
    torch.default_generator.manual_seed(number)
    if device.startswith("cuda"):
        torch.cuda.manual_seed(number)
    elif device.startswith("mps"):
        torch.mps.manual_seed(number)


def pick_device(device: str | torch.device) -> str:
    """Return the device asked for, in words; ``auto`` is a GPU where there is one.

    Raises:
        RecipeError: there is no such device here.
    """
    device = str(device)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"the device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def make_current(device: str) -> None:
    """Let what names no device mean this one, where there are several GPUs."""
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)


def evaluate(
    models: Models,
    source: TaskSource,
    shape: TaskShape,
    seeds: Sequence[int],
    *,
    tasks: int,
    first: int = 0,
    chunk: int | None = None,
    bound: int | None = None,
    cast: Callable[[Task], Task] = lambda task: task,
    traced: bool = False,
    measure: TaskFunction = scores,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Tensor, int]:
    """Score the models on tasks ``first .. first+tasks-1`` of each of their seeds.

    Args:
        models: what to evaluate.
        source: where the tasks come from.
        shape: their size.
        seeds: whose streams of tasks, one for each of the models.
        tasks: how many, for each seed.
        first: number of the first.
        chunk: tasks at a time under vmap (``LOOP``: none); by timing if ``None``.
        bound: the most that are tried then.
        traced: run as a flat program, traced once: worth it when the same models are evaluated again and again.
        measure: what to compute of each task, by default its query loss and its score.
        cast: applied to every batch, such as a change of precision.
        progress: called with the number of tasks done.

    Returns:
        The measure of every task, ``[seeds, tasks, ...]`` (float64, on the CPU; by default the query loss and the
        score, ``[seeds, tasks, 2]``), and the chunk size used.
    """
    training = models.method.training
    models.method.eval()
    results = []
    try:
        with torch.no_grad():
            for start in range(first, first + tasks, DRAWN_AT_ONCE):
                stop = min(start + DRAWN_AT_ONCE, first + tasks)
                batch = cast(draw(source, shape, start, stop, seeds))
                if chunk is None:
                    chunk = _fastest(models, batch, measure, min(16, bound or 16))
                seed_randomness(str(batch.support_x.device), seeds[0], start)
                parts = list(models.run(measure, batch, chunk, traced=traced))
                results.append(torch.cat(parts, dim=1 if models.stacked else 0).cpu().double())
                progress(stop - first)
    finally:
        models.method.train(training)
    assert chunk is not None
    return torch.cat([r if models.stacked else r[None] for r in results], dim=1), chunk


def _fastest(models: Models, batch: Task, measure: TaskFunction, most: int) -> int:
    trial = batch.map(lambda tensor: tensor[:, :most] if models.stacked else tensor[:most])
    tasks = trial.support_x.shape[int(models.stacked)]
    return fastest_chunk(lambda size: list(models.run(measure, trial, size)), tasks, loop=not models.stacked)
