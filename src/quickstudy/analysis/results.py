"""Published numbers beside measured ones."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import yaml

from quickstudy.engine.recipe import recipe_names, recipe_text
from quickstudy.files import markdown_table

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""As safe as the other, and ten times as fast, where PyYAML has it: a table is of some two hundred recipes."""


@dataclass(frozen=True)
class Score:
    """One number of a table.

    Args:
        value: accuracy in percent, or a mean squared error, as it was written.
        interval: half-width of its 95 % interval, or empty if none is known.
        source: where it comes from: the key of a paper, or how it was measured.
        tested_on: the dataset, if it is another than that of the recipe.
    """

    value: str
    interval: str
    source: str
    tested_on: str = ""

    def __str__(self) -> str:
        return f"{self.value} ± {self.interval}" if self.interval else self.value

    @property
    def origin(self) -> str:
        """Its source, and where it was tested if that is another dataset."""
        return f"{self.source}, on {self.tested_on}" if self.tested_on else self.source


@cache
def published_of(recipe: str) -> tuple[Score, ...]:
    """Return the published numbers that a recipe is to reproduce, by the name of the recipe.

    Raises:
        RecipeError: there is no such recipe.
    """
    known = {row["id"]: row for row in _published()}
    identifiers = yaml.load(recipe_text(recipe), _LOADER).get("published", [])
    rows = {identifier: known[identifier] for identifier in identifiers if identifier in known}
    return tuple(
        Score(
            row["value"],
            row["interval"],
            identifier.rsplit("/", 1)[1],
            "" if row["tested_on"] == row["dataset"] else row["tested_on"],
        )
        for identifier, row in rows.items()
    )


def published_elsewhere(recipe: str) -> list[str]:
    """Return the names of the other datasets on which numbers of a recipe are published."""
    return [*dict.fromkeys(score.tested_on for score in published_of(recipe) if score.tested_on)]


def published_levels(names: Sequence[str]) -> dict[str, float]:
    """Return the published numbers of recipes on their own datasets, each with words for what it is.

    Names that are those of no recipe have none.
    """
    levels, known = {}, recipe_names()
    for name in dict.fromkeys(names):
        for score in published_of(name) if name in known else ():
            if not score.tested_on:
                own = f"{name}, " if len(names) > 1 else ""
                levels[f"{own}published ({score.source}): {score}"] = float(score.value)
    return levels


@cache
def _published() -> list[dict[str, str]]:
    return _table(results_file("published.csv"))


def measured_rows(record: Traversable | None = None) -> dict[str, dict[str, str]]:
    """Return what was measured of each recipe in its own setting; of several the longest trained, then that of most
    seeds, then the newest.

    Args:
        record: the CSV file of measured scores; that of the library if not given.
    """
    return {row["recipe"]: row for row in _in_order(record) if not row["differs"]}


def measured_elsewhere(record: Traversable | None = None) -> dict[tuple[str, str], dict[str, str]]:
    """Return what was measured of each recipe on each other dataset and else as the recipe says.

    Args:
        record: as of :func:`measured_rows`.
    """
    moved = ("test tested_on ", "test images ")  # images are brought to what the model reads
    return {
        (row["recipe"], row["tested_on"]): row
        for row in _in_order(record)
        if row["differs"].startswith(moved[0]) and all(part.startswith(moved) for part in row["differs"].split("; "))
    }


def _in_order(record: Traversable | None) -> list[dict[str, str]]:
    rows = _table(record or results_file("measured.csv"))
    return sorted(rows, key=lambda row: (int(row["updates"]), int(row["seeds"])))


def cut_short(row: Mapping[str, str]) -> bool:
    """Return whether the training behind a row of :func:`measured_rows` ended before its schedule."""
    return int(row["updates"]) < int(row["planned_updates"])


def measured_of(recipe: str, record: Traversable | None = None) -> Score | None:
    """Return the score of a recipe in :func:`measured_rows`, if it was measured."""
    row = measured_rows(record).get(recipe)
    return _score(row) if row else None


def _score(row: Mapping[str, str]) -> Score:
    """Return the score of a row; its source says how many seeds were trained, and how far.

    Percentages have two decimals, as tables have them, and errors as many as give their interval two digits.
    """
    seeds = f"{row['seeds']} seed{'s' if row['seeds'] != '1' else ''}"
    progress = (
        f"{int(row['updates']):,} of {int(row['planned_updates']):,} updates" if cut_short(row) else "full schedule"
    )
    interval = float(row["interval"])
    known = interval > 0  # of a single task none is
    digits = 2 if row["metric"] == "accuracy" or not known else max(0, 1 - math.floor(math.log10(interval)))
    value = f"{float(row['value']):.{digits}f}"
    return Score(value, f"{interval:.{digits}f}" if known else "", f"{seeds}, {progress}")


def summary(names: Sequence[str], record: Traversable | None = None) -> list[list[str]]:
    """Return a line for each recipe: its name, what was published, what was measured, and how."""
    rows, elsewhere = measured_rows(record), measured_elsewhere(record)
    lines = []
    for name in names:
        published = published_of(name)
        measured = _score(rows[name]) if name in rows else Score("not yet run", "", "")
        where = published_elsewhere(name)
        others = [f"{_score(elsewhere[name, on])} on {on}" for on in where if (name, on) in elsewhere]
        told = "; ".join(f"{score} ({score.origin})" for score in published)
        lines.append([name, told or "–", "; ".join([str(measured), *others]), measured.source])
    return lines


def markdown(names: Sequence[str], record: Traversable | None = None) -> str:
    """Return the recipes that were measured as a table in Markdown, and why numbers differ, where that is known."""
    lines = [line for line in summary(names, record) if line[-1]]
    header = ["recipe", "published", "measured here", "how"]
    why = {row["recipe"]: row["why"] for row in _table(results_file("differences.csv"))}
    notes = [f"- `{name}`: {why[name]}" for name, *_ in lines if name in why]
    return (
        "\n".join(
            [markdown_table(header, lines, left=4), *(["", "Where the columns differ:", "", *notes] if notes else [])]
        )
        + "\n"
    )


def results_file(name: str) -> Traversable:
    """Return a file of ``results/``: of the installed package, or of the source tree that the package runs from."""
    installed = resources.files("quickstudy") / "results" / name
    return installed if installed.is_file() else Path(__file__).parents[3] / "results" / name


def _table(file: Traversable) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.is_file() else []
