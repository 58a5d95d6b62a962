"""The table of published numbers is sound, and measured ones stand beside those they belong to."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from quickstudy.analysis import measured_of, published_levels, published_of, results, summary
from quickstudy.analysis.results import published_elsewhere, results_file
from quickstudy.engine.recipe import recipe_names, recipe_text

ROWS = list(csv.DictReader(results_file("published.csv").read_text(encoding="utf-8").splitlines()))


def test_every_published_number_is_whole() -> None:
    assert len({row["id"] for row in ROWS}) == len(ROWS) > 200
    for row in ROWS:
        assert row["provenance"] in {"paper", "notebook", "readme", "secondary", "memory"}, row
        assert row["metric"] == ("mse" if row["dataset"] == "sine" else "accuracy"), row
        assert bool(row["way"]) == (row["metric"] == "accuracy"), row
        assert int(row["shot"]) > 0
        assert 0 < float(row["value"]) < (100 if row["way"] else 1), row
        assert not row["interval"] or 0 < float(row["interval"]) < float(row["value"]), row
        assert row["source"]
        assert row["dataset"] in row["id"]


def test_the_tables_of_the_specification() -> None:
    """A few numbers of each table, so that no table is missing."""
    known = {row["id"]: (row["value"], row["interval"]) for row in ROWS}
    assert known["sine/op-lstm-91x3-5shot/huisman2023"] == ("0.1054", "0.009")
    assert known["omniglot/maml-mlp-5w1s/huisman2023"] == ("84.09", "0.92")
    assert known["cub-to-miniimagenet/op-lstm-conv4-5w5s/huisman2023"] == ("49.02", "0.4")
    assert known["miniimagenet/meta-lstm-conv4-32-5w5s/ravi2017"] == ("60.6", "0.71")
    assert known["tieredimagenet/leo-wrn-28-10-5w5s/rusu2019"] == ("81.44", "0.09")
    assert known["omniglot/matching-l2-conv4-20w1s/reimplementation"] == ("92.8", "")
    assert known["cifar-fs/protonet-conv4-5w1s/bertinetto2019"] == ("55.5", "0.7")


def test_each_recipe_finds_its_numbers() -> None:
    for name in recipe_names():
        assert published_of(name) or "No published number" in " ".join(re.split(r"[#\s]+", recipe_text(name)))
    (score, again) = published_of("omniglot/protonet-conv4-5w1s")
    assert (str(score), score.source) == ("98.8", "snell2017")
    assert again.source == "reimplementation"


def test_the_measured_number_is_the_longest_trained_of_the_recipes_own_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def row(value: str, updates: int, differs: str = "", seeds: str = "1") -> dict[str, str]:
        schedule = {"updates": str(updates), "planned_updates": "100"}
        of = {"recipe": "r", "metric": "accuracy", "value": value, "interval": "1"}
        return {**of, "differs": differs, "seeds": seeds, **schedule}

    table = [row("1", 100), row("2", 50), row("3", 100), row("4", 200, "train.updates 200")]
    monkeypatch.setattr(results, "_table", lambda name: table)
    found = measured_of("r")
    assert (str(found), found.source if found else "") == ("3.00 ± 1.00", "1 seed, full schedule")
    table.append(row("5", 100, seeds="3"))
    assert str(measured_of("r")) == "5.00 ± 1.00"
    del table[:1], table[1:]
    found = measured_of("r")
    assert found is not None
    assert found.source == "1 seed, 50 of 100 updates"
    assert measured_of("another") is None


@pytest.mark.parametrize(
    ("metric", "value", "interval", "shown"),
    [
        ("accuracy", "81.362", "0.5", "81.36 ± 0.50"),
        ("accuracy", "99.589", "0.077", "99.59 ± 0.08"),
        ("accuracy", "80", "nan", "80.00"),
        ("mse", "0.0058342", "0.00019", "0.00583 ± 0.00019"),
        ("mse", "0.17906", "0.012", "0.179 ± 0.012"),
        ("mse", "0.51523", "0.02", "0.515 ± 0.020"),
        ("mse", "31.2", "12", "31 ± 12"),
        ("mse", "312", "120", "312 ± 120"),
    ],
)
def test_a_measured_number_has_the_digits_that_its_interval_gives_it(
    monkeypatch: pytest.MonkeyPatch, metric: str, value: str, interval: str, shown: str
) -> None:
    row = {"recipe": "r", "differs": "", "updates": "1", "planned_updates": "1", "seeds": "1"}
    row |= {"metric": metric, "value": value, "interval": interval}
    monkeypatch.setattr(results, "_table", lambda name: [row])
    assert str(measured_of("r")) == shown


def test_numbers_on_other_datasets_stand_beside_those_published_there(monkeypatch: pytest.MonkeyPatch) -> None:
    name, common = "cub/protonet-conv4-5w1s", {"metric": "accuracy", "interval": "0.5", "seeds": "1"}
    schedule = {"recipe": name, "updates": "1", "planned_updates": "1"}
    there = {**schedule, **common, "tested_on": "miniimagenet"}
    table = [
        {**there, "value": "60", "tested_on": "cub", "differs": ""},
        {**there, "value": "30", "differs": "test tested_on miniimagenet; test images of 3×90×90 as 3×84×84"},
        {**there, "value": "10", "differs": "test tested_on miniimagenet; test queries 1"},
        {**there, "value": "20", "differs": "train.updates 1; test tested_on miniimagenet"},
    ]
    published, known = published_of(name), results._table
    assert {score.tested_on for score in published} == {"", "miniimagenet"}
    assert published_elsewhere(name) == ["miniimagenet"]
    measured = results_file("measured.csv")
    monkeypatch.setattr(results, "_table", lambda file: table if file == measured else known(file))
    ((_, told, found, how),) = summary([name])
    assert "(huisman2023, on miniimagenet)" in told
    assert (found, how) == ("60.00 ± 0.50; 30.00 ± 0.50 on miniimagenet", "1 seed, full schedule")
    assert all("miniimagenet" not in level for level in published_levels([name, "a user's own"]))
    assert len(published_levels([name])) == len([score for score in published if not score.tested_on])


def test_the_summary_has_a_line_for_each_recipe() -> None:
    lines = summary(["sine/maml-5shot", "glyphs/protonet-conv4-5w1s"])
    assert lines[0][:2] == ["sine/maml-5shot", "0.1765 ± 0.0094 (huisman2023)"]
    assert lines[1][1] == "–"


def test_measured_numbers_have_the_columns_that_are_written(tmp_path: Path) -> None:
    text = results_file("measured.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert {"recipe", "value", "interval", "updates", "planned_updates", "differs", "seeds", "commit"} <= set(rows[0])
