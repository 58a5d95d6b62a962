"""Pictures of tasks: what was there to learn from, and what was made of it."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from quickstudy.analysis.figures import BAD, GOOD, PALETTE, QUIET, save
from quickstudy.task import Task

MOST = 10
"""Queries of a class, and support examples of a class, that are shown at most."""


def draw_task(task: Task, prediction: Tensor, path: Path, title: str = "") -> Path:
    """Draw one classification task: a row for each class, its support set on the left, its queries on the right.

    Args:
        task: a task of images, ``[M, C, H, W]`` with one or three channels in [0, 1].
        prediction: logits of the queries, ``[Q, way]``.
        path: PNG, SVG or PDF file to write.
        title: above the picture.

    Returns:
        The path.

    Raises:
        FileError: the file cannot be written.
    """
    assert task.way is not None
    support = [task.support_x[task.support_y == label][:MOST] for label in range(task.way)]
    queries = [torch.nonzero(task.query_y == label).flatten()[:MOST] for label in range(task.way)]
    guesses = prediction.argmax(1)
    shots, wide = max(map(len, support)), max(map(len, queries))
    columns = shots + 1 + wide
    figure = Figure(figsize=(0.62 * columns + 0.6, 0.72 * task.way + 1.0))
    axes = figure.subplots(task.way, columns, squeeze=False, gridspec_kw={"wspace": 0.12, "hspace": 0.34})
    for axis in axes.flat:
        axis.set_axis_off()
    for label in range(task.way):
        row = axes[label]
        for position, image in enumerate(support[label]):
            _show(row[position], image, QUIET)
        row[0].text(-0.3, 0.5, str(label + 1), transform=row[0].transAxes, ha="right", va="center", color=QUIET)
        for position, query in enumerate(queries[label].tolist()):
            right = int(guesses[query]) == label
            axis = row[shots + 1 + position]
            _show(axis, task.query_x[query], GOOD if right else BAD)
            if not right:
                axis.set_title(f"taken for {int(guesses[query]) + 1}", fontsize=6, color=BAD, pad=2)
    accuracy = (guesses == task.query_y).float().mean().item()
    heading = f"{title}\n" if title else ""
    figure.suptitle(
        f"{heading}support set on the left; queries on the right: {100 * accuracy:.0f} % of {len(guesses)} right",
        fontsize=9,
        y=1.0,
    )
    return save(figure, path)


def draw_waves(batch: Task, path: Path, title: str = "") -> Path:
    """Draw regression tasks of one input and one output: support points, and the curve through the queries.

    Args:
        batch: tasks with ``support_x [B, M, 1]`` and ``query_x [B, Q, 1]``, drawn four to a row.
        path: PNG, SVG or PDF file to write.
        title: above the picture.

    Returns:
        The path.

    Raises:
        FileError: the file cannot be written.
    """
    columns = min(4, len(batch))
    rows = -(-len(batch) // columns)
    figure = Figure(figsize=(2.4 * columns, 1.8 * rows + 0.4))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for number, axis in enumerate(axes.flat):
        if number >= len(batch):
            axis.set_axis_off()
            continue
        task = batch[number].map(lambda tensor: tensor.cpu().flatten())
        order = task.query_x.argsort()
        axis.plot(task.query_x[order].numpy(), task.query_y[order].numpy(), color=QUIET, linewidth=1)
        axis.plot(task.support_x.numpy(), task.support_y.numpy(), "o", color=PALETTE[1], markersize=4)
    figure.suptitle(title, fontsize=9)
    return save(figure, path)


def _show(axis: Axes, image: Tensor, colour: str) -> None:
    """Show one image ``[C, H, W]`` in a coloured frame."""
    pixels = image.detach().cpu().clamp(0, 1).numpy()
    axis.set_axis_on()
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(1.6)
    if len(pixels) == 1:
        axis.imshow(1 - pixels[0], cmap="gray", vmin=0, vmax=1)
    else:
        axis.imshow(pixels[:3].transpose(1, 2, 0))
