"""``quickstudy curves``."""

from __future__ import annotations

from pathlib import Path


def curves(runs: str, out: Path = Path("curves.png")) -> None:
    """Draw the learning curves of runs beside the published numbers, and keep them as CSV in a file of the same name.

    Args:
        runs: folders of runs, with commas between them.
        out: PNG, SVG or PDF file to write.
    """
    from quickstudy.analysis import draw_curves, published_levels, write_curves
    from quickstudy.engine import Run

    opened = [Run.open(folder.strip()) for folder in runs.split(",")]
    print(draw_curves(opened, out, published_levels([run.name for run in opened])))
    print(write_curves(opened, out.with_suffix(".csv")))
