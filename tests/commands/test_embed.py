"""``quickstudy embed`` as a user types it, and a method that learns from what it has written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quickstudy.__main__ import main

Command = Callable[..., tuple[int, str, str]]

SMALL = ("--backbone=quickstudy.nn.MLP", "--backbone.widths=[8]", "--train.epochs=1", "--train.batch=512")


def test_embed_then_train_then_test(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    status, out, err = command("embed", "glyphs-conv4", *SMALL, "--validation.tasks=100", "--seed", "3")
    assert (status, err) == (0, "")
    assert "embed/glyphs-conv4 · seed 3 · 39/39 updates" in out
    assert "images/s" in out
    assert "8 numbers for each of 27,340 images; epoch" in out
    run = tmp_path / "runs" / "embed" / "glyphs-conv4"
    info = json.loads((run / "embed.json").read_text())
    assert info["embeddings"] == {"train": 20_380, "val": 2_000, "test": 4_960}

    advice = next(line for line in out.splitlines() if line.startswith("next: quickstudy train RECIPE"))
    few = ("--method.backbone=quickstudy.nn.MLP", "--train.updates=2", "--validation.tasks=4", "--train.trace=false")
    recipe = "glyphs/protonet-conv4-5w1s"
    status, out, err = command("train", recipe, *advice.split()[4:], *few, "--out", "runs/proto")
    assert status == 0, err
    monkeypatch.chdir(tmp_path)
    assert main(["test", "runs/proto", "--tasks", "5"]) == 0
    assert "on glyphs" in capsys.readouterr().out

    assert main(["embed", str(run), "--resume"]) == 0  # nothing is left to train
    assert " updates ·" not in capsys.readouterr().out
    assert main(["embed", str(run)]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed"], "recipe"),
        (["embed", "cifar-fs-resnet"], "did you mean 'embed/cifar-fs-resnet12'"),
        (["embed", "nowhere.yaml"], "cannot read the recipe nowhere.yaml"),
        (["embed", "glyphs-conv4", "--layout", "lio"], "--layout takes one of 'own', 'leo', not 'lio'"),
        (["embed", "glyphs-conv4", "--backbone.chanels", "3"], "did you mean 'channels'"),
        (["embed", "glyphs-conv4", "--epochs", "3"], "see `quickstudy embed --help`"),
        (["train", "embed/glyphs-conv4"], "no recipe 'embed/glyphs-conv4'"),
    ],
)
def test_mistakes_get_one_message_and_a_status(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("quickstudy: ")
    assert message in err
    assert not Path("runs").exists()


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture) -> None:
    assert main(["recipes", "sine/maml-5shot"]) == 0
    capsys.readouterr()
    assert main(["recipes", "sine/maml"]) == 0
    assert "embed/cifar-fs-resnet12" in capsys.readouterr().out
    assert main(["recipes", "embed/cifar-fs-resnet12"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# ResNet-12 as a classifier")
    assert "drop_rate: 0.1" in out
    assert "epochs: 60" in out
