"""What is made anew when numbers were measured: figures beside the record, and the table of the README."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from quickstudy.analysis.curves import draw_curves, write_curves
from quickstudy.analysis.figures import PALETTE, QUIET, save
from quickstudy.analysis.results import cut_short, markdown, measured_rows, published_levels, published_of
from quickstudy.engine.recipe import recipe_names
from quickstudy.engine.run import Run
from quickstudy.files import write_text

TABLE = re.compile(r"(?<=<!-- measured: begin -->\n).*?(?=<!-- measured: end -->)", re.DOTALL)
"""Where the README has the table of :func:`markdown`."""


def write_report(record: Path, runs: Sequence[Run], readme: Path = Path("README.md")) -> Iterator[Path]:
    """Make the figures, learning curves and the table anew; yield the files written.

    Args:
        record: the CSV file of measured scores. A figure for each dataset, ``measured-DATASET.png`` if it is
            ``measured.csv``, is written beside it, and the learning curves into ``curves/``.
        runs: whose learning curves to draw.
        readme: a file with the marks of :data:`TABLE`; left alone if it has none, or if the record is not
            ``results/measured.csv`` beside it.
    """
    for run in runs:
        path = record.parent / "curves" / f"{run.name.replace('/', '-')}.png"
        yield draw_curves([run], path, published_levels([run.name]))
        yield write_curves([run], path.with_suffix(".csv"))
    names, rows = recipe_names(), measured_rows(record)
    for dataset in dict.fromkeys(name.split("/")[0] for name in names):
        own = [rows[name] for name in names if name.startswith(f"{dataset}/") and name in rows]
        if own:
            yield draw_measured(own, record.with_name(f"{record.stem}-{dataset}.png"))
    if readme.is_file() and record.resolve() == (readme.parent / "results" / "measured.csv").resolve():
        old = readme.read_text(encoding="utf-8")
        new = TABLE.sub(lambda match: markdown(names, record), old)
        if new != old:
            yield write_text(readme, new)


def draw_measured(rows: Sequence[Mapping[str, str]], path: Path) -> Path:
    """Draw published and measured scores of recipes with their 95 % intervals, and each seed as a dash.

    Args:
        rows: of :func:`~quickstudy.analysis.results.measured_rows`, of recipes of one metric.
        path: PNG, SVG or PDF file to write.

    Raises:
        FileError: the file cannot be written.
    """
    figure = Figure(figsize=(6.4, 0.9 + 0.26 * len(rows)))
    axis = figure.subplots()
    metric = rows[0]["metric"]
    for line, row in enumerate(rows):
        seeds = [float(part.split(":")[1]) for part in row["per_seed"].split()]
        axis.plot(seeds, [line + 0.15] * len(seeds), "|", color=PALETTE[0], alpha=0.6)
        own = {
            "xerr": float(row["interval"]),
            "color": PALETTE[0],
            "markerfacecolor": "white" if cut_short(row) else PALETTE[0],
        }
        axis.errorbar(float(row["value"]), line + 0.15, fmt="o", markersize=4, capsize=2, **own)
        for score in (score for score in published_of(row["recipe"]) if not score.tested_on):
            interval = float(score.interval) if score.interval else None
            axis.errorbar(
                float(score.value), line - 0.15, xerr=interval, fmt="s", markersize=3.5, capsize=2, color=PALETTE[1]
            )
    axis.plot([], [], "s", color=PALETTE[1], markersize=3.5, label="published")
    axis.plot([], [], "o", color=PALETTE[0], markersize=4, label="measured (hollow: schedule cut short; dashes: seeds)")
    axis.set_yticks(range(len(rows)), [row["recipe"].split("/", 1)[1] for row in rows], fontsize=7)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("test accuracy, %" if metric == "accuracy" else "test error (MSE)", fontsize=8)
    if metric == "mse":
        axis.set_xscale("log")
    axis.tick_params(labelsize=7)
    axis.grid(axis="y", linewidth=0.3, color=QUIET)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(-0.02, -0.8 / figure.get_figheight()))
    return save(figure, path)
