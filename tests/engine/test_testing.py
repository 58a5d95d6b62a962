"""The number at the end: its interval, its setting, its place in the files."""

from __future__ import annotations

import csv
import json
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GLYPHS, SINE
from scipy import stats
from torch import Tensor, nn

from quickstudy import engine
from quickstudy.engine import testing
from quickstudy.engine.checkpoint import restore, tensors_of
from quickstudy.engine.statistics import estimate
from quickstudy.engine.testing import Wish, append_measured, is_recorded, kept_result
from quickstudy.errors import DataError, RecipeError, TrainingError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> engine.Run:
    return engine.train(engine.parse_recipe(GLYPHS), tmp_path_factory.mktemp("run"), name="glyphs/x", seeds=[0, 1])


def test_interval_is_student_t() -> None:
    values = torch.rand(37).double()
    found = estimate(values)
    low, high = stats.t.interval(0.95, 36, loc=values.mean(), scale=stats.sem(values))
    assert found.mean == pytest.approx(values.mean().item())
    assert found.interval == pytest.approx((high - low) / 2)
    assert estimate([0.5]).interval != estimate([0.5]).interval  # one value has no interval: NaN


def test_pools_the_tasks_of_all_seeds(run: engine.Run) -> None:
    result = testing.test_run(run, Wish(), "cpu")
    assert result.score.count == 20
    assert set(result.per_seed) == {0, 1}
    assert result.score.mean == pytest.approx(sum(result.per_seed.values()) / 2)
    stored = json.loads((run.folder / "test.jsonl").read_text().splitlines()[-1])
    assert stored["score"]["mean"] == result.score.mean
    assert stored["setting"]["norm"] == "batch"
    assert testing.test_run(run, Wish(), "cpu").score == result.score  # the same tasks each time


def test_wishes_change_the_setting(run: engine.Run) -> None:
    result = testing.test_run(run, Wish(tasks=3, way=7, shot=2, queries=4, norm="support", weights="last"), "cpu")
    expected = {"way": 7, "shot": 2, "queries": 4, "tasks": 6, "norm": "support", "weights": "last", "steps": None}
    assert expected.items() <= result.setting.items()
    assert "7-way 2-shot" in result.text()


def test_what_differs_from_the_recipe_is_said(tmp_path: Path) -> None:
    as_planned = testing.test_run(_few(tmp_path / "a", "--train.batching=vmap"), Wish(tasks=2, steps=14), "cpu")
    assert "test" not in as_planned.setting["differs"].replace("test.tasks", "")
    assert "batching" not in as_planned.setting["differs"]
    few = _few(tmp_path / "few", "--method.inner_lr=0.5")
    found = testing.test_run(few, Wish(tasks=3, steps=2), "cpu")
    for part in ("train.updates 1", "method.init_args.inner_lr 0.5", "test tasks 3", "test steps 2"):
        assert part in found.setting["differs"].split("; ")
    assert "not as in the recipe" in found.text()


def _few(folder: Path, *overrides: str) -> engine.Run:
    quick = ["--train.updates=1", "--validation.tasks=2", "--test.tasks=2", "--train.trace=false", *overrides]
    settings = engine.parse_recipe(engine.recipe_text("sine/maml-5shot"), quick)
    return engine.train(settings, folder, name="sine/maml-5shot")


def test_wishes_that_do_not_fit(run: engine.Run) -> None:
    with pytest.raises(RecipeError, match="at least one task"):
        testing.test_run(run, Wish(tasks=0), "cpu")
    with pytest.raises(DataError, match="one query"):
        testing.test_run(run, Wish(queries=0), "cpu")
    with pytest.raises(RecipeError, match="takes no inner steps"):
        testing.test_run(run, Wish(steps=3), "cpu")
    with pytest.raises(RecipeError, match="score on sine is mse"):
        testing.test_run(run, Wish(on="sine"), "cpu")


@pytest.fixture
def coloured(tmp_path: Path) -> engine.Run:
    """A run on images of 3×16×16, of which the middle is read."""
    x = np.random.default_rng(0).integers(0, 256, (600, 3, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", x=x, y=np.arange(600) // 20)
    crop = "[{class_path: quickstudy.data.CenterCrop, init_args: {size: 12}}]"
    arguments = f"{{path: {tmp_path}/own.npz, train_transforms: {crop}, test_transforms: {crop}}}"
    recipe = GLYPHS.replace("quickstudy.data.Glyphs", f"quickstudy.data.ArrayFile, init_args: {arguments}")
    settings = engine.parse_recipe(recipe, ["--method.backbone.blocks=2", "--train.updates=1"])
    return engine.train(settings, tmp_path / "run", name="own/x")


def test_images_of_another_dataset_are_brought_to_what_the_model_reads(coloured: engine.Run) -> None:
    result = testing.test_run(coloured, Wish(on="glyphs"), "cpu")
    assert result.setting["differs"] == "test tested_on glyphs; test images of 1×28×28 as 3×12×12"
    assert result.score.count == 10
    own = testing.test_run(coloured, Wish(), "cpu")
    assert own.setting["differs"] == ""
    assert testing.test_run(coloured, Wish(on="own"), "cpu").score == own.score  # as its recipe has it


def test_inner_steps_change_the_score(tmp_path: Path) -> None:
    run = engine.train(engine.parse_recipe(SINE), tmp_path / "run", name="sine/x")
    none, many = (testing.test_run(run, Wish(steps=steps), "cpu") for steps in (0, 10))
    assert many.score.mean != none.score.mean
    assert "mse" in many.text()
    with pytest.raises(RecipeError, match="leave --way out"):
        testing.test_run(run, Wish(way=5), "cpu")
    with pytest.raises(RecipeError, match="zero or more inner steps, not -1"):
        testing.test_run(run, Wish(steps=-1), "cpu")


def test_seeds_that_trained_together_took_their_time_once(tmp_path: Path) -> None:
    times = {}
    for together in ("true", "false"):
        settings = engine.parse_recipe(SINE, [f"--train.together={together}"])
        run = engine.train(settings, tmp_path / together, name="sine/x", seeds=[0, 1])
        rows = run.metrics()
        rows = [{**row, "seconds": 10.0, "update": 20 if row["seed"] else row["update"]} for row in rows]
        run.write_metrics(rows)
        times[together] = testing.test_run(run, Wish(tasks=2), "cpu").setting
    assert (times["true"]["train_seconds"], times["false"]["train_seconds"]) == (10, 20)
    assert times["true"]["updates"] == 20  # of the seed that got least far


def test_double_precision_stays_in_the_test(tmp_path: Path) -> None:
    settings = engine.parse_recipe(SINE, ["--train.precision=float64"])
    run = engine.train(settings, tmp_path / "run", name="sine/x")
    assert testing.test_run(run, Wish(tasks=2), "cpu").score.count == 2


def test_tasks_that_a_method_was_not_built_for(tmp_path: Path) -> None:
    maml = GLYPHS.replace("ProtoNet", "MAML")
    run = engine.train(engine.parse_recipe(maml, ["--train.updates=1"]), tmp_path / "run", name="glyphs/maml")
    with pytest.raises(RecipeError, match="built for 5-way tasks and cannot take 7-way ones"):
        testing.test_run(run, Wish(way=7), "cpu")
    settings = engine.parse_recipe(maml, ["--validation.task={way: 3, shot: 1, queries: 1}"])
    with pytest.raises(RecipeError, match="3-way"):
        engine.train(settings, tmp_path / "other", name="glyphs/maml")
    assert not (tmp_path / "other").exists()


def test_results_are_appended_to_one_file(run: engine.Run, tmp_path: Path) -> None:
    path = tmp_path / "results" / "measured.csv"
    result = testing.test_run(run, Wish(tasks=2), "cpu")
    append_measured(path, result)
    append_measured(path, result)
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 2
    assert rows[0]["recipe"] == "glyphs/x"
    assert float(rows[0]["value"]) == pytest.approx(100 * result.score.mean, rel=1e-4)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(RecipeError, match="other columns"):
        append_measured(path, result)
    assert path.read_text() == "a,b\n1,2\n"


def test_what_was_tested_is_found_again(run: engine.Run) -> None:
    wish = Wish(tasks=3, way=6, norm="support")
    assert kept_result(run, wish) is None
    result = testing.test_run(run, wish, "cpu")
    own = testing.test_run(run, Wish(), "cpu")
    assert kept_result(run, wish) == result
    assert kept_result(run) == kept_result(run, Wish(on="glyphs", way=5, shot=1)) == own
    for other in (Wish(tasks=4, way=6, norm="support"), Wish(tasks=3, way=6), Wish(on="omniglot")):
        assert kept_result(run, other) is None


def test_a_wish_for_certain_tasks_means_all_of_them() -> None:
    wish = Wish(on="omniglot-runs", norm="support")
    assert wish.filled() == replace(wish, tasks=20, way=20, shot=1, queries=1)
    for complete in (replace(wish, way=5), Wish(on="glyphs"), Wish(on="own"), Wish()):
        assert complete.filled() == complete


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not the folder of a run"):
        engine.Run.open(tmp_path)


class Grid(nn.Module):
    """A backbone with a buffer that is not persistent, and a weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.one, self.other = nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.register_buffer("grid", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(self.inward(x) * self.grid).relu())


def test_any_network_that_trains_is_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("grid_of_a_test")
    monkeypatch.setattr(Grid, "__module__", module.__name__)
    module.Grid = Grid  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    run = _few(tmp_path / "run", "--method.backbone=grid_of_a_test.Grid", "--train.precision=float64")
    (method,) = testing.trained_methods(run, "last")
    saved = run.load_weights("last", 0)
    assert saved.keys() >= {"backbone.grid", "backbone.one.weight"}
    for name, tensor in tensors_of(method).items():
        assert torch.equal(tensor, saved[name])
    assert testing.test_run(run, Wish(tasks=2), "cpu").score.count == 2


def test_weights_of_another_network_are_refused() -> None:
    other = nn.Linear(3, 2)
    with pytest.raises(TrainingError, match=r"'weight' has the shape \(2, 3\) there and \(3, 2\) here"):
        restore(nn.Linear(2, 3), tensors_of(other))
    with pytest.raises(TrainingError, match="'bias' has the shape of nothing there"):
        restore(other, {"weight": other.weight})


def test_the_record_has_one_header_whoever_comes_first(tmp_path: Path, run: engine.Run) -> None:
    result, record = testing.test_run(run, Wish(tasks=2), "cpu"), tmp_path / "new" / "measured.csv"
    assert not is_recorded(record, result)
    with ThreadPoolExecutor(8) as pool:
        [*pool.map(lambda _: append_measured(record, result), range(8))]
    assert len([*csv.DictReader(record.read_text().splitlines())]) == 8
    assert record.read_text().count("recipe,metric") == 1
    assert [path.name for path in record.parent.iterdir()] == ["measured.csv"]
    assert is_recorded(record, result)
