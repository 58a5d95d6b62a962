"""Training as a whole: stopping, continuing, failing, and what is left behind."""

from __future__ import annotations

import copy
import csv
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GLYPHS, SINE, quickstudy_process
from torch import nn

from quickstudy import engine
from quickstudy.engine.checkpoint import load_state, load_weights, save_state, save_weights
from quickstudy.engine.job import Quiet
from quickstudy.engine.models import LOOP, Models
from quickstudy.engine.run import Run
from quickstudy.engine.train import Group, Interrupted, build_methods
from quickstudy.errors import FileError, RecipeError, TrainingError

Command = Callable[..., tuple[int, str, str]]


def train(folder: Path, *overrides: str, text: str = SINE, **options) -> engine.Run:
    return engine.train(engine.parse_recipe(text, overrides), folder, name="test", **options)


def weights(run: engine.Run, kind: str = "last", seed: int = 0) -> dict[str, torch.Tensor]:
    return run.load_weights(kind, seed)


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--train.together=true", seeds=[0, 5])
    rows = list(csv.DictReader((run.folder / "metrics.csv").open()))
    assert [(int(row["update"]), int(row["seed"])) for row in rows] == [
        (update, seed) for update in (0, 10, 20, 30) for seed in (0, 5)
    ]
    assert [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()] == run.metrics()
    assert rows[-1]["tasks"] == "120"
    assert run.info["seeds"] == [0, 5]
    assert {"torch", "python", "quickstudy"} <= run.info["versions"].keys()
    assert "inner_lr: 0.01" in run.recipe_text  # defaults are written out
    for kind in ("best", "last"):
        for seed in (0, 5):
            assert weights(run, kind, seed)["head.weight"].shape == (1, 8)
    assert not list(run.folder.glob(".*"))
    engine.parse_recipe(run.recipe_text)


def test_a_training_is_that_of_a_plain_loop() -> None:
    """The losses of a ProtoNet in single precision are those of PyTorch's own layers in a plain loop."""
    overrides = ["--train.updates=8", "--method.norm=joint", "--train.task={way: 20, shot: 1, queries: 5}"]
    settings = engine.parse_recipe(GLYPHS, [*overrides, "--method.backbone.channels=16", "--train.meta_batch=1"])

    def make() -> engine.Recipe:
        return engine.instantiate(settings)

    group = Group(make(), [0], engine.build_methods(make, [0]), "cpu")
    layers: list[nn.Module] = []
    for conv in group.models.method.backbone.convs:  # type: ignore[union-attr]
        layers += [copy.deepcopy(conv), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    plain = nn.Sequential(*layers, nn.Flatten())
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    for update in range(8):
        task = group.batch(update)[0]
        embedded = plain(torch.cat([task.support_x, task.query_x]))
        loss = nn.functional.cross_entropy(-(torch.cdist(embedded[20:], embedded[:20]) ** 2), task.query_y)
        assert group.update().item() == pytest.approx(loss.item(), rel=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_learning_happens_and_the_best_state_is_strictly_the_best(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--train.updates=300", "--optimizer=torch.optim.Adam", "--optimizer.lr=0.01")
    rows = run.metrics()
    scores = [row["val_score"] for row in rows]
    assert min(scores) < 0.8 * scores[0]
    assert rows[-1]["best_score"] == min(scores)


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
@pytest.mark.parametrize("text", [SINE, GLYPHS], ids=["sine", "glyphs"])
def test_resumed_equals_unbroken_to_the_bit(tmp_path: Path, seeds: list[int], text: str) -> None:
    """Stopped at a checkpoint and continued by other objects, with momentum, a schedule and traces."""
    settings = ["--train.trace=true", "--schedule=torch.optim.lr_scheduler.StepLR", "--schedule.step_size=3"]
    settings += ["--train.batching=vmap", "--train.together=true"]  # the same choice twice, not twice by timing
    total = 30 if text == SINE else 4
    whole = train(tmp_path / "whole", *settings, text=text, seeds=seeds)
    train(tmp_path / "part", *settings, f"--train.updates={total // 2}", text=text, seeds=seeds)
    part = train(tmp_path / "part", *settings, text=text, seeds=seeds, resume=True)
    for seed in seeds:
        assert_same_bits(weights(whole, "last", seed), weights(part, "last", seed))


def test_killed_at_a_random_moment_and_resumed_equals_unbroken(tmp_path: Path) -> None:
    """A real process, SIGKILL, three times over; then it is left to finish."""
    (tmp_path / "sine.yaml").write_text(SINE)
    settings = ["--train.updates=400", "--validation.every=25", "--train.batching=vmap"]
    whole = train(tmp_path / "whole", *settings)
    arguments = ["train", "sine.yaml", "--out", "run", "--resume", *settings]
    for _ in range(3):
        process = quickstudy_process(arguments, tmp_path)
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "state-0.pt").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(random.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        load_state(tmp_path / "run" / "state-0.pt")  # whatever the moment, it is whole
    process = quickstudy_process(arguments, tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    run = engine.Run.open(tmp_path / "run")
    assert_same_bits(weights(whole), weights(run))
    assert_same_bits(weights(whole, "best"), weights(run, "best"))
    keys = ("update", "val_score", "best_score")
    assert [[r[k] for k in keys] for r in whole.metrics()] == [[r[k] for k in keys] for r in run.metrics()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, number: signal.Signals, command: Command) -> None:
    (tmp_path / "sine.yaml").write_text(SINE)
    arguments = ["train", "sine.yaml", "--out", "run", "--train.updates=1000000", "--validation.every=1000000"]
    process = quickstudy_process(arguments, tmp_path)
    while not (tmp_path / "run" / "state-0.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    state = load_state(tmp_path / "run" / "state-0.pt")
    assert state["updates"] > 0
    assert f"after update {state['updates']:,} of 1,000,000" in err
    assert err.count("\n") == 1
    advice = re.search(r"`quickstudy (.*?)`", err)
    assert advice is not None
    status, _, err = command(*advice[1].split(), f"--train.updates={state['updates'] + 3}")
    assert status == 0, err
    assert load_state(tmp_path / "run" / "state-0.pt")["updates"] == state["updates"] + 3


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, command: Command) -> None:
    (tmp_path / "sine.yaml").write_text(SINE)
    status, _, err = command("train", "sine.yaml", "--out", "run", "--method.inner_lr=1e30")
    assert status == 1
    assert "not finite at update 0" in err
    assert "recipe sine" in err
    assert "last good checkpoint is run/state-0.pt (update 0)" in err
    assert all(tensor.isfinite().all() for tensor in weights(engine.Run.open(tmp_path / "run")).values())


def test_a_folder_in_use_and_other_settings_are_refused(tmp_path: Path) -> None:
    train(tmp_path / "run")
    with pytest.raises(RecipeError, match="--resume"):
        train(tmp_path / "run")
    with pytest.raises(TrainingError, match=r"method.init_args.inner_lr: 0.01 became 0.5"):
        train(tmp_path / "run", "--method.inner_lr=0.5", resume=True)
    with pytest.raises(RecipeError, match=r"seeds \[0\], not \[1\]"):
        train(tmp_path / "run", seeds=[1], resume=True)
    longer = train(tmp_path / "run", "--train.updates=40", resume=True)
    assert longer.metrics()[-1]["update"] == 40
    assert train(tmp_path / "run", overwrite=True).metrics()[-1]["update"] == 30


def test_seeds_in_turn_equal_seeds_together(tmp_path: Path) -> None:
    together = train(tmp_path / "together", "--train.together=true", "--train.precision=float64", seeds=[0, 1])
    in_turn = train(tmp_path / "turn", "--train.together=false", "--train.precision=float64", seeds=[0, 1])
    assert together.info["groups"] == [[0, 1]]
    assert in_turn.info["groups"] == [[0], [1]]
    for seed in (0, 1):
        torch.testing.assert_close(weights(together, "last", seed), weights(in_turn, "last", seed))
    assert len(in_turn.metrics()) == len(together.metrics())


def test_seeds_cannot_share_an_optimiser_that_mixes_them(tmp_path: Path) -> None:
    settings = ["--optimizer=torch.optim.Adafactor", "--train.together=true"]
    with pytest.raises(RecipeError, match="element-wise"):
        train(tmp_path / "run", *settings, seeds=[0, 1])
    assert train(tmp_path / "run", settings[0], seeds=[0, 1]).info["groups"] == [[0], [1]]


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [("SGD", "CosineAnnealingLR"), ("AdamW", "ReduceLROnPlateau"), ("NAdam", "ExponentialLR")],
)
def test_any_optimiser_and_schedule(tmp_path: Path, optimizer: str, schedule: str) -> None:
    extra = {"CosineAnnealingLR": ["--schedule.T_max=10"], "ExponentialLR": ["--schedule.gamma=0.9"]}
    settings = [
        f"--optimizer=torch.optim.{optimizer}",
        "--optimizer.lr=0.001",
        f"--schedule=torch.optim.lr_scheduler.{schedule}",
        *extra.get(schedule, []),
    ]
    rows = train(tmp_path / "run", *settings).metrics()
    if schedule != "ReduceLROnPlateau":
        assert rows[1]["lr"] < rows[0]["lr"] == 0.001


def test_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"updates": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for save in (lambda: save_state(path, {"updates": 2}), lambda: save_weights(path, {"a": torch.ones(3)})):
        with pytest.raises(FileError, match="No space left on device; what it held before is unharmed"):
            save()
    assert load_state(path) == {"updates": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_a_really_full_disk(tmp_path: Path, command: Command) -> None:
    """A process that may not write files beyond 20 kB: one message, no fragment, exit status 1."""
    import subprocess
    import sys

    (tmp_path / "sine.yaml").write_text(SINE)
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "from quickstudy.__main__ import main; "
        "sys.exit(main(['train', 'sine.yaml', '--out', 'run', '--method.backbone.widths=[64, 64]']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "cannot write run/state-0.pt" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["recipe.yaml", "run.json"]


def test_a_checkpoint_of_another_version_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "state-0.pt"
    save_state(path, {"updates": 3})
    assert load_state(path) == {"updates": 3}
    torch.save({"format": 99, "updates": 3}, path)
    with pytest.raises(TrainingError, match=r"has format 99, and this version of quickstudy continues 1: .* remove it"):
        load_state(path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"updates": 1, "parameters": {"w": torch.ones(100)}})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TrainingError, match=r"state.pt.*remove it"):
        load_state(path)
    with pytest.raises(TrainingError, match=r"state.pt"):
        load_weights(path)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    import pickle

    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "attacked",))

    path = tmp_path / "state.pt"
    with path.open("wb") as file:
        pickle.dump(Attack(), file)
    with pytest.raises(TrainingError):
        load_state(path)
    assert not (tmp_path / "attacked").exists()


def test_weights_and_metrics_of_a_cut_off_save_are_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the last update was written, and then the process died."""
    whole = train(tmp_path / "whole")
    saves = Run.save_weights

    def dies_at_the_end(self: Run, *arguments: Any) -> None:
        if self.load_state([0])["updates"] == 30:  # type: ignore[index]
            raise KeyboardInterrupt
        saves(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_weights", dies_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut")
    cut = Run(tmp_path / "cut")
    assert not torch.equal(weights(cut)["head.bias"], weights(whole)["head.bias"])
    train(tmp_path / "cut", resume=True)
    assert_same_bits(weights(cut), weights(whole))
    assert_same_bits(weights(cut, "best"), weights(whole, "best"))
    assert [row["val_score"] for row in cut.metrics()] == [row["val_score"] for row in whole.metrics()]


@pytest.mark.parametrize("metric", ["mse", "accuracy"])
def test_the_best_state_is_of_a_strictly_better_score_that_is_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    settings = engine.parse_recipe(SINE)
    group = Group(engine.instantiate(settings), [0], build_methods(lambda: engine.instantiate(settings), [0]), "cpu")
    group.higher_is_better = metric == "accuracy"
    group.best_scores = [float("-inf") if group.higher_is_better else float("inf")]
    sign = -1 if group.higher_is_better else 1
    marks = []
    for score in (4.0, float("nan"), 4.0, 3.0, 5.0):
        found = torch.full((1, 2, 2), sign * score)
        monkeypatch.setattr(sys.modules[Group.__module__], "evaluate", lambda *_, found=found, **__: (found, 1))
        before = group.best[0]
        group.validate()
        marks.append(group.best[0] is not before)
    assert marks == [True, False, False, True, False]


def test_a_gradient_that_is_not_finite_never_reaches_the_checkpoint(tmp_path: Path) -> None:
    """The loss is finite where the square root is taken of zero; its slope is not."""
    with pytest.raises(TrainingError, match=r"not finite at update 0 .*last good checkpoint is .*update 0"):
        train(tmp_path / "run", "--method=helpers.SteepAtZero", "--method.backbone=quickstudy.nn.MLP")
    assert all(tensor.isfinite().all() for tensor in load_state(tmp_path / "run" / "state-0.pt")["parameters"].values())


def group_of(*overrides: str, seeds: list[int] | None = None) -> Group:
    """One that steps down the meta-gradient as it is."""
    overrides = ("--train.batching=vmap", "--optimizer=torch.optim.SGD", "--optimizer.lr=1", *overrides)
    settings = engine.parse_recipe(SINE, overrides)

    def make() -> engine.Recipe:
        return engine.instantiate(settings)

    return Group(make(), seeds or [0], build_methods(make, seeds or [0]), "cpu")


def test_the_gradient_of_each_parameter_has_its_own_bound() -> None:
    """Elements are bounded first; what is short stays as it is, and what is long keeps its direction."""
    bounds = ["--train.clip_value=0.3", "--train.clip_parameter_norm=0.5", "--train.precision=float64"]
    group = group_of(*bounds)
    slopes = dict(zip(group.models.trained, group.gradients(group.batch(0), 4)[0]))
    before = group.models.state(0)
    group.update()
    lengths = []
    for name, slope in slopes.items():
        slope = slope.clamp(-0.3, 0.3)
        lengths.append(slope.norm().item())
        expected = slope * min(1, 0.5 / lengths[-1])
        torch.testing.assert_close(before[name] - group.models.parameters[name], expected)
    assert min(lengths) < 0.5 < max(lengths)


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_a_gradient_that_is_not_finite_may_give_way_to_weight_decay(seeds: list[int]) -> None:
    """Of matrices alone, in the seed alone whose gradient it is; and the training goes on."""
    broken = ["--method=helpers.SteepAtZero", "--method.backbone=quickstudy.nn.MLP"]
    group = group_of(*broken, "--train.decay_if_broken=0.1", seeds=seeds)
    if len(seeds) == 2:
        with torch.no_grad():
            group.models.parameters["offset"][1] = 0.5
    before = group.models.state(0), group.models.state(len(seeds) - 1)
    group.update()
    group.check()
    after = group.models.state(0), group.models.state(len(seeds) - 1)
    for name, weight in before[0].items():
        torch.testing.assert_close(after[0][name], 0.9 * weight if weight.dim() == 2 else weight)
    assert any(weight.dim() == 2 for weight in before[0].values())
    if len(seeds) == 2:
        assert not torch.equal(after[1]["offset"], before[1]["offset"])
        assert all(torch.equal(after[1][name], before[1][name]) for name in after[1] if name != "offset")


def test_randomness_is_that_of_the_update_whenever_it_was_traced(tmp_path: Path) -> None:
    """Timing and tracing draw random numbers too; what a resumed training draws does not depend on it."""
    settings = ["--method.backbone=helpers.Dropping", "--train.trace=true", "--train.updates=8"]
    settings += ["--method.backbone.width=8"]
    whole = train(tmp_path / "whole", *settings)
    train(tmp_path / "parts", *settings[:1], *settings[3:], "--train.trace=true", "--train.updates=3")
    assert_same_bits(weights(train(tmp_path / "parts", *settings, resume=True)), weights(whole))


def test_a_signal_between_seeds_stops(tmp_path: Path) -> None:
    class Impatient:
        def step(self, updates: int, loss: Callable[[], float]) -> None:
            if updates == 30:
                os.kill(os.getpid(), signal.SIGTERM)

        def validated(self, rows: list[dict[str, Any]], best: list[float]) -> None:
            pass

    with pytest.raises(Interrupted, match="--resume"):
        train(tmp_path / "run", "--train.together=false", seeds=[0, 1], listener=Impatient())
    assert (tmp_path / "run" / "last-0.safetensors").exists()
    assert not (tmp_path / "run" / "last-1.safetensors").exists()
    train(tmp_path / "run", "--train.together=false", seeds=[0, 1], resume=True)
    assert (tmp_path / "run" / "last-1.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--optimizer=torch.optim.Adam", "--optimizer.lr=-1"], "the optimizer cannot be built: Invalid learning rate"),
        (["--optimizer=torch.optim.LBFGS"], "choose another optimizer"),
        (
            ["--method=quickstudy.methods.NearestNeighbour", "--method.backbone=torch.nn.Flatten"],
            "no parameters to meta-learn",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        train(tmp_path / "run", *settings, text=GLYPHS)
    assert not (tmp_path / "run").exists()


def test_overwriting_removes_what_a_run_left_and_nothing_else(tmp_path: Path) -> None:
    run = train(tmp_path / "run", seeds=[0, 1])
    (run.folder / "notes.txt").write_text("mine")
    (run.folder / ".state-0.pt-x").write_text("of a killed process")
    train(run.folder, overwrite=True)
    assert (run.folder / "notes.txt").read_text() == "mine"
    assert not (run.folder / "last-1.safetensors").exists()
    assert not (run.folder / ".state-0.pt-x").exists()


def test_updates_are_not_taken_away(tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    before = run.recipe_text
    with pytest.raises(RecipeError, match="has trained for 30 updates already, and is asked for 10"):
        train(run.folder, "--train.updates=10", resume=True)
    assert run.recipe_text == before


@pytest.mark.parametrize(("batching", "chunk"), [("loop", LOOP), ("vmap", 2)])
def test_batching_that_is_asked_for_is_that_of_validation_too(batching: str, chunk: int) -> None:
    group = group_of(f"--train.batching={batching}", "--train.chunk=2")
    group.update()
    group.validate()
    assert group.chunks == {"train": chunk, "val": chunk}


def test_a_bound_of_the_chunk_is_one_of_validation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    group, run, tried = group_of("--train.chunk=2"), Models.run, []
    monkeypatch.setattr(Models, "run", lambda self, *args, **given: tried.append(args[2]) or run(self, *args, **given))
    group.validate()
    assert max(tried) == 2


def test_a_state_without_its_run_is_not_continued(tmp_path: Path) -> None:
    fresh = train(tmp_path / "fresh")
    left = train(tmp_path / "left", "--method.inner_lr=0.5")
    (left.folder / "run.json").unlink()  # as an overwriting that was killed may leave it
    assert_same_bits(weights(train(left.folder)), weights(fresh))


def test_growing_seeds_that_train_in_turn_keeps_the_metrics_of_all(tmp_path: Path) -> None:
    run = train(tmp_path / "a", "--train.together=false", seeds=[0, 1])
    told: list[set[int]] = []

    class Listener(Quiet):
        def validated(self, rows: list[dict], best: list[float]) -> None:
            told.append({row["seed"] for row in run.metrics()})

    settings = engine.parse_recipe(run.recipe_text, [f"--train.updates={2 * run.metrics()[-1]['update']}"])
    engine.train(settings, run.folder, name="a", seeds=[0, 1], resume=True, listener=Listener())
    assert told
    assert all(seeds == {0, 1} for seeds in told)
