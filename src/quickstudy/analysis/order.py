"""Does the order of the support set matter? Batch against sequential reading, and one model under permutations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from quickstudy.analysis.figures import PALETTE, QUIET, save
from quickstudy.analysis.results import published_of
from quickstudy.engine.models import TaskFunction
from quickstudy.engine.recipe import instantiate, parse_recipe
from quickstudy.engine.run import Run
from quickstudy.engine.statistics import Estimate, estimate
from quickstudy.engine.testing import Result, evaluate_each, trained_methods
from quickstudy.methods import Method, task_score
from quickstudy.task import Support, Task

READINGS = ("batch", "sequential")
SHOTS = {"sine": (5, 10, 20, 30, 40, 50), "omniglot": (1, 3, 5, 8, 10)}


@dataclass(frozen=True)
class Spread:
    """What random orders of the support set do to a trained model, as means over test tasks of all seeds.

    Attributes:
        deviation: standard deviation of a prediction over the orders, in the unit of the target (regression), or of
            the probability of a class (classification), averaged over queries and outputs.
        flipped: share of the queries whose predicted class is another than in the given order, averaged over the
            orders; ``None`` in regression.
        score: standard deviation of the score of a task over the orders.
    """

    deviation: Estimate
    flipped: Estimate | None
    score: Estimate


def recipe_of(problem: str, reading: str, shot: int) -> str:
    """Return the name of the recipe that trains one reading for one number of shots."""
    return f"sine/lstm-{reading}-{shot}shot" if problem == "sine" else f"omniglot/lstm-{reading}-mlp-order-5w{shot}s"


def order_spread(run: Run, *, tasks: int = 200, orders: int = 20, device: str = "cpu") -> Spread:
    """Test a trained run again and again on the same tasks, with their support sets in random orders.

    Args:
        run: finished, or at least validated once.
        tasks: test tasks of each seed.
        orders: random orders of each, besides the given one.
        device: where to compute.
    """
    recipe = instantiate(parse_recipe(run.recipe_text))
    shape = recipe.test_task
    source = recipe.dataset.split("test").to(device)
    draws = torch.Generator().manual_seed(0)
    count = shape.shot * (shape.way or 1)
    permutations = torch.stack([torch.randperm(count, generator=draws) for _ in range(orders)]).to(device)
    methods = dict(zip(run.info["seeds"], trained_methods(run, "best", device)))
    measured = evaluate_each(methods, recipe, source, shape, tasks, permuted(permutations))
    pooled = torch.cat([*measured.values()])
    flipped = None if shape.way is None else estimate(pooled[:, 1])
    return Spread(estimate(pooled[:, 0]), flipped, estimate(pooled[:, 2]))


def permuted(permutations: Tensor) -> TaskFunction:
    """Return the function that measures one task under permutations ``[orders, M]`` of its support set.

    It returns the deviation of the predictions, the share of flipped classes and the deviation of the score, ``[3]``
    (:class:`Spread`).
    """

    def measure(method: Method, task: Task) -> Tensor:
        def predict(order: Tensor) -> Tensor:
            support = Support(task.support_x[order], task.support_y[order], task.way)
            return method.predict(method.adapt(support), task.query_x)

        given = method.predict(method.adapt(task.support), task.query_x)
        others = torch.vmap(predict, randomness="different")(permutations)
        scores = torch.stack([task_score(p, task.query_y, task.way) for p in others])
        if task.way is None:
            return torch.stack([others.std(0).mean(), torch.zeros_like(scores[0]), scores.std()])
        flips = (others.argmax(-1) != given.argmax(-1)).to(given.dtype).mean()
        return torch.stack([others.softmax(-1).std(0).mean(), flips, scores.std()])

    return measure


def order_row(problem: str, reading: str, shot: int, result: Result, spread: Spread) -> dict[str, object]:
    """Return the row of one trained model: published, measured, and its spread under permutations.

    Accuracies in percent.
    """
    measured = result.row()
    scale = 100 if result.metric == "accuracy" else 1
    published, *_ = published_of(recipe_of(problem, reading, shot))
    flipped = spread.flipped
    return {
        "recipe": result.recipe,
        "reading": reading,
        "shot": shot,
        "metric": result.metric,
        "published": published.value,
        "published_interval": published.interval,
        "measured": measured["value"],
        **{key: measured[key] for key in ("interval", "per_seed", "updates", "planned_updates", "train_seconds")},
        "prediction_deviation": f"{spread.deviation.mean:.3g}",
        "flipped_percent": "" if flipped is None else f"{100 * flipped.mean:.3g}",
        "score_deviation": f"{scale * spread.score.mean:.3g}",
    }


def draw_order(rows: Sequence[Mapping[str, object]], path: Path, title: str) -> Path:
    """Draw the rows of :func:`order_row`: the scores over the shots, their seeds, the gain, and the spread.

    Raises:
        FileError: the file cannot be written.
    """
    percent = rows[0]["metric"] == "accuracy"
    unit = "accuracy, %" if percent else "error (MSE)"
    figure = Figure(figsize=(9, 6.2))
    (over_tasks, over_seeds), (gain, spread) = figure.subplots(2, 2)
    for number, reading in enumerate(READINGS):
        own = [row for row in rows if row["reading"] == reading]
        if not own:
            continue
        colour, shots = PALETTE[number], [int(str(row["shot"])) for row in own]
        means, bands = (torch.tensor([float(str(row[key])) for row in own]) for key in ("measured", "interval"))
        seeds = [[float(part.split(":")[1]) for part in str(row["per_seed"]).split()] for row in own]
        over_tasks.errorbar(shots, means, bands, marker="o", capsize=2, color=colour, label=f"{reading}, measured")
        published = torch.tensor(
            [[float(str(row[k] or "nan")) for k in ("published", "published_interval")] for row in own]
        )
        over_tasks.errorbar(
            [shot + 0.02 * max(shots) for shot in shots],
            *published.T,
            marker="s",
            linestyle=":",
            capsize=2,
            color=colour,
            alpha=0.5,
            label=f"{reading}, published",
        )
        runs = [estimate(values) for values in seeds]
        over_seeds.errorbar(
            shots,
            [run.mean for run in runs],
            [0 if run.count < 2 else run.interval for run in runs],
            marker="o",
            capsize=2,
            color=colour,
            label=f"{reading}, 95 % over {max(map(len, seeds))} seeds",
        )
        for shot, values in zip(shots, seeds):
            over_seeds.plot([shot] * len(values), values, "x", color=colour, alpha=0.6, markersize=4)
        key = "flipped_percent" if percent else "prediction_deviation"
        spread.plot(shots, [float(str(row[key])) for row in own], marker="o", color=colour, label=reading)
    _draw_gain(gain, rows, percent)
    if not percent:
        over_tasks.set_yscale("log")
        over_seeds.set_yscale("log")
        spread.set_yscale("symlog", linthresh=1e-6)
    labels = {over_tasks: f"{unit}, 95 % over tasks", over_seeds: unit, gain: "gain of batch over sequential, %"}
    labels[spread] = "labels flipped by a new order, %" if percent else "deviation of a prediction over orders"
    for axis, label in labels.items():
        axis.set_xlabel("shots", fontsize=8)
        axis.set_ylabel(label, fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6.5, frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return save(figure, path)


def _draw_gain(axis: Axes, rows: Sequence[Mapping[str, object]], percent: bool) -> None:
    """Draw by how much the batch reading is better, in percent of the sequential score, published and measured."""
    for key, style, alpha in (("measured", "-", 1.0), ("published", ":", 0.5)):
        scores = {(row["reading"], int(str(row["shot"]))): float(str(row[key] or "nan")) for row in rows}
        shots = [s for r, s in scores if r == "batch" and ("sequential", s) in scores]
        pairs = [(scores["batch", shot], scores["sequential", shot]) for shot in shots]
        gains = [100 * ((batch - other) if percent else (other - batch)) / other for batch, other in pairs]
        axis.plot(shots, gains, style, marker="o", color=PALETTE[2], alpha=alpha, label=key)
    axis.axhline(0, color=QUIET, linewidth=0.6)


def draw_validations(runs: Mapping[str, Run], path: Path, metric: str) -> Path:
    """Draw the validation score of every seed of some runs while training, a panel for each run.

    Raises:
        FileError: the file cannot be written.
    """
    columns = min(4, len(runs))
    lines = -(-len(runs) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.1 * lines + 0.3))
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(runs) :]:
        axis.set_axis_off()
    for axis, (name, run) in zip(axes.flat, runs.items()):
        rows = run.metrics()
        for number, seed in enumerate(run.info["seeds"]):
            own = [row for row in rows if row["seed"] == seed]
            scale = 100 if metric == "accuracy" else 1
            scores = [scale * row["val_score"] for row in own]
            axis.plot([row["update"] for row in own], scores, linewidth=1, color=PALETTE[number % len(PALETTE)])
        axis.set_title(name, fontsize=7)
        axis.tick_params(labelsize=6, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        if metric != "accuracy":
            axis.set_yscale("log")
    figure.suptitle("validation of every seed, over the updates", fontsize=8)
    figure.tight_layout()
    return save(figure, path)


def study_order(
    problem: str,
    shots: Sequence[int],
    run_of: Callable[[str], Run],
    test: Callable[[Run], Result],
    tasks: int,
    orders: int,
    device: str,
) -> tuple[list[dict[str, object]], dict[str, Run]]:
    """Do the whole study: each reading for each number of shots.

    Args:
        problem: ``sine`` or ``omniglot``.
        shots: numbers of shots, each trained separately.
        run_of: returns the finished run of a recipe, training it if need be.
        test: tests a run on its test tasks.
        tasks, orders, device: as of :func:`order_spread`.

    Returns:
        The rows, and the runs by the name of their recipe.
    """
    rows, runs = [], {}
    for shot in shots:
        for reading in READINGS:
            name = recipe_of(problem, reading, shot)
            runs[name] = run_of(name)
            spread = order_spread(runs[name], tasks=tasks, orders=orders, device=device)
            rows.append(order_row(problem, reading, shot, test(runs[name]), spread))
    return rows, runs
