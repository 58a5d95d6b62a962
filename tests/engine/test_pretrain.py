"""Pre-training of a backbone, and the embeddings that it leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import published_classes, write_class_folders
from safetensors.torch import load_file

from quickstudy import engine
from quickstudy.data import Embeddings, ImageClasses
from quickstudy.data.base import SPLITS
from quickstudy.engine.job import Quiet
from quickstudy.engine.pretrain import (
    EmbedRecipe,
    LabelledImages,
    Pretrained,
    Pretrainer,
    best_temperature,
    centroid_accuracy,
    nearest_centroid,
)
from quickstudy.engine.recipe import dump_recipe, instantiate, parse_recipe, recipe_names, recipe_text
from quickstudy.engine.train import Interrupted
from quickstudy.errors import BackboneError, DataError, RecipeError, TrainingError
from quickstudy.nn import population_statistics
from quickstudy.task import TaskShape

NAMES = published_classes("cifar-fs", 6, 5, 5)

RECIPE = """
dataset:
  class_path: quickstudy.data.CIFARFS
  init_args:
    image_size: 12
    train_transforms:
      - class_path: quickstudy.data.transforms.RandomCrop
        init_args: {size: 12, padding: 2}
      - class_path: quickstudy.data.transforms.Normalise
        init_args: {mean: [0.5], std: [0.2]}
    test_transforms:
      - class_path: quickstudy.data.transforms.Normalise
        init_args: {mean: [0.5], std: [0.2]}
backbone: {class_path: quickstudy.nn.ResNet12, init_args: {widths: [4, 8], drop_rate: 0.1, block_size: 2}}
train: {epochs: 3, batch: 10}
validation: {tasks: 20, task: {way: 3, shot: 1, queries: 5}}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of few and small images of a few classes, laid out as CIFAR-FS and miniImageNet are."""
    root = tmp_path_factory.mktemp("images")
    write_class_folders(root / "cifar-fs", NAMES, images=7, side=12)
    write_class_folders(root / "miniImagenet", published_classes("miniimagenet-ravi", 6, 5, 5), images=7, side=12)
    return root


@pytest.fixture(autouse=True)
def own_copy(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTUDY_CACHE", str(images / "cache"))
    monkeypatch.setenv("QUICKSTUDY_DATA", str(images))


def pretrain(folder: Path, *overrides: str, text: str = RECIPE, **options: Any) -> Pretrained:
    settings = parse_recipe(text, overrides, EmbedRecipe)
    return engine.pretrain(settings, folder, name="mine", **options)


def trainer(*overrides: str, seed: int = 0) -> Pretrainer:
    return Pretrainer(parse_recipe(RECIPE, overrides, EmbedRecipe), seed, "cpu")


def left_behind(run: Pretrained) -> dict[str, Any]:
    """All that a run has found out: tensors, and metrics but for the time they took."""
    files = [run.folder / "backbone.safetensors", *(run.embeddings / f"{split}.safetensors" for split in SPLITS)]
    tensors = {f"{file.stem} {name}": tensor for file in files for name, tensor in load_file(file).items()}
    return tensors | {"metrics": [{**row, "seconds": 0} for row in run.metrics()[1:]]}  # the first has a loss of nan


def assert_same_bits(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name], name


class Stopping(Quiet):
    """Sends a signal to its own process after some update."""

    def __init__(self, update: int) -> None:
        self.update = update

    def step(self, updates: int, loss: Callable[[], float]) -> None:
        if updates == self.update:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stops", [[4], [3, 8, 9]])  # of four updates an epoch
def test_resumed_equals_unbroken_to_the_bit(tmp_path: Path, stops: list[int]) -> None:
    unbroken = pretrain(tmp_path / "unbroken")
    for number, stop in enumerate(stops):
        with pytest.raises(Interrupted, match=r"quickstudy embed .*broken --resume` continues"):
            pretrain(tmp_path / "broken", resume=number > 0, listener=Stopping(stop))
        assert not (tmp_path / "broken" / "embeddings").exists()
    assert_same_bits(left_behind(pretrain(tmp_path / "broken", resume=True)), left_behind(unbroken))


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    one, other = trainer(), trainer()
    batches = [one.batch(update) for update in range(8)]
    for update in (6, 1, 7, 3):
        assert all(torch.equal(a, b) for a, b in zip(other.batch(update), batches[update]))
    first, second, others = (
        torch.cat([x for x, _ in part])
        for part in (batches[:4], batches[4:], [trainer(seed=1).batch(u) for u in range(4)])
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, others)


def test_every_image_is_seen_once_an_epoch() -> None:
    plain = trainer("--dataset.train_transforms=[]", "--train.batch=6")
    seen = torch.cat([plain.batch(update)[0] for update in range(plain.batches)])
    packed = LabelledImages(plain.recipe.dataset, "train")
    assert len(seen) == len(packed.rows) == 42
    assert torch.equal(seen.flatten(1).unique(dim=0), packed.pixels(packed.rows, ()).flatten(1).unique(dim=0))
    labels = torch.cat([plain.batch(update)[1] for update in range(plain.batches)])
    assert labels.bincount().tolist() == [7] * 6
    red = (seen[:, 0].mean((1, 2)) * 16).round().long() - 1  # of the class, one of sixteen
    assert torch.equal(red, labels)


def test_it_is_a_plain_loop() -> None:
    ours = trainer("--backbone.drop_rate=0")
    theirs = trainer("--backbone.drop_rate=0")
    network = theirs.classifier.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for update in range(12):
        ours.update()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + torch.tensor(torch.pi * update / 12).cos().item())
        x, y = theirs.batch(update)
        optimizer.zero_grad()
        F.cross_entropy(network.head(network.backbone(x)), y).backward()
        optimizer.step()
    for a, b in zip(ours.classifier.parameters(), network.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    """And each image is embedded on its own, by the best backbone."""
    run = pretrain(tmp_path, seed=3)
    names = {"recipe.yaml", "embed.json", "metrics.csv", "metrics.jsonl", "state-3.pt", "backbone.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"embeddings"}
    rows = run.metrics()
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert [row["update"] for row in rows] == [0, 4, 8, 12]
    best = max(rows, key=lambda row: row["val_score"])
    assert run.info["best"] == {key: best[key] for key in ("epoch", "val_score", "val_interval")}
    assert (run.info["features"], run.info["seeds"]) == (8, [3])
    assert run.info["embeddings"] == {"train": 42, "val": 35, "test": 35}

    backbone, dataset = run.backbone(), instantiate(parse_recipe(RECIPE, kind=EmbedRecipe), EmbedRecipe).dataset
    for split in SPLITS:
        source = Embeddings(root=str(run.embeddings)).split(split)
        packed = LabelledImages(dataset, split)
        assert source.names == tuple(NAMES[split]) == packed.classes.names
        pixels = (packed.pixels(packed.rows, ()) - 0.5) / 0.2
        with torch.no_grad():
            alone = torch.cat([backbone(image[None]) for image in pixels])
        torch.testing.assert_close(source.images, alone, rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_the_meta_train_images(tmp_path: Path) -> None:
    run = pretrain(tmp_path, "--train.batch=42", "--train.epochs=1", "--backbone.drop_rate=0")  # all at once
    backbone, dataset = run.backbone(), instantiate(parse_recipe(RECIPE, kind=EmbedRecipe), EmbedRecipe).dataset
    packed = LabelledImages(dataset, "train")
    pixels = (packed.pixels(packed.rows, ()) - 0.5) / 0.2
    for ours, theirs in zip(backbone.statistics, population_statistics(backbone.backbone, [pixels]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_best_backbone_is_strictly_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.7, 0.6, 0.7])
    monkeypatch.setitem(
        Pretrainer.validate.__globals__, "centroid_accuracy", lambda tasks, found=None: torch.full((20,), next(scores))
    )
    made = trainer()
    kept = []
    for _ in range(4):
        made.validate()
        kept.append(made.best)
        made.update()
    assert kept[1] is kept[2] is kept[3]
    assert kept[0] is not kept[1]
    assert made.best_scores == [pytest.approx(0.7)]


def test_it_learns(tmp_path: Path) -> None:
    plain = ["--backbone.drop_rate=0", "--dataset.train_transforms=[]", "--dataset.test_transforms=[]"]
    rows = pretrain(tmp_path, "--train.epochs=12", *plain).metrics()
    assert rows[-1]["train_loss"] < 0.7 * rows[1]["train_loss"]
    assert rows[-1]["train_accuracy"] > 0.5  # chance is a sixth


def test_nearest_centroids_in_angle() -> None:
    torch.manual_seed(0)
    classes = ImageClasses.from_offsets(torch.randn(40, 6), torch.arange(0, 41, 10).numpy(), ["a", "b", "c", "d"], "")
    tasks = classes.tasks(TaskShape(3, 2, 4), 0, 5, seed=0)
    for task, share in zip((tasks[i] for i in range(5)), centroid_accuracy(tasks)):
        centroids = torch.stack([task.support_x[task.support_y == label].mean(0) for label in range(3)])
        cosines = torch.cosine_similarity(task.query_x[:, None], centroids, dim=-1)
        torch.testing.assert_close(share, (cosines.argmax(1) == task.query_y).float().mean())


def test_the_best_temperature_makes_probabilities_what_they_say() -> None:
    """Where the likelihood is highest, the mean distance to the true centroid is what the probabilities expect."""
    torch.manual_seed(0)
    centres = torch.randn(4, 6).repeat_interleave(10, 0)
    classes = ImageClasses.from_offsets(
        centres + torch.randn(40, 6), torch.arange(0, 41, 10).numpy(), ["a", "b", "c", "d"], ""
    )
    tasks = classes.tasks(TaskShape(3, 2, 4), 0, 50, seed=0)
    temperature = best_temperature([tasks[:20], tasks[20:]])
    method, true, expected = nearest_centroid(torch.nn.Flatten(), temperature), [], []
    for task in (tasks[i] for i in range(50)):
        logits = method.predict(method.adapt(task.support), task.query_x)
        true.append(logits.gather(1, task.query_y[:, None])[:, 0])
        expected.append((logits.softmax(1) * logits).sum(1))
    assert temperature < 0.9  # these classes are further apart than distances of unit vectors tell
    torch.testing.assert_close(torch.cat(true).mean(), torch.cat(expected).mean(), rtol=0, atol=1e-3)


def test_the_layout_of_leo_s_authors(tmp_path: Path) -> None:
    run = pretrain(tmp_path, "--train.epochs=1", layout="leo")
    source = Embeddings(root=str(run.embeddings)).split("val")
    assert source.names == tuple(name.replace("_", ".") for name in NAMES["val"])
    pretrain(tmp_path, "--train.epochs=1", resume=True)  # once more, in our own
    assert {path.suffix for path in run.embeddings.iterdir()} == {".pkl", ".safetensors"}


def test_low_precision_and_any_optimiser_and_schedule(tmp_path: Path) -> None:
    pretrain(
        tmp_path,
        "--train.epochs=1",
        "--train.precision=bfloat16",
        "--optimizer=torch.optim.AdamW",
        "--schedule=torch.optim.lr_scheduler.ReduceLROnPlateau",
        "--schedule.mode=max",
    )
    trainer("--schedule=torch.optim.lr_scheduler.StepLR", "--schedule.step_size=2").update()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss or its gradient is not finite at update \d+ \(seed 0\)"):
        pretrain(tmp_path, "--optimizer=torch.optim.SGD", "--optimizer.lr=1e30")
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "backbone.safetensors").values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--dataset=quickstudy.data.Sine"], "images of classes, and sine has none"),
        (["--dataset.test_transforms+=quickstudy.data.RandomFlip"], "nothing random in test_transforms"),
        (["--train.batch=50"], "42 images do not fill a batch of 50; lower train.batch"),
        (["--train.batch=1"], "at least 2 images"),
        (["--train.epochs=0"], "at least 1"),
        (["--train.epocs=1"], "did you mean 'epochs'"),
        (["--validation.task.way=9"], "5 classes cannot make 9-way tasks"),
        (["--validation.tasks=0"], "at least 1"),
        (["--optimizer=torch.optim.LBFGS"], "several times a step"),
        (["--backbone=torch.nn.Identity"], r"must return \[2, features\]"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises((RecipeError, DataError, BackboneError), match=message):
        pretrain(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_and_other_settings_are_refused(tmp_path: Path) -> None:
    pretrain(tmp_path / "run", "--train.epochs=1")
    with pytest.raises(RecipeError, match="holds a training already"):
        pretrain(tmp_path / "run", "--train.epochs=1")
    with pytest.raises(TrainingError, match=r"train\.epochs: 1 became 2"):
        pretrain(tmp_path / "run", "--train.epochs=2", resume=True)
    with pytest.raises(RecipeError, match=r"trained with seeds \[0\], not \[1\]"):
        pretrain(tmp_path / "run", "--train.epochs=1", resume=True, seed=1)
    with pytest.raises(RecipeError, match="is not the folder of a run"):
        engine.Run.open(tmp_path / "run")
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    pretrain(tmp_path / "run", "--train.epochs=2", overwrite=True)
    assert (tmp_path / "run" / "thesis.txt").exists()
    assert len(Pretrained.open(tmp_path / "run").metrics()) == 3


@pytest.mark.parametrize("name", recipe_names("embed"))
def test_every_recipe_runs_for_two_updates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small; on images of the same shape."""
    text = recipe_text(name, "embed")
    assert text.startswith("# ")
    dataset = instantiate(parse_recipe(text, kind=EmbedRecipe), EmbedRecipe).dataset
    assert name.removeprefix("embed/").startswith(f"{dataset.name}-")
    overrides = ["--train.batch=8", "--validation.task.queries=6"]
    if dataset.name == "glyphs":
        monkeypatch.undo()  # they are made by now, or will be for other tests
    if dataset.name == "miniimagenet":
        overrides, text = [*overrides, "--dataset.image_size=32"], text.replace("size: 84", "size: 28")
    network = yaml.safe_load(text)["backbone"]["class_path"].split(".")[-1]
    small: Sequence[str] = {
        "Conv4": ["--backbone.channels=4"],
        "ResNet12": ["--backbone.widths=[2,3,4]"],
        "WideResNet": ["--backbone.depth=10", "--backbone.width=1"],
    }[network]
    settings = parse_recipe(text, [*overrides, *small], EmbedRecipe)
    assert parse_recipe(dump_recipe(settings, EmbedRecipe), kind=EmbedRecipe) == settings
    made = Pretrainer(settings, 0, "cpu")
    before = [p.detach().clone() for p in made.classifier.parameters()]
    for _ in range(2):
        assert torch.isfinite(made.update())
    assert all(not torch.equal(a, b) for a, b in zip(before, made.classifier.parameters()))
