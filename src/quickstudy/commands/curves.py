"""``quickstudy curves``."""

from __future__ import annotations

from pathlib import Path


def curves(runs: str, out: Path = Path("curves.png")) -> None:
    """Draw the learning curves of runs beside the published numbers, and keep them as CSV in a file of the same name.

    Args:
        runs: folders of runs, with commas between them.
        out: PNG, SVG or PDF file to write.
    """
    from quickstudy.analysis import draw_curves, published_of, write_curves
    from quickstudy.engine import Run
    from quickstudy.errors import RecipeError

    opened = [Run.open(folder.strip()) for folder in runs.split(",")]
    levels = {}
    for run in opened:
        try:
            scores = published_of(run.name)
        except RecipeError:  # a recipe of the user's own
            continue
        levels |= {f"{run.name}, published ({score.source}): {score}": float(score.value) for score in scores}
    print(draw_curves(opened, out, levels))
    print(write_curves(opened, out.with_suffix(".csv")))
