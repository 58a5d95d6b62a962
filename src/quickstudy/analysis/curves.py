"""Learning curves: validation while training, beside what was published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from quickstudy.analysis.figures import PALETTE, QUIET, save
from quickstudy.engine.recipe import instantiate, parse_recipe
from quickstudy.engine.run import Run
from quickstudy.engine.testing import differs
from quickstudy.errors import RecipeError
from quickstudy.files import csv_text, write_text


def draw_curves(runs: Sequence[Run], path: Path, levels: Mapping[str, float] | None = None) -> Path:
    """Draw the training loss and the validation score of some runs against the number of tasks seen.

    The line is the mean over the seeds of a run. The band around the score is the mean of their 95 % intervals over
    tasks.

    Args:
        runs: with the same metric.
        path: PNG, SVG or PDF file to write.
        levels: named scores drawn as horizontal lines, in the unit of the metric (accuracies in percent).

    Returns:
        The path.

    Raises:
        RecipeError: a run has not been validated yet, or the runs have different metrics.
        FileError: the file cannot be written.
    """
    metrics = {_metric(run) for run in runs}
    if len(metrics) > 1:
        raise RecipeError(f"accuracies and errors cannot share an axis: draw runs of {' and of '.join(metrics)} apart")
    (metric,) = metrics
    scale, unit = (100.0, "validation accuracy, %") if metric == "accuracy" else (1.0, "validation error (MSE)")
    figure = Figure(figsize=(9, 3.4))
    losses, scores = figure.subplots(1, 2)
    for number, run in enumerate(runs):
        tasks, columns = _means(run)
        colour = PALETTE[number % len(PALETTE)]
        losses.plot(tasks[1:], columns["train_loss"][1:], marker=".", color=colour, label=_label(run))
        score, band = scale * columns["val_score"], scale * columns["val_interval"]
        scores.plot(tasks, score, marker=".", color=colour)
        scores.fill_between(tasks, score - band, score + band, color=colour, alpha=0.2, linewidth=0)
    for number, (name, value) in enumerate((levels or {}).items()):
        scores.axhline(value, color=QUIET, linewidth=1, linestyle=("--", ":", "-.")[number % 3], label=name)
    if metric == "mse":
        scores.set_yscale("log")
    _finish(losses, "meta-loss, mean since the last validation")
    _finish(scores, unit)
    return save(figure, path)


def write_curves(runs: Sequence[Run], path: Path) -> Path:
    """Write the metrics of some runs as one CSV file, a row for each validation and seed; return the path.

    Raises:
        RecipeError: a run has not been validated yet.
        FileError: the file cannot be written.
    """
    settings = [{"recipe": run.name, "differs": _differs(run), "planned_updates": _planned(run)} for run in runs]
    rows = [setting | row for setting, run in zip(settings, runs) for row in _rows(run)]
    short = [{key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    return write_text(path, csv_text(short))


def _rows(run: Run) -> list[dict]:
    rows = run.metrics()
    if not rows:
        raise RecipeError(f"{run.folder} has no validation yet; continue it: quickstudy train {run.folder} --resume")
    return rows


def _means(run: Run) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the tasks seen at each validation, and the columns averaged over the seeds that got so far."""
    rows = _rows(run)
    tasks = sorted({row["tasks"] for row in rows})
    columns = {
        key: np.array([np.mean([row[key] for row in rows if row["tasks"] == seen]) for seen in tasks])
        for key in ("train_loss", "val_score", "val_interval")
    }
    return np.array(tasks), columns


def _label(run: Run) -> str:
    done, planned = max(row["update"] for row in _rows(run)), _planned(run)
    notes = [_differs(run)]
    notes += [f"{done:,} of {planned:,} updates"] if done < planned else []
    return ", ".join([run.name, *filter(None, notes)])


def _differs(run: Run) -> str:
    return differs(run.name, parse_recipe(run.recipe_text))


def _planned(run: Run) -> int:
    return parse_recipe(run.recipe_text).train.updates


def _metric(run: Run) -> str:
    return instantiate(parse_recipe(run.recipe_text)).dataset.metric


def _finish(axis: Axes, label: str) -> None:
    axis.set_xlabel("tasks seen in meta-training", fontsize=8)
    axis.set_ylabel(label, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.xaxis.set_major_formatter(EngFormatter())  # 200 k
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(-0.02, -0.16))
