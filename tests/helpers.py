"""Small recipes, and the real command as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
import yaml
from jsonargparse import Namespace
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from quickstudy import engine
from quickstudy.data.base import SPLITS, TaskSource
from quickstudy.data.splitting import published_split
from quickstudy.engine.models import Models, meta_loss, scores
from quickstudy.engine.recipe import dump_recipe
from quickstudy.methods import Method
from quickstudy.nn import MLP
from quickstudy.task import Support, Task, TaskShape

SINE = """
dataset: {class_path: quickstudy.data.Sine}
method:
  class_path: quickstudy.methods.MAML
  init_args:
    backbone: {class_path: quickstudy.nn.MLP, init_args: {widths: [8, 8]}}
    steps: 2
train: {task: {way: null, shot: 5, queries: 5}, meta_batch: 4, updates: 30, trace: false}
validation: {every: 10, tasks: 20}
test: {tasks: 40}
"""

GLYPHS = """
dataset: {class_path: quickstudy.data.Glyphs}
method:
  class_path: quickstudy.methods.ProtoNet
  init_args:
    backbone: {class_path: quickstudy.nn.Conv4, init_args: {channels: 4}}
train: {task: {way: 5, shot: 1, queries: 3}, meta_batch: 2, updates: 4, trace: false}
validation: {every: 2, tasks: 4}
test: {tasks: 10}
"""


def read_twice(text: str) -> Namespace:
    """Return a recipe as it is read from what was printed of it, which says the same again."""
    parsed = engine.parse_recipe(text)
    again = engine.parse_recipe(dump_recipe(parsed))
    assert yaml.safe_load(dump_recipe(again)) == yaml.safe_load(dump_recipe(parsed))
    return again


def quickstudy_process(arguments: Sequence[str], folder: Path, **options) -> subprocess.Popen[str]:
    """Start the real command in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "quickstudy", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


class Recurrent(nn.Module):
    """PyTorch's LSTM over the rows of images of some width: it has no rule for vmap, and no program of it runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.flatten(1, 2))[0][:, -1]


class Dropping(nn.Module):
    """A network that draws random numbers in training."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = MLP([width, width])
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.body(x))


class SteepAtZero(Method):
    """A loss that is finite, with a slope that is not."""

    def create(self, features: int, outputs: int) -> None:
        self.offset = nn.Parameter(torch.zeros(outputs))

    def adapt(self, support: Support) -> Tensor:
        return self.offset.abs().sqrt()

    def predict(self, state: Tensor, query_x: Tensor) -> Tensor:
        return state + 0 * self.embed(query_x).sum(1, keepdim=True)


def read_in_turn(source: TaskSource, shape: TaskShape, seeds: int, tasks: int) -> None:
    """Read tasks as seeds that train as one job do: some of one, of the next, and so on."""
    for start in range(0, tasks, 50):
        for seed in range(seeds):
            source.tasks(shape, start, start + 50, seed=seed)


def published_classes(title: str, *counts: int) -> dict[str, list[str]]:
    """Return the first few classes of a published split: as many to train, to validate and to test on."""
    known = published_split(title)
    return {split: [n for n, own in known.items() if own == split][:count] for split, count in zip(SPLITS, counts)}


def write_class_folders(
    root: Path, folders: Mapping[str, Sequence[str]], images: int = 4, side: int | tuple[int, int] = 32
) -> Path:
    """Write ``<root>/<folder>/<class>/<number>.jpg`` for every class of every folder; return the root.

    Each image has a red level of its class and a green level of its number, so that they can be told apart.

    Args:
        root: folder to write to; made if need be.
        folders: the classes of each folder, such as ``{"train": ["n01532829"], ...}``.
        images: of each class.
        side: of the images, or their width and height, in pixels.
    """
    width, height = (side, side) if isinstance(side, int) else side
    total = sum(map(len, folders.values()))
    names = [(folder, name) for folder, classes in folders.items() for name in classes]
    for c, (folder, name) in enumerate(names):
        (root / folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[..., 0], pixels[..., 1] = 255 * (c + 1) // total, 255 * i // images
            Image.fromarray(pixels).save(root / folder / name / f"{i:04d}.jpg", quality=95)
    return root


def write_demo_and_photos(home: Path) -> None:
    """Write what a user has who has tried the library: ``runs/demo``, and ``photos/`` with two classes of five files.

    The photographs are of CIFAR-FS, where ``QUICKSTUDY_DATA`` has it.
    """
    engine.train(engine.parse_recipe(GLYPHS), home / "runs" / "demo", name="glyphs/x")
    write_class_folders(home, {"photos": ["rocket", "whale"]}, images=5)
    archive = Path(os.environ.get("QUICKSTUDY_DATA", "")) / "cifar-fs.zip"
    if archive.is_file():
        with ZipFile(archive) as files:
            for path in (home / "photos").glob("*/*.jpg"):
                with files.open(f"test/{path.parent.name}/{int(path.stem):03d}.webp") as file:
                    Image.open(file).save(path)


def single(task: Task) -> Task:
    """The task in float32: what methods are built with."""
    return task.map(lambda t: t.float() if t.is_floating_point() else t)


def loss_of(method: Method, task: Task) -> Callable[..., Tensor]:
    """The meta-loss of a task as a function of the values of all parameters, in their order."""
    names = [name for name, _ in method.named_parameters()]

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.method = method

        def forward(self) -> Tensor:
            return self.method.loss(task)

    def loss(*values: Tensor) -> Tensor:
        return functional_call(Loss(), {f"method.{name}": value for name, value in zip(names, values)}, ())

    return loss


def gradients(models: Models, tasks: Task, chunk: int, traced: bool = False) -> tuple[Tensor, list[Tensor]]:
    losses, parts = zip(*models.differentiate(meta_loss, tasks, chunk, traced=traced))
    return torch.cat(losses, dim=-1), [torch.stack(part).sum(0) for part in zip(*parts)]


def scored(models: Models, tasks: Task, chunk: int, traced: bool = False) -> Tensor:
    models.method.eval()
    with torch.no_grad():
        found = torch.cat(list(models.run(scores, tasks, chunk, traced=traced)), dim=int(models.stacked))
    models.method.train()
    return found
