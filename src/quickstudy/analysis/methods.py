"""All methods with the same network, on the same tasks, with the same budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from quickstudy.analysis.figures import PALETTE, QUIET, save
from quickstudy.engine.recipe import parse_recipe, recipe_names, recipe_text
from quickstudy.engine.testing import Result
from quickstudy.files import markdown_table

WAY, QUERIES, META_BATCH = 5, 15, 4
"""Of every task of the comparison; and the tasks of an update."""

MODELS = "glyphs/"
"""Whose recipes are compared: they need no download, and every method has one."""

Row = Mapping[str, object]


def contestants(only: str = "") -> list[str]:
    """Return the names of the recipes that are compared, those with ``only`` in their name."""
    return [name for name in recipe_names() if name.startswith(MODELS) and name.endswith("-5w1s") and only in name]


def budget(recipe: str, dataset: str, shot: int, tasks: int, channels: int) -> list[str]:
    """Return the settings that make a recipe one of the comparison, in command-line form.

    Args:
        recipe: one of the :func:`contestants`.
        dataset: class path of the dataset.
        shot: support examples of each class, in training and in test.
        tasks: how many tasks the method may learn from; 0 if it is only tested.
        channels: of the conv-4.
    """
    own = parse_recipe(recipe_text(recipe))
    updates = tasks // META_BATCH
    backbone = own.method.init_args.get("backbone")
    shaped = [part for part in ("train", "validation", "test") if own[part].task is not None]
    return [
        *([] if own.dataset.class_path == dataset else [f"--dataset={dataset}"]),
        *(f"--{part}.task={{way: {WAY}, shot: {shot}, queries: {QUERIES}}}" for part in shaped),
        f"--train.meta_batch={META_BATCH}",
        f"--train.updates={updates}",
        f"--validation.every={max(1, updates // 4)}",
        *([] if backbone is None else [f"--method.backbone.channels={channels}"]),
    ]


def learns(recipe: str) -> bool:
    """Tell whether a recipe is to be trained before it is tested."""
    return parse_recipe(recipe_text(recipe)).train.updates > 0


def method_row(recipe: str, shot: int, result: Result) -> dict[str, object]:
    """Return the row of one method and number of shots; accuracy in percent."""
    measured = result.row()
    return {
        "method": recipe.removeprefix(MODELS).removesuffix("-5w1s"),
        "shot": shot,
        "accuracy": measured["value"],
        "interval": measured["interval"],
        "meta_train_tasks": META_BATCH * int(measured["updates"]),
        "tasks_per_second": measured["train_tasks_per_second"],
        **{key: measured[key] for key in ("per_seed", "seeds", "tasks", "queries", "norm", "steps", "tested_on")},
        **{key: measured[key] for key in ("train_seconds", "test_seconds", "device", "processor", "torch", "commit")},
    }


def methods_table(rows: Sequence[Row]) -> str:
    """Return the rows of :func:`method_row` as a Markdown table, a line a method, the best at the last shot first."""
    shots = list(dict.fromkeys(row["shot"] for row in rows))
    cells = {(row["method"], row["shot"]): f"{row['accuracy']} ± {row['interval']}" for row in rows}
    header = ["method", *(f"{shot}-shot" for shot in shots), "meta-training, tasks/s"]
    lines = []
    for method in _ranked(rows):
        speed = next((row["tasks_per_second"] for row in rows if row["method"] == method), "") or "–"
        lines.append([str(method), *(cells.get((method, shot), "–") for shot in shots), str(speed)])
    return markdown_table(header, lines) + "\n"


def draw_methods(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Draw the rows of :func:`method_row` as points with their 95 % intervals, a line a method.

    Raises:
        FileError: the file cannot be written.
    """
    shots = list(dict.fromkeys(row["shot"] for row in rows))
    methods = _ranked(rows)[::-1]
    figure = Figure(figsize=(6.4, 0.6 + 0.24 * len(methods)))
    axis = figure.subplots()
    for number, shot in enumerate(shots):
        own = [row for row in rows if row["shot"] == shot]
        axis.errorbar(
            [float(str(row["accuracy"])) for row in own],
            [methods.index(row["method"]) for row in own],
            xerr=[float(str(row["interval"])) for row in own],
            fmt="o",
            markersize=4,
            capsize=2,
            color=PALETTE[number],
            label=f"{shot}-shot",
        )
    axis.axvline(100 / WAY, color=QUIET, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(methods)), [str(method) for method in methods], fontsize=7)
    axis.set_xlabel(f"accuracy, % ({WAY}-way; dotted: chance)", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(axis="y", linewidth=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)
    axis.set_title(title, fontsize=9)
    return save(figure, path)


def _ranked(rows: Sequence[Row]) -> list[object]:
    last = rows[-1]["shot"]
    scores = {row["method"]: float(str(row["accuracy"])) for row in rows if row["shot"] == last}
    return sorted(dict.fromkeys(row["method"] for row in rows), key=lambda method: -scores.get(method, 0.0))
