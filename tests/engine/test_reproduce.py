"""Recipes run to the end by real processes: continued, not repeated, stopped in time."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import published_classes, write_class_folders

from quickstudy import engine
from quickstudy.analysis.results import measured_of
from quickstudy.engine.reproduce import Row, reproduce
from quickstudy.engine.run import Run
from quickstudy.engine.testing import Wish
from quickstudy.engine.testing import test_run as run_test
from quickstudy.errors import RecipeError

NAME = "sine/lstm-batch-5shot"
SHORT = ("--train.updates=4", "--validation.every=2", "--validation.tasks=4", "--test.tasks=6", "--train.trace=false")
SMALL = ("--method.hidden=[4]", "--method.steps=2")


def begun(folder: Path, *, updates: int) -> Run:
    """Return a run of four updates, of which so many are done."""
    settings = engine.parse_recipe(engine.recipe_text(NAME), [*SHORT, *SMALL, f"--train.updates={updates}"])
    run = engine.train(settings, folder, name=NAME, seeds=[0, 1])
    run.write_text("recipe.yaml", run.recipe_text.replace(f"updates: {updates}", "updates: 4"))
    return run


def test_a_run_is_continued_tested_and_then_done(tmp_path: Path) -> None:
    run, record = begun(tmp_path / "runs/a", updates=2), tmp_path / "measured.csv"
    told: list[tuple[str, str]] = []
    row = Row(NAME, run, [0])
    assert not reproduce([row], record, device="cpu", tell=lambda row: told.append((row.recipe, row.stage)))
    assert told == [(NAME, "train"), (NAME, "test"), (NAME, "done")], row.message
    assert (row.stage, row.updates, run.finished) == ("done", 4, True)
    lines = record.read_text().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(f"{NAME},mse,")
    assert measured_of(NAME, record) is None  # it is of other settings than the recipe's own

    again = Row(NAME, run, [0])
    assert again.stage == "done"
    assert not reproduce([again], record, device="cpu")
    assert record.read_text().splitlines() == lines


def test_when_time_is_up_what_has_begun_is_tested_if_asked(tmp_path: Path) -> None:
    run, record = begun(tmp_path / "runs/a", updates=2), tmp_path / "measured.csv"
    row = Row(NAME, run, [0])
    reproduce([row], record, device="cpu", seconds=0)
    assert (row.stage, row.updates) == ("train", 2)
    assert not record.exists()
    reproduce([row], record, device="cpu", seconds=0, partial=True)
    assert (row.stage, run.finished) == ("done", False)
    assert ",2,4," in record.read_text()  # two of four updates


def test_what_was_tested_by_hand_is_recorded(tmp_path: Path) -> None:
    run, record = begun(tmp_path / "a", updates=4), tmp_path / "measured.csv"
    run_test(run, Wish(), "cpu")
    row = Row(NAME, run, [0])
    assert row.stage == "done"
    reproduce([row], record, device="cpu")
    assert len(record.read_text().splitlines()) == 2


def test_when_time_is_up_what_has_trained_is_tested_if_asked(tmp_path: Path) -> None:
    row, record = Row(NAME, begun(tmp_path / "a", updates=4), [0]), tmp_path / "measured.csv"
    reproduce([row], record, device="cpu", seconds=0)
    assert row.stage == "test"
    reproduce([row], record, device="cpu", seconds=0, partial=True)
    assert row.stage == "done"


def test_what_some_seeds_have_not_begun_is_not_tested(tmp_path: Path) -> None:
    run = begun(tmp_path / "a", updates=2)
    metrics = run.folder / "metrics.jsonl"
    metrics.write_text("".join(line + "\n" for line in metrics.read_text().splitlines() if '"seed": 0' in line))
    row = Row(NAME, run, [0])
    reproduce([row], tmp_path / "measured.csv", device="cpu", seconds=0, partial=True)
    assert (row.stage, row.updates) == ("train", 0)


def test_what_fails_says_why_and_does_not_stop_others(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/mine.txt").write_text("")
    bad, good = Row(NAME, Run(tmp_path / "a"), [0]), Row(NAME, begun(tmp_path / "b", updates=4), [0])
    reproduce([bad, good], tmp_path / "measured.csv", device="cpu", jobs=2)
    assert (bad.stage, good.stage) == ("failed", "done")
    assert "holds other things than a run" in bad.message
    assert (tmp_path / "a/mine.txt").exists()
    with pytest.raises(RecipeError, match="at least 1"):
        reproduce([good], tmp_path / "measured.csv", device="cpu", jobs=0)


def test_what_is_published_on_other_datasets_is_tested_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTUDY_DATA", str(tmp_path))
    write_class_folders(tmp_path / "cifar-fs", published_classes("cifar-fs", 5, 5, 5), images=4)
    name, few = "glyphs/protonet-conv4-5w1s", ("--train.updates=1", "--test.tasks=2", "--test.task.queries=2")
    small = ("--method.backbone.channels=2", "--train.trace=false", "--validation.tasks=1")
    settings = engine.parse_recipe(engine.recipe_text(name), [*few, *small])
    run, record = engine.train(settings, tmp_path / "run", name=name), tmp_path / "measured.csv"
    row = Row(name, run, [0], ["cifar-fs", "cub"])  # birds are not here
    reproduce([row], record, device="cpu")
    assert row.stage == "done", row.message
    own, there = csv.DictReader(record.read_text().splitlines())
    assert (own["tested_on"], there["tested_on"]) == ("glyphs", "cifar-fs")
    assert "test tested_on cifar-fs" in there["differs"]
    assert Row(name, run, [0], ["cifar-fs"]).stage == "done"
    assert Row(name, run, [0], ["cifar-fs", "sine"]).stage == "test"


def test_data_that_is_not_here_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTUDY_DATA", str(tmp_path))
    monkeypatch.setenv("QUICKSTUDY_CACHE", str(tmp_path))
    row = Row("cub/protonet-conv4-5w1s", Run(tmp_path / "run"), [0])
    assert row.stage == "no data"
    assert "cub: not on this machine" in row.message


def test_the_command(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    begun(tmp_path / "runs" / NAME, updates=4)
    (tmp_path / "README.md").write_text("a\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nz\n")
    status, out, err = command("reproduce", f"{NAME},glyphs/nearest-neighbour-pixels-5w1s", "--jobs", "2")
    assert status == 0, out + err
    assert "nearest-neighbour-pixels-5w1s" in (tmp_path / "results/measured.csv").read_text()
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("a\n<!-- measured: begin -->\n| recipe | published |")
    assert readme.endswith("<!-- measured: end -->\nz\n")
    assert "old" not in readme
    assert "| glyphs/nearest-neighbour-pixels-5w1s | – |" in readme
    recorded = (tmp_path / "results/measured.csv").read_text()
    assert command("reproduce", "glyphs/nearest-neighbour-pixels-5w1s")[0] == 0
    assert (tmp_path / "results/measured.csv").read_text() == recorded  # what is done is not done again
    assert command("reproduce", NAME, "--record", "results/mine.csv", "--seeds", "0,1")[0] == 0
    assert (tmp_path / "README.md").read_text() == readme  # which is of results/measured.csv
    for name in ("measured-glyphs.png", "curves/sine-lstm-batch-5shot.png", "curves/sine-lstm-batch-5shot.csv"):
        assert (tmp_path / "results" / name).stat().st_size > 500
    _, out, _ = command("reproduce", NAME, "--missing", "--budget", "0")
    assert "1 of 1 to be continued" not in out
