"""Pictures and tables of what was trained and measured."""

from quickstudy.analysis.curves import draw_curves, write_curves
from quickstudy.analysis.pictures import draw_task, draw_waves
from quickstudy.analysis.results import Score, markdown, measured_of, published_levels, published_of, summary

__all__ = [
    "Score",
    "draw_curves",
    "draw_task",
    "draw_waves",
    "markdown",
    "measured_of",
    "published_levels",
    "published_of",
    "summary",
    "write_curves",
]
