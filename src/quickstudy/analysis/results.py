"""Published numbers beside measured ones."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import yaml

from quickstudy.engine.recipe import recipe_text


@dataclass(frozen=True)
class Score:
    """One number of a table.

    Args:
        value: accuracy in percent, or a mean squared error, as it was written.
        interval: half-width of its 95 % interval, or empty if none is known.
        source: where it comes from: the key of a paper, or how it was measured.
    """

    value: str
    interval: str
    source: str

    def __str__(self) -> str:
        return f"{self.value} ± {self.interval}" if self.interval else self.value


def published_of(recipe: str) -> list[Score]:
    """Return the published numbers that a recipe is to reproduce, by the name of the recipe.

    Raises:
        RecipeError: there is no such recipe.
    """
    known = {row["id"]: row for row in _published()}
    identifiers = yaml.safe_load(recipe_text(recipe)).get("published", [])
    return [
        Score(row["value"], row["interval"], _source(row, identifier))
        for identifier in identifiers
        if (row := known.get(identifier))
    ]


@cache
def _published() -> list[dict[str, str]]:
    return _table(results_file("published.csv"))


def _source(row: dict[str, str], identifier: str) -> str:
    source = identifier.rsplit("/", 1)[1]
    return source if row["tested_on"] == row["dataset"] else f"{source}, on {row['tested_on']}"


def measured_row(recipe: str, record: Traversable | None = None) -> dict[str, str] | None:
    """Return what was measured of a recipe in its own setting; of several the longest trained, then the newest.

    Args:
        recipe: its name.
        record: the CSV file of measured scores; that of the library if not given.
    """
    rows = [row for row in _table(record or results_file("measured.csv")) if row["recipe"] == recipe]
    rows = [row for row in rows if not row["differs"]]
    order = [(int(row["updates"]), int(row["seeds"]), number) for number, row in enumerate(rows)]
    return rows[max(order)[-1]] if rows else None


def measured_of(recipe: str, record: Traversable | None = None) -> Score | None:
    """Return the score of :func:`measured_row`; its source says how many seeds were trained, and how far."""
    row = measured_row(recipe, record)
    if row is None:
        return None
    seeds = f"{row['seeds']} seed{'s' if row['seeds'] != '1' else ''}"
    done, planned = int(row["updates"]), int(row["planned_updates"])
    progress = "full schedule" if done >= planned else f"{done:,} of {planned:,} updates"
    return Score(row["value"], row["interval"], f"{seeds}, {progress}")


def note_of(recipe: str) -> str:
    """Return why the measured number of a recipe is another than the published one, where there is something to say."""
    rows = _table(results_file("differences.csv"))
    return next((row["why"] for row in rows if row["recipe"] == recipe), "")


def summary(names: Sequence[str], record: Traversable | None = None) -> list[list[str]]:
    """Return a line for each recipe: its name, what was published, what was measured, and how."""
    lines = []
    for name in names:
        measured = measured_of(name, record)
        published = "; ".join(f"{score} ({score.source})" for score in published_of(name))
        lines.append(
            [name, published or "–", str(measured or "not yet run"), measured.source if measured is not None else ""]
        )
    return lines


def markdown(names: Sequence[str], record: Traversable | None = None) -> str:
    """Return the recipes that were measured as a table in Markdown, with a line for each that has a :func:`note_of`."""
    lines = [line for line in summary(names, record) if line[-1]]
    header = ["recipe", "published", "measured here", "how"]
    table = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines)]
    notes = [f"- `{name}`: {note}" for name, *_ in lines if (note := note_of(name))]
    return "\n".join([*table, *(["", "Where the columns differ:", "", *notes] if notes else [])]) + "\n"


def results_file(name: str) -> Traversable:
    """Return a file of ``results/``: of the installed package, or of the source tree that the package runs from."""
    installed = resources.files("quickstudy") / "results" / name
    return installed if installed.is_file() else Path(__file__).parents[3] / "results" / name


def _table(file: Traversable) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.is_file() else []
