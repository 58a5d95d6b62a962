"""The jobs of the benchmarks: settings of real recipes, and the two sides that train them."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import baseline
import torch
from PIL import Image
from torch import Tensor

from quickstudy.data import Glyphs, ImageClasses, Omniglot
from quickstudy.engine.recipe import Recipe, instantiate, parse_recipe, recipe_text
from quickstudy.engine.train import Group, build_methods
from quickstudy.errors import DataError
from quickstudy.methods import MAML, OPLSTM, MetaLSTM, PlainLSTM, ProtoNet

SEED = 0


@dataclass(frozen=True)
class Job:
    """One comparison.

    Args:
        name: how it is called.
        network: the baseline's network.
        recipe: the recipe whose setting is run.
        overrides: changes to the recipe, in command-line form.
        seeds: models that ours trains as one job; the loop trains one, for in turn they take as long a task.
        target: tasks per second that this project has promised (on the machine of ``README.md``).
    """

    name: str
    network: baseline.Network
    recipe: str
    overrides: tuple[str, ...] = ()
    seeds: int = 1
    target: float | None = None


_COMPILED = ("--method.compiled=true",)
_META_LSTM = ("--dataset=quickstudy.data.Omniglot", "--train.task.queries=15")
_FINN = (
    "--method.backbone.init_args.widths=[40,40]",
    "--method.steps=1",
    "--method.inner_lr=0.01",
    "--method.clip=null",
    "--train.task.queries=10",
    "--train.meta_batch=25",
    "--train.reduction=mean",
    "--train.clip_value=null",
    "--train.clip_each_task=false",
    "--optimizer.lr=0.001",
)
_CONV_MAML = (
    "--method.steps=5",
    "--method.inner_lr=0.1",
    "--train.task.queries=15",
    "--train.meta_batch=4",
)
_CONV_PROTONET = ("--train.task.way=5", "--train.task.queries=15", "--train.meta_batch=4")
_FIRST_ORDER = ("--method.order=1",)

JOBS = (
    Job("sine 91-91-91, MAML 14 steps, 2 tasks, 2nd order", baseline.mlp, "sine/maml-5shot"),
    Job("sine 91-91-91, MAML 14 steps, 2 tasks, 1st order", baseline.mlp, "sine/maml-5shot", _FIRST_ORDER),
    Job("sine 40-40, MAML 1 step, 25 tasks, 2nd order", baseline.mlp, "sine/maml-10shot", _FINN),
    Job("sine 40-40, MAML 1 step, 25 tasks, 1st order", baseline.mlp, "sine/maml-10shot", _FINN + _FIRST_ORDER),
    Job("Omniglot MLP, MAML 1 step, 32 tasks, 2nd order", baseline.mlp_norm, "omniglot/maml-mlp-5w1s", target=3 * 147),
    Job("Omniglot MLP, MAML 1 step, 32 tasks, 1st order", baseline.mlp_norm, "omniglot/fomaml-mlp-5w1s"),
    Job("Omniglot MLP, ProtoNet, 4 tasks", baseline.mlp_norm, "omniglot/protonet-mlp-5w1s", target=3 * 340),
    Job("conv-4 28x28, MAML 5 steps, 4 tasks, 2nd order", baseline.conv4, "omniglot/maml-conv4-5w1s", _CONV_MAML),
    Job("conv-4 28x28, MAML 5 steps, 4 tasks, 1st order", baseline.conv4, "omniglot/fomaml-conv4-5w1s", _CONV_MAML),
    Job("conv-4 28x28, ProtoNet, 4 tasks", baseline.conv4, "omniglot/protonet-conv4-5w1s", _CONV_PROTONET),
    Job("sine 91-91-91, OP-LSTM 9 passes, 1 task", baseline.mlp, "sine/op-lstm-5shot"),
    Job("sine 91-91-91, OP-LSTM 9 passes, 1 task, 3 seeds", baseline.mlp, "sine/op-lstm-5shot", seeds=3),
    Job(
        "sine 91-91-91, OP-LSTM 9 passes, 1 task, 3 seeds, compiled",
        baseline.mlp,
        "sine/op-lstm-5shot",
        _COMPILED,
        seeds=3,
        target=7 * 16.7,
    ),
    Job("Omniglot MLP, OP-LSTM 1 pass, 4 tasks", baseline.mlp_norm, "omniglot/op-lstm-mlp-5w1s"),
    Job(
        "Omniglot MLP, OP-LSTM 1 pass, 4 tasks, compiled",
        baseline.mlp_norm,
        "omniglot/op-lstm-mlp-5w1s",
        _COMPILED,
        target=4 * 84,
    ),
    Job("sine, plain LSTM 40-40, batch reading, 4 tasks", baseline.mlp, "sine/lstm-batch-5shot"),
    Job("sine, plain LSTM 40-40, sequential reading, 4 tasks", baseline.mlp, "sine/lstm-sequential-5shot"),
    Job(
        "Omniglot, plain LSTM of 13.5 M, batch reading, 12 tasks",
        baseline.mlp,
        "omniglot/lstm-batch-mlp-5w1s",
        target=4 * 2.9,
    ),
    Job(
        "Omniglot, plain LSTM of 13.5 M, sequential reading, 12 tasks",
        baseline.mlp,
        "omniglot/lstm-sequential-mlp-order-5w1s",
    ),
    Job(
        "conv-4-32 28x28, Meta-LSTM 12 steps, 1 task",
        baseline.conv4,
        "miniimagenet/meta-lstm-conv4-32-5w1s",
        _META_LSTM,
    ),
)


def jobs_matching(pattern: str) -> list[Job]:
    """Return the jobs in whose name the regular expression is found, in any case.

    Raises:
        ValueError: there is none.
    """
    found = [job for job in JOBS if re.search(pattern, job.name, re.IGNORECASE)]
    if not found:
        raise ValueError(f"no job matches {pattern!r}; there are: " + "; ".join(job.name for job in JOBS))
    return found


@cache
def images_from() -> str:
    """Return which images the jobs run on: Omniglot if it is on this machine, or else the embedded glyphs."""
    try:
        Omniglot().split("train")
    except DataError:
        return "glyphs"
    return "omniglot"


# ---------------------------------------------------------------------------------------------- ours


def group(job: Job, *, trace: bool = True, precision: str = "float32", seeds: int = 1) -> Group:
    """Return the library's training of a job, ready for its first update."""
    overrides = [*job.overrides, f"--train.trace={str(trace).lower()}", f"--train.precision={precision}"]
    if not job.recipe.startswith("sine/") and images_from() == "glyphs":
        overrides.append(f"--dataset={Glyphs.__module__}.{Glyphs.__qualname__}")
    settings = parse_recipe(recipe_text(job.recipe), overrides)

    def make() -> Recipe:
        return instantiate(settings)

    numbers = [SEED + i for i in range(seeds)]
    return Group(make(), numbers, build_methods(make, numbers), "cpu")


# ---------------------------------------------------------------------------------------------- the baseline


def loop(job: Job, ours: Group, draw: Callable[[], baseline.Example], *, one_backward: bool = False) -> baseline.Loop:
    """Return the baseline of a job: the same setting and initial weights as ``ours``."""
    train, method = ours.recipe.train, ours.models.method
    loss: Callable[[baseline.Weights, baseline.Example], Tensor]
    regression = train.task.way is None
    if isinstance(method, MAML):
        assert method.adapts == "all"
        assert method.norm == "batch"
        loss = baseline.MAML(job.network, method.steps, method.inner_lr, method.order, method.clip, regression)
    elif isinstance(method, ProtoNet):
        assert train.task.way is not None
        assert method.distance == "euclidean"
        loss = baseline.ProtoNet(job.network, train.task.way, joint=method.norm == "joint")
    elif isinstance(method, OPLSTM):
        assert method.adapts == "all"
        assert method.order == 2
        cells, norm = len(method.out_lstm.cells), job.network is baseline.mlp_norm
        loss = baseline.OPLSTM(method.steps, cells, norm, method.gamma is not None, regression)
    elif isinstance(method, PlainLSTM):
        loss = baseline.PlainLSTM(method.steps, method.reading == "sequential", regression)
    elif isinstance(method, MetaLSTM):
        loss = baseline.MetaLSTM(partial(job.network, eps=1e-3), method.steps)
    else:
        raise TypeError(f"no baseline is written for {type(method).__name__}")
    assert train.clip_value is None or train.clip_each_task
    return baseline.Loop(
        loss,
        [ours.models.parameters[name] for name in weight_names(ours)],
        draw,
        train.meta_batch,
        ours.optimizer.param_groups[0]["lr"],
        clip_norm=train.clip_norm,
        mean=train.reduction == "mean",
        clip_each_task=train.clip_value,
        one_backward=one_backward,
    )


def weight_names(ours: Group) -> list[str]:
    """Return the names of our parameters in the order of the baseline: layer by layer, the head, then the rest."""
    order = list(ours.models.trained)
    last = isinstance(ours.models.method, PlainLSTM)  # whose head reads the LSTM

    def position(name: str) -> tuple:
        if name.startswith("head."):
            return 3 if last else 1, 0, 0, name.endswith("bias")
        if not name.startswith("backbone."):
            return 2, name == "gamma", not name.startswith(("out_lstm", "lstm")), order.index(name)
        _, kind, index, part = name.split(".")
        return 0, int(index), kind == "norms", part == "bias"

    return sorted(ours.models.trained, key=position)


def png_tasks(ours: Group) -> baseline.PngTasks:
    """Return tasks of the training images of ``ours``, as PNG files in memory."""
    shape = ours.recipe.train.task
    assert shape.way is not None
    return baseline.PngTasks(_encoded(_classes(ours)), shape.way, shape.shot, shape.queries)


def tensor_tasks(ours: Group) -> baseline.TensorTasks | baseline.SineTasks:
    """Return tasks of the training images of ``ours``, as float tensors in memory; or sine waves."""
    shape = ours.recipe.train.task
    if shape.way is None:
        return baseline.SineTasks(shape.shot, shape.queries)
    classes = _classes(ours)
    fewest = int(classes.counts.min())
    images = torch.stack([classes.of_class(index)[:fewest] for index in range(len(classes))])
    return baseline.TensorTasks(images.float().div(255), shape.way, shape.shot, shape.queries)


def touch(ours: Group) -> None:
    """Read all training images once, so that those of a memory map count as memory from now on."""
    source = ours.sources["train"]
    if isinstance(source, ImageClasses):
        source.images.sum()


def _classes(ours: Group) -> ImageClasses:
    source = ours.sources["train"]
    assert isinstance(source, ImageClasses)
    return source


def _encoded(classes: ImageClasses) -> list[list[bytes]]:
    """Encode all images of the classes."""

    def encode(image: Tensor) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(file, "png")
        return file.getvalue()

    return [[encode(image) for image in classes.of_class(index)] for index in range(len(classes))]


def seed_all() -> None:
    """Make the draws of a baseline the same in every run."""
    random.seed(SEED)
    torch.manual_seed(SEED)
