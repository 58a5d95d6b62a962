"""Trained on one dataset and tested on another: the accuracy of every pair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from quickstudy.analysis.figures import PALETTE, save
from quickstudy.data.registry import DATASETS, dataset_entry
from quickstudy.engine.recipe import instantiate, parse_recipe
from quickstudy.engine.run import Run
from quickstudy.engine.testing import Result
from quickstudy.errors import RecipeError
from quickstudy.files import markdown_table

Row = Mapping[str, object]


def trained_on(run: Run) -> str:
    """Return the name of the dataset that a run was trained on.

    Raises:
        RecipeError: it has no classes.
    """
    dataset = instantiate(parse_recipe(run.recipe_text)).dataset
    if dataset.metric != "accuracy":
        raise RecipeError(f"{run.folder} was trained on {dataset.name}, which has no classes: leave it out")
    return dataset.name


def testable(names: Iterable[str]) -> list[str]:
    """Return those of some datasets that any run can be tested on: known by name, and on this machine; each once."""
    known = (name for name in dict.fromkeys(names) if name in DATASETS)
    return [name for name in known if dataset_entry(name).load()().location() is not None]


def check_domain(name: str, own: Iterable[str]) -> None:
    """See whether runs can be tested on a dataset.

    Args:
        name: of the dataset.
        own: names of the datasets that the runs were trained on.

    Raises:
        DataError: there is no dataset of that name, and not all runs bring their own.
        RecipeError: it has certain tasks and no others.
    """
    if set(own) != {name} and dataset_entry(name).load().fixed is not None:
        raise RecipeError(
            f"{name} has tasks of its own, which cannot stand beside those of other datasets: leave it out, and test "
            f"each run by `quickstudy test RUN --on {name}`"
        )


def domain_row(run: Run, result: Result) -> dict[str, object]:
    """Return the row of one run and the dataset it was tested on; accuracy in percent."""
    measured = result.row()
    return {
        "run": str(run.folder),
        **{key: measured[key] for key in ("recipe", "trained_on", "tested_on")},
        "accuracy": measured["value"],
        "interval": measured["interval"],
        **{key: measured[key] for key in ("way", "shot", "queries", "tasks", "norm", "steps", "weights")},
        **{key: measured[key] for key in ("updates", "planned_updates", "seeds", "per_seed", "differs")},
        **{key: measured[key] for key in ("device", "processor", "torch", "commit")},
    }


def domains_table(rows: Sequence[Row]) -> str:
    """Return the rows of :func:`domain_row` as a Markdown table: a line a run and shot, a column a dataset tested on.

    The score on the dataset that a run was trained on is bold.
    """
    columns, lines = _columns(rows), _lines(rows)
    header = ["trained on", "recipe", "setting", *columns]
    text = []
    for own in lines:
        first = next(iter(own.values()))
        done, planned = (f"{first[key]:,}" for key in ("updates", "planned_updates"))
        setting = (
            f"{first['way']}-way {first['shot']}-shot, norm {first['norm']}, {first['tasks']:,} tasks, "
            f"{done} of {planned} updates"
        )
        cells = [_cell(own[column]) if column in own else "–" for column in columns]
        text.append([str(first["trained_on"]), str(first["recipe"]), setting, *cells])
    return markdown_table(header, text, left=3) + "\n"


def draw_domains(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Draw the table of :func:`domains_table` as a heat map; the dataset that a run was trained on has a frame.

    Raises:
        FileError: the file cannot be written.
    """
    columns, lines = _columns(rows), _lines(rows)
    scores = np.full((len(lines), len(columns)), np.nan)
    figure = Figure(figsize=(2.6 + 1.1 * len(columns), 1.0 + 0.42 * len(lines)))
    axis = figure.subplots()
    for y, own in enumerate(lines):
        for name, row in own.items():
            x = columns.index(name)
            scores[y, x] = float(str(row["accuracy"]))
            label = f"{scores[y, x]:.1f} ± {row['interval']}"
            axis.text(
                x, y, label, ha="center", va="center", fontsize=7, color="white" if scores[y, x] > 60 else "black"
            )
            if name == row["trained_on"]:
                axis.add_patch(
                    Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, edgecolor=PALETTE[1], linewidth=1.5)
                )
    axis.imshow(scores, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    firsts = [next(iter(own.values())) for own in lines]
    axis.set_yticks(range(len(lines)), [f"{row['recipe']}\n{row['way']}-way {row['shot']}-shot" for row in firsts])
    axis.set_xticks(range(len(columns)), columns)
    axis.xaxis.tick_top()
    axis.tick_params(labelsize=7, length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("tested on (frame: trained on); accuracy, %, and its 95 % interval", fontsize=7)
    axis.set_title(title, fontsize=9)
    return save(figure, path)


def _columns(rows: Sequence[Row]) -> list[str]:
    return [str(name) for name in dict.fromkeys(row["tested_on"] for row in rows)]


def _lines(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """Return the rows of each line, by the dataset tested on."""
    lines: dict[tuple[object, object], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row["run"], row["shot"]), {})[str(row["tested_on"])] = row
    return [*lines.values()]


def _cell(row: Row) -> str:
    cell = f"{row['accuracy']} ± {row['interval']}"
    return f"**{cell}**" if row["tested_on"] == row["trained_on"] else cell
