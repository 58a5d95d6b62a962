"""Tests without training: methods that learn nothing, and backbones that learned elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import GLYPHS

from quickstudy import engine
from quickstudy.__main__ import main
from quickstudy.engine import testing
from quickstudy.engine.checkpoint import save_weights
from quickstudy.engine.testing import Wish
from quickstudy.engine.train import initial_methods, load_backbone
from quickstudy.errors import RecipeError
from quickstudy.nn import Conv4, FixedStatistics, population_statistics

NEAREST = (
    GLYPHS.split("method:")[0]
    + "method: {class_path: quickstudy.methods.NearestNeighbour}\ntrain:"
    + (GLYPHS.split("train:")[1])
)
FINE_TUNE = GLYPHS.replace(
    "ProtoNet\n  init_args:",
    (
        "FineTune\n  init_args:\n    steps: 3\n"
        "    optimizer: {class_path: quickstudy.methods.inner.SGD, init_args: {lr: 0.1}}"
    ),
)
IMAGES = torch.rand(6, 1, 28, 28)


def network(seed: int = 1, channels: int = 4) -> Conv4:
    torch.manual_seed(seed)
    built = Conv4(channels=channels)
    built(IMAGES)
    return built


def begun(text: str, *overrides: str) -> engine.Models:
    settings = engine.parse_recipe(text, overrides)
    return engine.Models(initial_methods(lambda: engine.instantiate(settings), [0]))


@pytest.mark.parametrize("text", [NEAREST, FINE_TUNE, GLYPHS.replace("updates: 4", "updates: 0")], ids=str.split)
def test_a_recipe_that_needs_no_training_is_tested(text: str) -> None:
    result = testing.test_recipe(engine.parse_recipe(text), Wish(tasks=8, queries=3), "cpu", name="mine")
    assert result.score.count == 8
    expected = {"updates": 0, "weights": "initial", "train_seconds": 0, "differs": "test queries 3; test tasks 8"}
    assert expected.items() <= result.setting.items()
    assert "(not trained)" in result.text()
    again = testing.test_recipe(engine.parse_recipe(text), Wish(tasks=8, queries=3), "cpu", name="mine")
    assert again.score == result.score


def test_other_recipes_are_to_be_trained_first() -> None:
    with pytest.raises(RecipeError, match="mine has to be trained before it is tested: give it to `quickstudy train`"):
        testing.test_recipe(engine.parse_recipe(GLYPHS), Wish(), "cpu", name="mine")


def test_a_method_that_learns_nothing_is_not_trained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="only tested \\(`quickstudy test RECIPE`, in Python meta_test\\)"):
        engine.train(engine.parse_recipe(FINE_TUNE), tmp_path / "run", name="mine")
    assert not (tmp_path / "run").exists()


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(FINE_TUNE)
    arguments = ["--tasks", "2", "--queries", "2", "--record", "measured.csv", "--method.steps", "1"]
    assert main(["test", "mine.yaml", *arguments]) == 0
    assert "1 inner steps, initial weights, 0 updates" in capsys.readouterr().out
    assert Path("measured.csv").read_text().count("\n") == 2
    assert main(["test", "glyphs/nearest-neighbour-pixels-5w1s", "--tasks", "2", "--pretrained=nowhere"]) == 1
    assert "the backbone weights nowhere, and there is no such file" in capsys.readouterr().err
    assert main(["test", "glyphs/maml-conv4-5w1s"]) == 1
    assert "has to be trained before it is tested" in capsys.readouterr().err
    run = engine.train(engine.parse_recipe(GLYPHS, ["--train.updates=0"]), tmp_path / "run", name="mine")
    assert main(["test", str(run.folder), "--tasks", "2"]) == 0
    assert main(["test", str(run.folder), "--train.updates=3"]) == 1
    assert "a run is tested as it was trained: leave --train.updates=3 out" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["plain", "of a run", "of quickstudy embed"])
def test_a_backbone_starts_from_a_file(kind: str, tmp_path: Path) -> None:
    source, path = network(), tmp_path / "backbone.safetensors"
    if kind == "plain":
        state = source.state_dict()
    elif kind == "of a run":
        state = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()} | {"head.bias": IMAGES}
    else:
        state = FixedStatistics(source, population_statistics(source, [IMAGES])).state_dict()
    save_weights(path, state)
    for text in (GLYPHS, FINE_TUNE):
        method = begun(text, f"--pretrained={path}").method
        torch.testing.assert_close(method.backbone(IMAGES), source(IMAGES), rtol=0, atol=0)
        assert not torch.equal(begun(text).method.backbone(IMAGES), source(IMAGES))
    result = testing.test_recipe(
        engine.parse_recipe(FINE_TUNE, [f"--pretrained={path}"]), Wish(tasks=2), "cpu", name="mine"
    )
    assert result.setting["weights"] == "pretrained"


def test_a_training_starts_from_a_file_and_then_needs_it_no_more(tmp_path: Path) -> None:
    source, path = network(), tmp_path / "backbone.safetensors"
    save_weights(path, source.state_dict())
    settings = engine.parse_recipe(GLYPHS, [f"--pretrained={path}", "--train.updates=0"])
    run = engine.train(settings, tmp_path / "run", name="mine")
    kept = run.load_weights("best", 0)
    for name, tensor in source.state_dict().items():
        assert torch.equal(kept[f"backbone.{name}"], tensor)
    path.unlink()
    assert testing.test_run(run, Wish(tasks=2), "cpu").score.count == 2


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (network(channels=3).state_dict(), r"it has 'convs.0.weight' of shape \[3, 1, 3, 3\], .*\[4, 1, 3, 3\]"),
        ({"x": IMAGES}, r"it has no 'convs.0.weight' \(and 16 more\); choose the backbone"),
        (network().state_dict() | {"x": IMAGES}, "it has 'x', which the network has not; choose"),
    ],
)
def test_weights_of_another_network(state: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    save_weights(path, state)
    backbone = network()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(RecipeError, match=message):
        load_backbone(backbone, path)
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)


def test_the_centre_is_the_mean_of_the_meta_training_tasks() -> None:
    text = GLYPHS.replace("updates: 4", "updates: 0").replace(
        "init_args:\n    b", "init_args:\n    distance: cosine\n    b"
    )
    centred, plain = (
        testing.test_recipe(
            engine.parse_recipe(text, [f"--method.normalise={how}"]), Wish(tasks=8), "cpu", name="mine"
        ).score
        for how in ("centred-l2", "l2")
    )
    assert centred.mean != plain.mean
