"""The studies measure what they say: nothing where order cannot matter, ones where gradient descent was learned."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import GLYPHS, SINE, single, write_class_folders
from torch import Tensor, nn

from quickstudy import engine
from quickstudy.__main__ import main
from quickstudy.analysis.order import permuted
from quickstudy.analysis.updates import RATE, compare
from quickstudy.data import SPLITS, Glyphs
from quickstudy.data.splitting import published_split
from quickstudy.methods import OPLSTM, PlainLSTM
from quickstudy.nn import MLP
from quickstudy.task import Task

Command = Callable[..., tuple[int, str, str]]


def pictures(way: int = 3, shot: int = 2) -> Task:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(way)
    x, qx = (torch.randn(way * n, 6, dtype=torch.float64, generator=generator) for n in (shot, 4))
    return Task(x, labels.repeat_interleave(shot), qx, labels.repeat_interleave(4), way)


def wave() -> Task:
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
    return Task(x[::2], x[::2].sin(), x, x.sin())


@pytest.mark.parametrize("task", [pictures(), wave()], ids=["classes", "regression"])
def test_only_what_reads_in_order_feels_the_order(task: Task) -> None:
    generator = torch.Generator().manual_seed(1)
    orders = torch.stack([torch.randperm(len(task.support_x), generator=generator) for _ in range(5)])
    torch.manual_seed(0)
    found = {}
    for reading in ("batch", "sequential"):
        method = PlainLSTM(nn.Flatten(), hidden=[8], steps=2, reading=reading)
        method.build(single(task)).double()
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.mul_(4)  # so that an untrained LSTM tells classes apart
        found[reading] = permuted(orders)(method, task)
    assert found["batch"].abs().max() < 1e-12
    deviation, flipped, score = found["sequential"]
    assert deviation > 1e-3
    assert score > 0
    assert (flipped > 0) == (task.way is not None)


class Rule(nn.Module):
    """In place of an LSTM, a rule from (first, second) to its output."""

    def __init__(self, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule

    def unroll(self):
        return lambda pair, state: (self.rule(*pair)[None], state)


def trained(task: Task, backbone: nn.Module, out: Callable[[Tensor, Tensor], Tensor], **settings) -> OPLSTM:
    torch.manual_seed(0)
    method = OPLSTM(backbone, **settings)
    method.build(single(task)).double()
    method.out_lstm = Rule(out)  # type: ignore[assignment]
    if method.adapts == "all":
        method.body_lstm = Rule(lambda activation, message: message * (activation > 0))  # type: ignore[assignment]
    return method


def test_gradient_descent_is_like_gradient_descent() -> None:
    task, steps = pictures(), 3

    def slope(target: Tensor, prediction: Tensor) -> Tensor:
        prediction = prediction.view(len(task.support_x), -1)
        return RATE * (target.view_as(prediction) - prediction.softmax(-1)).flatten()

    found = compare(trained(task, MLP([5, 4]), slope, steps=steps), task)
    assert found.shape == (4, steps + 3, 2)  # three matrices and all of them; passes, total and twice prototypes
    cosine, distance = found[:, : steps + 1].unbind(-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert distance[:, steps].max() < 1e-12  # as many steps of the same size end at the same place
    torch.testing.assert_close(found[:, 0, 1] / (1 - RATE), gradient_norms(task, steps))
    assert found[:2, steps + 1 :].isnan().all()  # prototypes are of what the last matrix reads
    assert found[2, steps + 1 :].isfinite().all()


def gradient_norms(task: Task, steps: int) -> Tensor:
    torch.manual_seed(0)
    method = OPLSTM(MLP([5, 4]), steps=steps).build(single(task))
    method.double()
    prediction = method.run(method.layers, task.support_x)[0][-1]
    loss = torch.nn.functional.cross_entropy(prediction, task.support_y)
    slopes = torch.autograd.grad(loss, [layer.weight for layer in method.layers])
    norms = torch.stack([slope.norm() for slope in slopes])
    return torch.cat([norms, norms.norm()[None]])


def test_a_matrix_of_prototypes_is_at_the_prototypes() -> None:
    """The sum of twice the embeddings of each class, over an empty matrix, is twice the prototypes."""
    task = pictures()
    method = trained(task, nn.Flatten(), lambda target, prediction: 2 * 3 * target, adapts="head", bias="none")
    with torch.no_grad():
        method.head.weight.zero_()
    found = compare(method, task)
    torch.testing.assert_close(found[0, -1], torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_the_commands_write_tables_and_figures(tmp_path: Path, command: Command) -> None:
    short = [f"--{key}" for key in ("train.updates=2", "train.trace=false", "validation.every=1", "validation.tasks=3")]
    status, _, err = command(
        *("study", "permutation", "sine", "--shots", "5", "--seeds", "0,1", "--tasks", "3", "--orders", "2"),
        *("--out", "study", *short, "--test.tasks=3"),
    )
    assert (status, err) == (0, "")
    batch, sequential = csv.DictReader((tmp_path / "study/scores.csv").read_text().splitlines())
    assert (batch["published"], sequential["published"]) == ("0.0406", "0.0536")
    assert float(batch["prediction_deviation"]) < 1e-5 < float(sequential["prediction_deviation"])
    assert all((tmp_path / "study" / name).stat().st_size > 5000 for name in ("scores.png", "validations.png"))

    status, _, err = command("train", "sine/op-lstm-5shot", *short)
    assert (status, err) == (0, "")
    status, _, err = command("study", "learned-updates", "runs/sine/op-lstm-5shot", "--tasks", "2")
    assert (status, err) == (0, "")
    folder = tmp_path / "results/studies/learned-updates-sine-op-lstm-5shot"
    rows = list(csv.DictReader((folder / "updates.csv").read_text().splitlines()))
    assert {row["updates"] for row in rows} == {"0", "1", "2"}
    assert {row["quantity"] for row in rows} == {*(f"pass {n}" for n in range(1, 10)), "total"}
    assert (folder / "updates.png").stat().st_size > 5000

    status, _, err = command("study", "learned-updates", "study/runs/sine/lstm-batch-5shot")
    assert status == 1
    assert "PlainLSTM; learned updates are those of OPLSTM" in err


def test_methods_are_compared_and_what_was_done_is_kept(tmp_path: Path, command: Command) -> None:
    short = ("--shots=2", "--budget=8", "--channels=4", "--validation.tasks=2", "--test.tasks=4", "--train.trace=false")
    for only in ("protonet", "nearest"):
        status, _, err = command("study", "methods", "glyphs", "--only", only, *short)
        assert (status, err) == (0, "")
        (row,) = csv.DictReader((tmp_path / "results/studies/methods-glyphs/scores.csv").read_text().splitlines())
        assert (row["shot"], row["tasks"], row["meta_train_tasks"]) == ("2", "4", "8" if only == "protonet" else "0")
    run = tmp_path / "runs/methods-glyphs/protonet-conv4-5w1s-trained-2shot"
    before = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, out, err = command("study", "methods", "glyphs", "--only", "protonet", *short)
    assert (status, err) == (0, "")
    assert "updates ·" not in out
    assert {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    status, _, err = command("study", "methods", "glyphs", "--only", "protonet", *short, "--channels=8")
    assert (status, "was trained with other settings" in err, "channels: 4 became 8" in err) == (1, True, True)
    status, _, err = command("study", "methods", "glyphs", "--only", "protonet", *short, "--seeds=1")
    assert (status, "was trained with seeds [0], not [1]" in err) == (1, True)
    status, out, err = command("study", "methods", "glyphs", "--only", "boil", *short, "--optimizer.lr", "1e38")
    assert (status, err) == (0, "")
    assert "is not finite" in out  # and it is tested with the weights it had
    assert "boil-conv4" in (tmp_path / "results/studies/methods-glyphs/scores.md").read_text()
    status, _, err = command("study", "methods", "glyphs", "--only", "nothing")
    assert (status, "no recipe of glyphs/ has 'nothing' in its name" in err) == (1, True)


def test_every_run_is_tested_on_every_dataset(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache" / "stores").mkdir(parents=True)
    drawn = Glyphs().prepare()
    (tmp_path / "cache" / "stores" / drawn.name).symlink_to(drawn)
    monkeypatch.setenv("QUICKSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QUICKSTUDY_DATA", str(tmp_path))
    classes: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, split in published_split("cifar-fs").items():
        classes[split] += [name][: 6 - len(classes[split])]
    write_class_folders(tmp_path / "cifar-fs", classes, images=16)
    recipes = {"glyphs": GLYPHS, "cifar-fs": GLYPHS.replace("Glyphs", "CIFARFS")}
    for name, recipe in recipes.items():
        engine.train(engine.parse_recipe(recipe, ["--train.updates=1"]), tmp_path / "runs" / name, name=f"{name}/x")
    study = ["study", "domains", "runs/glyphs,runs/cifar-fs", "--tasks", "4"]
    folder = tmp_path / "results/studies/domains-glyphs-cifar-fs"

    status, _, err = command(*study)
    assert (status, err) == (0, "")
    rows = list(csv.DictReader((folder / "scores.csv").read_text().splitlines()))
    pairs = [(row["trained_on"], row["tested_on"]) for row in rows]
    assert pairs == [(a, b) for a in recipes for b in recipes]
    assert {(row["way"], row["shot"], row["tasks"], row["updates"]) for row in rows} == {("5", "1", "4", "1")}
    assert "images of 3×32×32 as 1×28×28" in rows[1]["differs"]
    table = (folder / "scores.md").read_text().splitlines()
    assert table[0] == "| trained on | recipe | setting | glyphs | cifar-fs |"
    assert "| cifar-fs | cifar-fs/x | 5-way 1-shot, norm batch, 4 tasks, 1 of 1 updates |" in table[3]
    assert [line.count("**") for line in table[2:]] == [2, 2]
    assert (folder / "scores.png").stat().st_size > 5000

    tested = {name: (tmp_path / "runs" / name / "test.jsonl").read_text() for name in recipes}
    monkeypatch.chdir(tmp_path)
    assert main(study) == 0
    assert {name: (tmp_path / "runs" / name / "test.jsonl").read_text() for name in recipes} == tested
    assert list(csv.DictReader((folder / "scores.csv").read_text().splitlines())) == rows

    assert main([*study, "--on", "glyphs,omniglot-runs"]) == 1
    assert "`quickstudy test RUN --on omniglot-runs`" in capsys.readouterr().err
    assert main([*study, "--on", "glyphs,omniglott"]) == 1
    assert "no dataset 'omniglott' (did you mean 'omniglot'?)" in capsys.readouterr().err
    engine.train(engine.parse_recipe(SINE, ["--train.updates=1"]), tmp_path / "runs/sine", name="sine/x")
    assert main(["study", "domains", "runs/sine"]) == 1
    assert "runs/sine was trained on sine, which has no classes" in capsys.readouterr().err
