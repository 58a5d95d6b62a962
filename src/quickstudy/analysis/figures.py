"""Figures without a screen, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from quickstudy.errors import FileError
from quickstudy.files import write_file

GOOD, BAD, QUIET = "#1a7f37", "#c2410c", "#6b7280"
"""Colours of what is right, of what is wrong, and of what is said in passing."""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, which most people can tell apart."""


def save(figure: Figure, path: Path) -> Path:
    """Write a figure in the format that the suffix of ``path`` names, PNG, SVG or PDF; return the path.

    Raises:
        FileError: the format is unknown, or the file cannot be written.
    """
    suffix = path.suffix.removeprefix(".")
    if suffix not in {"png", "svg", "pdf"}:
        raise FileError(f"a figure is a .png, .svg or .pdf file, and {path} is none of these")
    return write_file(path, lambda file: figure.savefig(file, format=suffix, dpi=150, bbox_inches="tight"))
