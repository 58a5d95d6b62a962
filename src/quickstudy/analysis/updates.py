"""What OP-LSTM has learned to do, beside gradient descent and beside prototypes (Huisman et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from quickstudy.analysis.figures import PALETTE, QUIET, save
from quickstudy.engine.evaluate import evaluate
from quickstudy.engine.models import Models
from quickstudy.engine.recipe import instantiate, parse_recipe
from quickstudy.engine.run import Run
from quickstudy.engine.statistics import estimate
from quickstudy.engine.testing import trained_methods
from quickstudy.errors import RecipeError
from quickstudy.methods import OPLSTM, Method, gradient, prototypes, task_loss
from quickstudy.methods.oplstm import Layer
from quickstudy.task import Task

RATE = 0.01
"""Step size of the gradient descent that all passes together are compared with."""


def compare(method: Method, task: Task) -> Tensor:
    """Compare what OP-LSTM does to its weight matrices in one task with what others would do.

    Returns:
        Cosine and Euclidean distance, ``[layers + 1, passes + 3, 2]``: for each matrix, and for all as one vector, of

        - the update of each pass and the negative gradient of the support loss at the same weights,
        - the change over all passes and that by as many steps of gradient descent (step size 0.01, biases fixed),
        - the last matrix after the first and after the last pass, and twice the prototypes (the class means of what
          that layer reads, for ``-|z - c|^2 = 2 c.z - |c|^2 + constant``).

        What is not defined is NaN: prototypes of other layers, and in regression.
    """
    assert isinstance(method, OPLSTM)
    support = task.support
    inputs = support.x.flatten(1) if method.adapts == "all" else method.embed_support(support.x)[0]
    passes = list(method.passes(inputs, support))

    def descent(layers: list[Layer], matrices: list[Tensor]) -> list[Tensor]:
        """Return the negative gradient of the support loss at some matrices."""

        def loss(weights: dict[str, Tensor]) -> Tensor:
            changed = [Layer(weights[str(i)], layer.bias) for i, layer in enumerate(layers)]
            return task_loss(method.run(changed, inputs)[0][-1], support.y, support.way)

        named = {str(i): matrix for i, matrix in enumerate(matrices)}
        return [-slope for slope in gradient(loss, named, second_order=False).values()]

    columns = [_alike(done.updates, descent(done.before, [layer.matrix for layer in done.before])) for done in passes]
    start = [layer.matrix for layer in passes[0].before]
    end = [layer.matrix for layer in passes[-1].after]
    moved = start
    for _ in passes:
        moved = [matrix + RATE * slope for matrix, slope in zip(moved, descent(passes[0].before, moved))]
    columns.append(_alike([b - a for a, b in zip(start, end)], [b - a for a, b in zip(start, moved)]))
    for done in (passes[0], passes[-1]):
        column = torch.full_like(columns[0], torch.nan)
        if support.way is not None:
            read = method.run(done.after, inputs)[2]
            column[len(end) - 1] = _alike([done.after[-1].matrix], [2 * prototypes(read, support)])[0]
        columns.append(column)
    return torch.stack(columns, 1)


def _alike(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Return cosine and distance of each pair of matrices, and of all as one vector, ``[pairs + 1, 2]``."""
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(ours, theirs)]
    pairs.append((torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])))
    return torch.stack(
        [torch.stack([F.cosine_similarity(a, b, dim=0, eps=1e-20), torch.linalg.vector_norm(a - b)]) for a, b in pairs]
    )


def learned_updates(
    run: Run, tasks: int | None = None, device: str = "cpu", progress: Callable[[str], None] = lambda text: None
) -> list[dict]:
    """Compare at every validation whose weights the run has kept, on the tasks of that validation.

    Args:
        run: of OP-LSTM, trained with ``validation.keep``.
        tasks: how many of each validation; all if ``None``.
        device: where to compute.
        progress: told what is being done.

    Returns:
        A row for each validation, layer and quantity: the means of cosine and Euclidean distance over tasks and seeds,
        and their 95 % intervals. Tasks in which gradient descent diverges are left out; ``tasks`` are those that count.

    Raises:
        RecipeError: the run is not of OP-LSTM, or has kept no weights.
    """
    recipe = instantiate(parse_recipe(run.recipe_text))
    if not isinstance(recipe.method, OPLSTM):
        raise RecipeError(f"{run.name} trained {type(recipe.method).__name__}; learned updates are those of OPLSTM")
    seeds, size = run.info["seeds"], recipe.validation.tasks
    count = min(size, tasks or size)
    validations = run.validations()
    if not validations:
        raise RecipeError(f"{run.folder} has kept no weights of its validations; train it with --validation.keep true")
    source = recipe.dataset.split("val").to(device)
    rows, chunk = [], None
    for updates in validations:
        number = 0 if updates == 0 else -(-updates // recipe.validation.every)
        measured = []
        for seed, method in zip(seeds, trained_methods(run, run.validation(updates), device)):
            progress(f"validation after {updates:,} updates, seed {seed}")
            result, chunk = evaluate(
                Models([method]),
                source,
                recipe.validation_task,
                [seed],
                tasks=count,
                first=number * size,
                chunk=chunk,
                bound=recipe.train.chunk,
                cast=recipe.train.cast,
                measure=compare,
            )
            measured.append(result[0])
        rows += _rows(torch.cat(measured), updates)
    return rows


def _rows(measured: Tensor, updates: int) -> list[dict]:
    """Return the rows of one validation, of ``[tasks, layers + 1, passes + 3, 2]``."""
    layers, passes = measured.shape[1] - 1, measured.shape[2] - 3
    quantities = [f"pass {number + 1}" for number in range(passes)]
    quantities += ["total", "prototypes, first pass", "prototypes, last pass"]
    rows = []
    for layer in range(layers + 1 if layers > 1 else 1):
        for number, quantity in enumerate(quantities):
            values = measured[:, layer, number]
            values = values[values.isfinite().all(1)]
            if len(values) < 2:
                continue
            cosine, distance = estimate(values[:, 0]), estimate(values[:, 1])
            rows.append(
                {
                    "updates": updates,
                    "layer": "all" if layer == layers else layer + 1,
                    "quantity": quantity,
                    "cosine": cosine.mean,
                    "cosine_interval": cosine.interval,
                    "distance": distance.mean,
                    "distance_interval": distance.interval,
                    "tasks": cosine.count,
                }
            )
    return rows


def draw_learned_updates(rows: Sequence[dict], path: Path, title: str) -> Path:
    """Draw the rows of :func:`learned_updates`: cosine on the left, Euclidean distance on the right.

    The first row of panels has all passes together, layer by layer, and the prototypes; the second every pass. The
    band is the 95 % interval of the mean.

    Raises:
        FileError: the file cannot be written.
    """
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    everything = "all" if "all" in layers else layers[-1]
    passes = [q for q in dict.fromkeys(row["quantity"] for row in rows) if q.startswith("pass")]
    ends = [("total", layer, f"gradient descent, {_name(layer, len(layers))}") for layer in layers]
    learnt = [layer for layer in layers if any(r["layer"] == layer and r["quantity"][:4] == "prot" for r in rows)]
    ends += [("prototypes, last pass", layer, "prototypes, last matrix") for layer in learnt]
    each = [(quantity, everything, quantity) for quantity in passes]
    figure = Figure(figsize=(9, 6.4))
    for panels, lines in zip(figure.subplots(2, 2), (ends, each)):
        for axis, measure in zip(panels, ("cosine", "distance")):
            for number, (quantity, layer, label) in enumerate(lines):
                own = [row for row in rows if row["quantity"] == quantity and row["layer"] == layer]
                _draw(axis, own, measure, label, number, len(lines))
            axis.set_ylabel("cosine similarity" if measure == "cosine" else "Euclidean distance", fontsize=8)
            axis.set_xlabel("updates of meta-training, thousands", fontsize=8)
            axis.tick_params(labelsize=7, which="both")
            axis.spines[["top", "right"]].set_visible(False)
            if measure == "cosine":
                axis.axhline(0, color=QUIET, linewidth=0.6)
            else:
                axis.set_yscale("log")
        panels[1].legend(fontsize=6.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{title}\nupper: all passes together; lower: each pass, all matrices as one", fontsize=9)
    figure.tight_layout()
    return save(figure, path)


def _draw(axis: Axes, rows: Sequence[dict], measure: str, label: str, number: int, lines: int) -> None:
    x = [row["updates"] / 1000 for row in rows]
    y = torch.tensor([row[measure] for row in rows])
    band = torch.tensor([row[f"{measure}_interval"] for row in rows])
    colour = PALETTE[number % len(PALETTE)]
    style = ("-", "--", ":")[number // len(PALETTE) % 3]
    axis.plot(x, y, style, color=colour, linewidth=1.2, label=label)
    axis.fill_between(x, y - band, y + band, color=colour, alpha=0.2, linewidth=0)


def _name(layer: int | str, count: int) -> str:
    if layer == "all":
        return "all matrices"
    return f"matrix {layer}" if count > 1 else "last matrix"
