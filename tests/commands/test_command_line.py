"""The command as a user types it: real processes."""

from __future__ import annotations

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
        (["train", "sine.yaml", "--device", "cuda:9"], "--device cuda:9 cannot be used here"),
        (["train", "sine.yaml", "--train.updtes", "1"], "did you mean 'updates'"),
        (["train", "sine.yaml", "--dataset=quickstudy.data.Omniglot"], "quickstudy data get omniglot"),
        (["test", "nowhere"], "nowhere is not the folder of a run"),
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
    status, _, err = command("train", "own.yaml")
    assert status == 0, err
    status, out, err = command("test", "runs/own")
    assert status == 0, err
    assert "on blobs" in out


def test_two_word_commands() -> None:
    assert find(["data", "list", "--x"]) == ("data list", ["--x"])
    with pytest.raises(RecipeError, match="list, get, "):
        find(["data"])
