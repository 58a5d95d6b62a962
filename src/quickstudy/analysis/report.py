"""What is made anew when numbers were measured: figures beside the record, and the table of the README."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from quickstudy.analysis.curves import draw_curves, write_curves
from quickstudy.analysis.figures import PALETTE, QUIET, save
from quickstudy.analysis.results import markdown, measured_row, published_of
from quickstudy.engine.recipe import recipe_names
from quickstudy.engine.run import Run
from quickstudy.files import write_text

TABLE = re.compile(r"(?<=<!-- measured: begin -->\n).*?(?=<!-- measured: end -->)", re.DOTALL)
"""Where the README has the table of :func:`markdown`."""


def write_report(record: Path, runs: Sequence[Run], readme: Path = Path("README.md")) -> Iterator[Path]:
    """Make the figures, learning curves and the table anew; yield the files written.

    Args:
        record: the CSV file of measured scores. ``measured-DATASET.png`` are written beside it, and the learning
            curves into ``curves/``.
        runs: whose learning curves to draw.
        readme: a file with the marks of :data:`TABLE`; left alone if it has none, or is not beside the folder of the
            record.
    """
    for run in runs:
        path = record.parent / "curves" / f"{run.name.replace('/', '-')}.png"
        levels = {f"published ({score.source}): {score}": float(score.value) for score in published_of(run.name)}
        yield draw_curves([run], path, levels)
        yield write_curves([run], path.with_suffix(".csv"))
    for dataset in dict.fromkeys(name.split("/")[0] for name in recipe_names()):
        names = [name for name in recipe_names() if name.startswith(f"{dataset}/") and measured_row(name, record)]
        if names:
            yield draw_measured(names, record, record.parent / f"measured-{dataset}.png")
    if readme.is_file() and record.parent.resolve().parent == readme.parent.resolve():
        old = readme.read_text(encoding="utf-8")
        new = TABLE.sub(lambda match: markdown(recipe_names(), record), old)
        if new != old:
            yield write_text(readme, new)


def draw_measured(recipes: Sequence[str], record: Path, path: Path) -> Path:
    """Draw published and measured scores of recipes with their 95 % intervals, and each seed as a dash.

    Args:
        recipes: names of recipes of one metric that were all measured.
        record: the CSV file of measured scores.
        path: PNG, SVG or PDF file to write.

    Raises:
        FileError: the file cannot be written.
    """
    figure = Figure(figsize=(6.4, 0.9 + 0.26 * len(recipes)))
    axis = figure.subplots()
    metric = ""
    for line, recipe in enumerate(recipes):
        row = measured_row(recipe, record)
        assert row is not None
        metric = row["metric"]
        seeds = [float(part.split(":")[1]) for part in row["per_seed"].split()]
        cut = int(row["updates"]) < int(row["planned_updates"])
        axis.plot(seeds, [line + 0.15] * len(seeds), "|", color=PALETTE[0], alpha=0.6)
        own = {"xerr": float(row["interval"]), "color": PALETTE[0], "markerfacecolor": "white" if cut else PALETTE[0]}
        axis.errorbar(float(row["value"]), line + 0.15, fmt="o", markersize=4, capsize=2, **own)
        for score in published_of(recipe):
            interval = float(score.interval) if score.interval else None
            axis.errorbar(
                float(score.value), line - 0.15, xerr=interval, fmt="s", markersize=3.5, capsize=2, color=PALETTE[1]
            )
    axis.plot([], [], "s", color=PALETTE[1], markersize=3.5, label="published")
    axis.plot([], [], "o", color=PALETTE[0], markersize=4, label="measured (hollow: schedule cut short; dashes: seeds)")
    axis.set_yticks(range(len(recipes)), [name.split("/", 1)[1] for name in recipes], fontsize=7)
    axis.set_ylim(len(recipes) - 0.4, -0.6)
    axis.set_xlabel("test accuracy, %" if metric == "accuracy" else "test error (MSE)", fontsize=8)
    if metric == "mse":
        axis.set_xscale("log")
    axis.tick_params(labelsize=7)
    axis.grid(axis="y", linewidth=0.3, color=QUIET)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(-0.02, -0.8 / figure.get_figheight()))
    return save(figure, path)
