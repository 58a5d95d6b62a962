"""The command as a user types it: real processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import GLYPHS, SINE

from quickstudy.__main__ import COMMANDS, find, main
from quickstudy.errors import RecipeError

Command = Callable[..., tuple[int, str, str]]


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from quickstudy.__main__ import main; main(['--help']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'jsonargparse', 'matplotlib', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_without_torch(name: str) -> None:
    script = (
        "import sys; from quickstudy.__main__ import main\n"
        f"try: main({[*name.split(), '--help']!r})\n"
        "except SystemExit as e: assert not e.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"quickstudy {name}" in done.stdout


@pytest.mark.parametrize("word", ["data", "study"])
def test_groups_of_commands_have_help(word: str, capsys: pytest.CaptureFixture) -> None:
    assert main([word, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all((name in shown) == name.startswith(f"{word} ") for name in COMMANDS if " " in name)


def test_help_shows_words_that_may_be_left_out(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["study", "methods", "--help"])
    assert capsys.readouterr().out.startswith("usage: quickstudy study methods [{glyphs,omniglot}] [--shots")


def test_train_then_test(tmp_path: Path, command: Command) -> None:
    (tmp_path / "mine.yaml").write_text(GLYPHS)
    status, out, err = command("train", "mine.yaml", "--seeds", "0,3", "--train.updates", "2", "--method.norm=joint")
    assert (status, err) == (0, "")
    assert "next: quickstudy test runs/mine" in out
    status, out, err = command(
        "test", "runs/mine", "--tasks", "5", "--queries", "4", "--norm", "support", "--record", "results.csv"
    )
    assert (status, err) == (0, "")
    assert "accuracy" in out
    assert "(10 tasks, 4 queries a class, norm support, best weights, 2 updates)" in out
    assert (tmp_path / "results.csv").read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "x"], "did you mean 'train'"),
        (["train"], "recipe"),
        (["train", "sine/maml-6shot"], "did you mean 'sine/maml-"),
        (["train", "sine.yaml", "--sedes", "1"], "did you mean '--seeds'"),
        (["train", "sine.yaml", "--seeds", "one"], "such as 0,1,2"),
        (["train", "sine.yaml", "--device", "cuda:9"], "the device cuda:9 cannot be used here"),
        (["train", "sine.yaml", "--train.updtes", "1"], "did you mean 'updates'"),
        (["train", "sine.yaml", "--dataset=quickstudy.data.Omniglot"], "quickstudy data get omniglot"),
        (["test", "nowhere", "--norm", "suport"], "--norm takes one of 'batch', 'support', 'joint', not 'suport'"),
        (["test", "nowhere"], "nowhere is not the folder of a run"),
        (["test", "glyphs/nearest-neighbor-pixels-5w1s"], "did you mean 'glyphs/nearest-neighbour-pixels-5w1s'"),
        (["data"], "data needs one of"),
    ],
)
def test_mistakes_get_one_message_and_a_status(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QUICKSTUDY_DATA", raising=False)
    monkeypatch.setenv("QUICKSTUDY_CACHE", str(tmp_path / "cache"))
    Path("sine.yaml").write_text(SINE)
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("quickstudy: ")
    assert message in err
    assert "Traceback" not in err
    assert not Path("runs").exists()


def test_a_users_own_method_backbone_and_dataset(tmp_path: Path, command: Command) -> None:
    """All three by ``class_path``, from a module beside the recipe."""
    (tmp_path / "mine.py").write_text(
        '''
import torch
from torch import nn
from quickstudy.data import Dataset, TaskSource
from quickstudy.methods import Method
from quickstudy.task import Support, Task


class Blobs(TaskSource):
    def tasks(self, shape, start, stop, *, seed):
        made = []
        labels = torch.arange(shape.way)
        for number in range(start, stop):
            generator = torch.Generator().manual_seed(number)
            centres = 3 * torch.randn(shape.way, 6, generator=generator)
            support, query = labels.repeat_interleave(shape.shot), labels.repeat_interleave(shape.queries)
            noise = torch.randn(len(support) + len(query), 6, generator=generator)
            x = centres[torch.cat([support, query])] + noise
            made.append((x[: len(support)], support, x[len(support) :], query))
        return Task(*(torch.stack(parts) for parts in zip(*made)), way=shape.way)


class BlobDataset(Dataset):
    name = "blobs"

    def split(self, split):
        return Blobs()


class Wide(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.layer = nn.Linear(6, width)

    def forward(self, x):
        return self.layer(x)


class LastWins(Method):
    """The nearest support example."""

    def adapt(self, support):
        return support.x, support.y

    def predict(self, state, query_x):
        x, y = state
        near = -torch.cdist(self.embed(query_x), self.embed(x))
        return torch.stack([near[:, y == label].amax(1) for label in range(2)], dim=1)
'''
    )
    (tmp_path / "own.yaml").write_text(
        """
dataset: {class_path: mine.BlobDataset}
method: {class_path: mine.LastWins, init_args: {backbone: {class_path: mine.Wide, init_args: {width: 4}}}}
train: {task: {way: 2, shot: 2, queries: 3}, updates: 3, trace: false}
validation: {every: 3, tasks: 5}
test: {tasks: 20}
"""
    )
    script = Path(sys.executable).with_name("quickstudy")  # as it is installed: its own folder is not on the path
    done = subprocess.run([script, "train", "own.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status, out, err = command("test", "runs/own")
    assert status == 0, err
    assert "on blobs" in out


def test_two_word_commands() -> None:
    assert find(["data", "list", "--x"]) == ("data list", ["--x"])
    with pytest.raises(RecipeError, match="list, get, "):
        find(["data"])


def test_recipes_are_listed_filtered_and_shown(command: Command) -> None:
    status, out, err = command("recipes")
    assert (status, err) == (0, "")
    assert "omniglot/maml-mlp-5w1s" in out
    assert "84.09 ± 0.92 (huisman2023)" in out
    _, out, _ = command("recipes", "sine", "--format", "markdown")
    assert out.splitlines()[1] == "| --- | --- | --- | --- |"
    for flag in (("--measured", "true"), ("--measured",)):
        assert command("recipes", *flag, "--format", "markdown", "sine") == (0, out, "")
    rows = [line for line in out.splitlines()[2:] if line.startswith("|")]
    assert rows
    assert all(line.startswith("| sine/") and "not yet run" not in line for line in rows)
    _, out, _ = command("recipes", "sine/maml-5shot")
    assert out.startswith("# MAML on 5-shot sine regression")
    assert "batching: auto" in out
    status, out, err = command("recipes", "omnglot")
    assert (status, out) == (1, "")
    assert "did you mean 'omniglot'" in err


def test_a_printed_recipe_trains(tmp_path: Path, command: Command) -> None:
    _, out, _ = command("recipes", "sine/maml-5shot")
    (tmp_path / "mine.yaml").write_text(out)
    few = ("--train.updates=1", "--validation.tasks=2", "--train.trace=false", "--method.steps=1")
    status, _, err = command("train", "mine.yaml", *few)
    assert status == 0, err
    assert (tmp_path / "runs/mine/curves.png").stat().st_size > 1000


def test_datasets_are_listed_got_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    for word in ("sine\n", "glyphs\n", "omniglot\n", "quickstudy data get omniglot", "made as it is used"):
        assert word in out
    assert main(["data", "get", "glyphs"]) == 0
    assert "packed in" in capsys.readouterr().out
    assert main(["data", "show", "glyphs", "--split", "test", "--rows", "3", "--out", "sheet.png"]) == 0
    assert "248 classes" in capsys.readouterr().out
    assert main(["data", "show", "sine"]) == 0
    assert Path("sheet.png").read_bytes()[:4] == Path("sine-train.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["data", "show", "omniglto"]) == 1
    assert "did you mean 'omniglot'" in capsys.readouterr().err


def test_the_demo_and_curves(tmp_path: Path, command: Command) -> None:
    few = ("--train.updates=2", "--validation.tasks=4", "--test.tasks=8", "--train.trace=false")
    for _ in range(2):  # a second demo replaces the first
        status, out, err = command("demo", *few)
        assert (status, err) == (0, "")
    assert "1,019 characters to learn from, 248 of other scripts" in out
    assert "nearest pixels" in out
    assert "chance 20 %" in out
    (tmp_path / "runs/demo").rename(tmp_path / "runs/kept")
    (tmp_path / "runs/demo").mkdir()
    for name in ("run.json", "recipe.yaml"):
        text = (tmp_path / "runs/kept" / name).read_text()
        (tmp_path / "runs/demo" / name).write_text(text.replace("glyphs/protonet-conv4-5w1s", "mine"))
    status, _, err = command("demo", *few)
    assert (status, "runs/demo holds a training of mine, which is no demo" in err) == (1, True)
    shutil.rmtree(tmp_path / "runs/demo")
    (tmp_path / "runs/kept").rename(tmp_path / "runs/demo")
    folder = tmp_path / "runs" / "demo"
    assert {"task.png", "curves.png", "best-0.safetensors", "test.jsonl"} <= {path.name for path in folder.iterdir()}
    status, out, err = command("curves", "runs/demo,runs/demo", "--out", "figures/both.svg")
    assert (status, err) == (0, "")
    assert (tmp_path / "figures" / "both.csv").read_text().count("\n") == 5


def test_only_runs_are_overwritten(tmp_path: Path, command: Command) -> None:
    (tmp_path / "sine.yaml").write_text(SINE)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    status, _, err = command("train", "sine.yaml", "--out", "precious", "--overwrite")
    assert status == 1
    assert "holds other things than a run" in err
    assert (tmp_path / "precious" / "thesis.txt").exists()
