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
    known = {row["id"]: row for row in _table("published.csv")}
    identifiers = yaml.safe_load(recipe_text(recipe)).get("published", [])
    return [
        Score(row["value"], row["interval"], _source(row, identifier))
        for identifier in identifiers
        if (row := known.get(identifier))
    ]


def _source(row: dict[str, str], identifier: str) -> str:
    source = identifier.rsplit("/", 1)[1]
    return source if row["tested_on"] == row["dataset"] else f"{source}, on {row['tested_on']}"


def measured_of(recipe: str) -> Score | None:
    """Return what was measured of a recipe in its own setting; of several, the longest trained, then the newest."""
    rows = [row for row in _table("measured.csv") if row["recipe"] == recipe and not row["differs"]]
    if not rows:
        return None
    best = max(enumerate(rows), key=lambda pair: (int(pair[1]["updates"]), int(pair[1]["seeds"]), pair[0]))[1]
    seeds = f"{best['seeds']} seed{'s' if best['seeds'] != '1' else ''}"
    done, planned = int(best["updates"]), int(best["planned_updates"])
    progress = "full schedule" if done >= planned else f"{done:,} of {planned:,} updates"
    return Score(best["value"], best["interval"], f"{seeds}, {progress}")


def summary(names: Sequence[str]) -> list[list[str]]:
    """Return a line for each recipe: its name, what was published, what was measured, and how."""
    lines = []
    for name in names:
        measured = measured_of(name)
        published = "; ".join(f"{score} ({score.source})" for score in published_of(name))
        lines.append(
            [name, published or "–", str(measured or "not yet run"), measured.source if measured is not None else ""]
        )
    return lines


def results_file(name: str) -> Traversable:
    """Return a file of ``results/``: of the installed package, or of the source tree that the package runs from."""
    installed = resources.files("quickstudy") / "results" / name
    return installed if installed.is_file() else Path(__file__).parents[3] / "results" / name


@cache
def _table(name: str) -> list[dict[str, str]]:
    file = results_file(name)
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.is_file() else []
