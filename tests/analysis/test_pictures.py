"""Figures are files of the right kind, or nothing; curves and their CSV say what the runs say."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from helpers import GLYPHS, SINE
from PIL import Image

from quickstudy import analysis, engine
from quickstudy.data import Sine
from quickstudy.errors import FileError, RecipeError
from quickstudy.task import Task, TaskShape


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[engine.Run]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        engine.train(engine.parse_recipe(text), folder / name, name=name, seeds=seeds)
        for name, text, seeds in (("glyphs/x", GLYPHS, [0, 1]), ("sine/x", SINE, [0]))
    ]


def pixels(path: Path) -> int:
    with Image.open(path) as picture:
        picture.load()
        return picture.width * picture.height


@pytest.mark.parametrize("channels", [1, 3])
def test_a_task_of_images(tmp_path: Path, channels: int) -> None:
    labels = torch.arange(3)
    x = torch.rand(12, channels, 8, 8)
    task = Task(x[:3], labels, x, labels.repeat_interleave(4), way=3)
    path = analysis.draw_task(task, torch.randn(12, 3), tmp_path / "task.png", "some task")
    assert pixels(path) > 10_000


def test_waves(tmp_path: Path) -> None:
    batch = Sine().split("test").tasks(TaskShape(None, 5, 20), 0, 5, seed=0)
    assert pixels(analysis.draw_waves(batch, tmp_path / "waves.png")) > 10_000


def test_curves_and_their_numbers(runs: list[engine.Run], tmp_path: Path) -> None:
    path = analysis.draw_curves(runs[:1] * 2, tmp_path / "curves.png", {"chance": 20.0})
    assert pixels(path) > 10_000
    analysis.draw_curves(runs[1:], tmp_path / "sine.svg")
    rows = list(csv.DictReader(analysis.write_curves(runs, tmp_path / "curves.csv").open()))
    assert [row["recipe"] for row in rows] == ["glyphs/x"] * 6 + ["sine/x"] * 4
    for row, kept in zip(rows, runs[0].metrics() + runs[1].metrics()):
        assert float(row["val_score"]) == pytest.approx(kept["val_score"], rel=1e-5)


def test_what_cannot_be_drawn(runs: list[engine.Run], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot share an axis"):
        analysis.draw_curves(runs, tmp_path / "both.png")
    with pytest.raises(FileError, match=r"\.png, \.svg or \.pdf"):
        analysis.draw_curves(runs[:1], tmp_path / "curves.jpeg")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot write .*curves\.png"):
        analysis.draw_curves(runs[:1], tmp_path / "file" / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
