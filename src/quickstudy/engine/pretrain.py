"""Pre-training of a backbone as a classifier of all meta-train classes, and the embeddings that it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import exp, log, nan
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import Namespace
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

from quickstudy.choices import check_choices
from quickstudy.data.base import SPLITS, Dataset, Split, generator
from quickstudy.data.embeddings import Layout, grouped, write_embeddings
from quickstudy.data.images import ImageClasses, unit_floats
from quickstudy.data.progress import track
from quickstudy.data.reader import picture_size
from quickstudy.data.transformed import TransformedTasks
from quickstudy.data.transforms import Transform, transform_images
from quickstudy.engine.checkpoint import load_weights, save_weights
from quickstudy.engine.evaluate import DRAWN_AT_ONCE, make_current, seed_randomness
from quickstudy.engine.job import Quiet, check_same
from quickstudy.engine.recipe import dump_recipe, instantiate, parse_recipe
from quickstudy.engine.run import Run, environment
from quickstudy.engine.statistics import estimate
from quickstudy.engine.train import Listener, NotFinite, build_optimizer, caught_signals, train_group
from quickstudy.errors import RecipeError
from quickstudy.methods import ProtoNet
from quickstudy.nn import FixedStatistics, adopt, population_statistics
from quickstudy.task import Task, TaskShape

STREAM = 0x656D6264
"""Sets the draws of epochs apart from those of tasks, as ``quickstudy.data.transformed.STREAM`` does."""

BACKBONE = "backbone.safetensors"

STATISTICS = 4096
"""Most meta-train images that the statistics of the batch norms are taken from."""

AT_ONCE = 256
"""Images embedded at a time; of no influence, for each is embedded on its own."""


@dataclass
class Pretraining:
    """Training of the classifier.

    Args:
        epochs: passes over the meta-train images, each in a new order.
        batch: images of one update; those that do not fill a last batch wait for the next epoch.
        precision: of the forward passes in training (``bfloat16`` by autocast; weights stay in float32).
    """

    epochs: int = 60
    batch: int = 64
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_choices("train.", Pretraining, vars(self))
        if self.epochs < 1 or self.batch < 2:
            raise RecipeError(
                f"train.epochs is at least 1, train.batch at least 2 images; got {self.epochs} and {self.batch}"
            )


@dataclass
class FewShot:
    """Validation: the few-shot accuracy of nearest centroids on the meta-validation classes.

    Args:
        tasks: tasks of one validation, drawn afresh each time.
        task: their size.
    """

    tasks: int = 1000
    task: TaskShape = field(default_factory=lambda: TaskShape(5, 1, 15))

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise RecipeError(f"validation.tasks is at least 1; got {self.tasks}")


def _sgd(parameters: Iterable[Any]) -> Optimizer:
    return SGD(parameters, **EmbedRecipe.OPTIMIZER["init_args"])


@dataclass
class EmbedRecipe:
    """The full setting of a pre-training.

    Args:
        dataset: of images. Its transforms of meta-training (``train_transforms``) are the augmentation; with those of
            meta-validation and meta-test (``test_transforms``) all images are embedded.
        backbone: the network to train, from ``[M, C, H, W]`` to ``[M, features]``.
        train: training of the classifier.
        validation: choice of the best epoch.
        optimizer: any PyTorch optimiser, by ``class_path``; if not given, SGD with a learning rate of 0.1, Nesterov's
            momentum of 0.9 and a weight decay of 0.0005.
        schedule: any PyTorch learning-rate schedule, stepped every update (``ReduceLROnPlateau``, with ``mode: max``:
            every epoch); if not given, half a cosine from the learning rate to zero over the whole training.
    """

    dataset: Dataset
    backbone: nn.Module
    train: Pretraining = field(default_factory=Pretraining)
    validation: FewShot = field(default_factory=FewShot)
    optimizer: Callable[[Iterable], Optimizer] = _sgd
    schedule: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None

    OPTIMIZER: ClassVar[dict[str, Any]] = {
        "class_path": "torch.optim.SGD",
        "init_args": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
    }

    def batches(self) -> int:
        """Return how many batches the meta-train images fill, which is the updates of an epoch.

        Raises:
            RecipeError: they do not fill one.
        """
        images = LabelledImages(self.dataset, "train")
        batches = len(images.rows) // self.train.batch
        if not batches:
            raise RecipeError(
                f"{images.classes.title}: {len(images.rows)} images do not fill a batch of {self.train.batch}; "
                "lower train.batch"
            )
        return batches


class Pretrained(Run):
    """The folder of one pre-training.

    ======================== =====================================================================
    ``recipe.yaml``          every setting, defaults written out
    ``embed.json``           seed, shape of an image, machine, versions, command; when all is done, what was embedded
    ``metrics.csv|.jsonl``   one row an epoch
    ``state-<seed>.pt``      all that is needed to continue (``--resume``)
    ``backbone.safetensors`` weights of the best epoch, and the statistics of its batch norms
    ``embeddings/``          of the images of every split
    ======================== =====================================================================
    """

    COMMAND: ClassVar[str] = "embed"
    INFO: ClassVar[str] = "embed.json"
    FILES: ClassVar[tuple[str, ...]] = (
        *("embed.json", "recipe.yaml", "metrics.csv", "metrics.jsonl"),
        *("state-*.pt", BACKBONE, "embeddings"),
    )

    @property
    def embeddings(self) -> Path:
        """The folder of the embeddings: the ``root`` of :class:`quickstudy.data.Embeddings`."""
        return self.folder / "embeddings"

    @property
    def input_shape(self) -> list[int]:
        """The shape of an image as the backbone sees it."""
        kept = self.info.get("input_shape")
        if kept is not None:
            return kept
        recipe = instantiate(parse_recipe(self.recipe_text, kind=EmbedRecipe), EmbedRecipe)
        images = LabelledImages(recipe.dataset, "val")
        return [*images.pixels(images.rows[:1], images.transforms).shape[1:]]

    def backbone(self) -> FixedStatistics:
        """Return the best backbone, which embeds every image on its own.

        Raises:
            TrainingError: the weights are missing or damaged.
        """
        recipe = instantiate(parse_recipe(self.recipe_text, kind=EmbedRecipe), EmbedRecipe)
        adopt(recipe.backbone, Task.of_noise(2, self.input_shape).support_x)
        return FixedStatistics.restore(recipe.backbone, load_weights(self.folder / BACKBONE)).eval()


class LabelledImages:
    """The images of one split as a classifier sees them: one after the other, each with the number of its class.

    Args:
        dataset: whose splits are classes of images, or these transformed.
        split: which.
        device: where its images are to be.

    Attributes:
        classes: where they are from.
        rows: of every image in the packed array, class by class, ``[n]``.
        labels: the class of each, ``[n]``.
        transforms: what the split does to its images.

    Raises:
        RecipeError: they are not images of classes.
    """

    def __init__(self, dataset: Dataset, split: Split, device: str = "cpu") -> None:
        source = dataset.split(split).to(device)
        self.transforms: Sequence[Transform] = ()
        if isinstance(source, TransformedTasks):
            source, self.transforms = source.source, source.transforms
        if not isinstance(source, ImageClasses) or source.images.dtype != torch.uint8:
            raise RecipeError(f"a classifier is pre-trained on images of classes, and {dataset.name} has none")
        self.classes = source
        spans = [np.arange(start, start + count) for start, count in zip(source.starts, source.counts)]
        self.rows = torch.from_numpy(np.concatenate(spans)).to(device)
        self.labels = torch.from_numpy(np.repeat(np.arange(len(source)), source.counts)).to(device)

    def names(self) -> list[str]:
        """Return the name of the class of every image."""
        return [self.classes.names[label] for label in self.labels.tolist()]

    def pixels(self, rows: Tensor, transforms: Sequence[Transform], unit: Tensor | None = None) -> Tensor:
        """Return images, transformed, float32 ``[m, C, H, W]``.

        Args:
            rows: of the packed array, ``[m]``.
            transforms: what is to be done to them.
            unit: the numbers that the transforms need, ``[m, numbers]``; not given where there is nothing random.
        """
        images = unit_floats(self.classes.images.index_select(0, rows))
        return transform_images(transforms, images, images.new_empty(len(rows), 0) if unit is None else unit)


class Classifier(nn.Module):
    """A backbone and a linear layer on its embedding: ``[M, ...]`` to logits ``[M, classes]``."""

    def __init__(self, backbone: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def centroid_accuracy(tasks: Task) -> Tensor:
    """Return the share of queries that are nearest, by cosine, to the mean support embedding of their class, ``[B]``.

    The classifier's weights are directions, and so are what it makes of classes that it has not met (Chen et al., 2021,
    "Meta-Baseline").

    Args:
        tasks: of embeddings, ``[B, M, features]``, with the support examples ordered by class.
    """
    assert tasks.way is not None
    centroids = tasks.support_x.unflatten(1, (tasks.way, -1)).mean(2)
    nearest = (F.normalize(tasks.query_x, dim=-1) @ F.normalize(centroids, dim=-1).mT).argmax(-1)
    return (nearest == tasks.query_y).float().mean(-1)


def nearest_centroid(backbone: nn.Module, temperature: float = 1.0) -> ProtoNet:
    """Return what a backbone that tells many classes apart is to be used as: SimpleShot with L2N."""
    return ProtoNet(backbone, normalise="l2", temperature=temperature)


def best_temperature(batches: Iterable[Task]) -> float:
    """Return the temperature with which nearest centroids give the classes of queries the best log-likelihood.

    Args:
        batches: tasks of embeddings, ``[B, M, features]``.
    """
    from scipy.optimize import minimize_scalar

    method, logits, labels = nearest_centroid(nn.Flatten()), [], []
    for batch in batches:
        for task in (batch[number] for number in range(len(batch))):
            logits.append(method.predict(method.adapt(task.support), task.query_x).double())
            labels.append(task.query_y)
    every, label = torch.cat(logits), torch.cat(labels)

    def surprise(logarithm: float) -> float:
        return F.cross_entropy(every / exp(logarithm), label).item()

    return exp(minimize_scalar(surprise, bounds=(log(1e-3), log(1e3)), method="bounded").x)


class Pretrainer:
    """A pre-training, and all of its state that changes (a :class:`~quickstudy.engine.train.Trainee`).

    The order of the images in an epoch and the augmentation of each are functions of the seed and of the number of
    the epoch, so that a stopped training continues as if it had not been.

    Batch norms use the statistics of each batch in training. To embed, they use those of up to :data:`STATISTICS`
    meta-train images, transformed as they will be embedded and in batches of the same size
    (:func:`~quickstudy.nn.population_statistics`): taken anew for every validation, and kept with the best weights.

    Args:
        settings: a parsed :class:`EmbedRecipe`.
        seed: of the weights, the order of the images and their augmentation.
        device: where to train.

    Raises:
        RecipeError: the dataset is none of images, or smaller than a batch.
        BackboneError: the network cannot serve (see :func:`quickstudy.nn.adopt`).
    """

    def __init__(self, settings: Namespace, seed: int, device: str) -> None:
        make_current(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.recipe = recipe = instantiate(settings, EmbedRecipe)
            self.images = {split: LabelledImages(recipe.dataset, split, device) for split in SPLITS}
            self.transforms = self.images["val"].transforms
            if any(transform.numbers for transform in self.transforms):
                raise RecipeError("an image has one embedding: there can be nothing random in test_transforms")
            train, val = self.images["train"], self.images["val"]
            val.classes.tasks(recipe.validation.task, 0, 1, seed=seed)  # complains if they are too few
            self.batches = recipe.batches()
            example = train.pixels(train.rows[:2], self.transforms).cpu()
            self.input_shape = [*example.shape[1:]]
            features = adopt(recipe.backbone, example)
            self.classifier = Classifier(recipe.backbone, features, len(train.classes)).to(device)
        self.seeds = [seed]
        self.device = device
        self.optimizer = build_optimizer(recipe.optimizer, list(self.classifier.parameters()))
        make = recipe.schedule or (lambda optimizer: CosineAnnealingLR(optimizer, self.total))
        self.schedule = make(self.optimizer)
        self.updates = 0
        self.seconds = 0.0
        self.broken = torch.zeros((), dtype=torch.bool, device=device)
        self.loss_sum = torch.zeros((), device=device)  # of the updates since the last validation
        self.correct = torch.zeros((), device=device)
        self.history: list[dict[str, Any]] = []
        self.best_scores = [float("-inf")]
        self.best: dict[str, Tensor] = {}
        self._epoch: tuple[int, Tensor, Tensor] | None = None

    @property
    def total(self) -> int:
        """Updates in all."""
        return self.recipe.train.epochs * self.batches

    @property
    def every(self) -> int:
        """Updates of an epoch."""
        return self.batches

    # ------------------------------------------------------------------ one update

    def batch(self, update: int) -> tuple[Tensor, Tensor]:
        """Return images and labels of an update (counted from 0)."""
        images = self.images["train"]
        epoch, number = divmod(update, self.batches)
        if self._epoch is None or self._epoch[0] != epoch:
            rng = generator(self.seeds[0], STREAM, epoch)
            numbers = sum(transform.numbers for transform in images.transforms)
            order = torch.from_numpy(rng.permutation(len(images.rows)))
            unit = torch.from_numpy(rng.random((len(images.rows), numbers), dtype=np.float32))
            self._epoch = epoch, order.to(self.device), unit.to(self.device)
        size = self.recipe.train.batch
        chosen, unit = (tensor[number * size : (number + 1) * size] for tensor in self._epoch[1:])
        return images.pixels(images.rows[chosen], images.transforms, unit), images.labels[chosen]

    def update(self) -> Tensor:
        """Do one update; return the loss."""
        x, y = self.batch(self.updates)
        seed_randomness(self.device, self.seeds[0], self.updates)
        self.classifier.train()
        low = self.recipe.train.precision == "bfloat16"
        with torch.autocast(self.device.split(":")[0], torch.bfloat16) if low else nullcontext():
            logits = self.classifier(x)
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        gradients = [parameter.grad for parameter in self.classifier.parameters() if parameter.grad is not None]
        self.broken |= ~torch.isfinite(loss.detach() + torch.nn.utils.get_total_norm(gradients))
        if self.device == "cpu" or self.updates % 50 == 0:
            self.check()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step()
        self.loss_sum += loss.detach()
        self.correct += (logits.detach().argmax(1) == y).float().mean()
        self.updates += 1
        return loss.detach()

    def check(self) -> None:
        """Raise if a loss or a gradient was not finite; a GPU is asked only now and then, as in meta-training."""
        if self.broken:
            at = "at" if self.device == "cpu" else "at or shortly before"
            raise NotFinite(
                f"the loss or its gradient is not finite {at} update {self.updates} (seed {self.seeds[0]})",
                "a schedule that begins with lower ones or float32",
            )

    # ------------------------------------------------------------------ validation and state

    def fixed(self) -> FixedStatistics:
        """Return the backbone as it is, with the statistics of meta-train images."""
        train, size = self.images["train"], self.recipe.train.batch
        order = torch.from_numpy(generator(self.seeds[0], STREAM).permutation(len(train.rows)))
        count = max(min(len(order), STATISTICS) // size, 1) * size
        rows = train.rows[order[:count].to(self.device)]
        self.classifier.eval()
        batches = (train.pixels(part, self.transforms) for part in rows.split(size))
        return FixedStatistics(self.classifier.backbone, population_statistics(self.classifier.backbone, batches))

    def embeddings(self, network: nn.Module, split: Split, title: str | None = None) -> Tensor:
        """Return the embedding of every image of a split, float32 ``[n, features]``, on the CPU.

        Args:
            network: from images to embeddings, each on its own.
            split: which.
            title: a few words in front of a progress bar, if there is to be one.
        """
        images = self.images[split]
        parts = images.rows.split(AT_ONCE)
        network.eval()
        with torch.no_grad():
            return torch.cat(
                [
                    network(images.pixels(rows, self.transforms)).float().cpu()
                    for rows in (parts if title is None else track(parts, title))
                ]
            )

    def tasks(self, embeddings: Tensor, start: int, stop: int) -> Iterator[Task]:
        """Return validation tasks of these numbers, ``[B, ...]`` at a time, of the embeddings of all images of it."""
        val = self.images["val"]
        source = grouped(embeddings, val.names(), val.classes.title)
        for own in torch.arange(start, stop).split(DRAWN_AT_ONCE):
            yield source.tasks(self.recipe.validation.task, int(own[0]), int(own[-1]) + 1, seed=self.seeds[0])

    def validate(self) -> list[dict[str, Any]]:
        """Validate, keep the best backbone, and return the new row of metrics.

        Training loss and accuracy of a row are means over the updates since the last validation.
        """
        settings, (seed,) = self.recipe.validation, self.seeds
        fixed, start = self.fixed(), len(self.history) * settings.tasks
        batches = self.tasks(self.embeddings(fixed, "val"), start, start + settings.tasks)
        score = estimate(torch.cat([centroid_accuracy(batch) for batch in batches]))
        if score.mean > self.best_scores[0]:
            self.best_scores = [score.mean]
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in fixed.state_dict().items()}
        done = self.updates - (self.history[-1]["update"] if self.history else 0)
        row = {
            "update": self.updates,
            "epoch": self.updates // self.batches,
            "seed": seed,
            "train_loss": self.loss_sum.item() / done if done else nan,
            "train_accuracy": self.correct.item() / done if done else nan,
            "val_score": score.mean,
            "val_interval": score.interval,
            "best_score": self.best_scores[0],
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(self.seconds, 3),
        }
        self.loss_sum, self.correct = torch.zeros_like(self.loss_sum), torch.zeros_like(self.correct)
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(row["val_score"])
        self.history.append(row)
        return [row]

    def state(self) -> dict[str, Any]:
        """Return all that is needed to continue, in types that load without running code."""
        return {
            "updates": self.updates,
            "seconds": self.seconds,
            "loss_sum": self.loss_sum,
            "correct": self.correct,
            "history": self.history,
            "best": self.best,
            "best_scores": self.best_scores,
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        for name in ("updates", "seconds", "history", "best", "best_scores"):
            setattr(self, name, state[name])
        self.loss_sum, self.correct = state["loss_sum"].to(self.device), state["correct"].to(self.device)
        for name in ("classifier", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])

    def save(self, run: Run) -> None:
        """Save the state and the best backbone into the folder of the run."""
        run.save_state(self.seeds, self.state())
        save_weights(run.folder / BACKBONE, self.best)

    def keep(self, run: Run) -> None:
        """Keep no weights but the best."""


def pretrain(
    settings: Namespace,
    folder: Path,
    *,
    name: str,
    seed: int = 0,
    device: str = "cpu",
    layout: Layout = "own",
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Pretrained:
    """Pre-train a backbone, and write the embeddings of all images of its dataset, each on its own.

    Args:
        settings: a parsed :class:`EmbedRecipe` (``parse_recipe(text, kind=EmbedRecipe)``).
        folder: where the results are kept.
        name: of the recipe.
        seed: of the weights, the order of the images and their augmentation.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        layout: of the embeddings (:func:`quickstudy.data.write_embeddings`).
        resume: continue what the folder holds; when all is trained, write the embeddings again.
        overwrite: remove what the folder holds.
        listener: told of every step and validation.

    Returns:
        The finished run.

    Raises:
        RecipeError: the folder holds another training, or resuming was asked with other settings.
        TrainingError: a loss is not finite, or a file cannot be written.
        Interrupted: a signal stopped it, after saving.
    """
    run = Pretrained(folder)
    begun = run.begun(resume=resume, overwrite=overwrite)
    if begun:
        check_same(run, settings, [seed], EmbedRecipe)
        info = run.info
    else:
        info = {"recipe": name, "seeds": [seed], **environment(device)}
    trainer = Pretrainer(settings, seed, device)  # may complain of data or network: before anything is written
    names = {split: _row_names(trainer.images[split], layout) for split in SPLITS}
    size = picture_size(trainer.input_shape, trainer.recipe.dataset)
    info |= {"input_shape": trainer.input_shape, "picture_size": size}
    if not begun:
        run.clear()
    run.write_text("recipe.yaml", dump_recipe(settings, EmbedRecipe))
    run.write_info(info)
    state = run.load_state([seed])
    if state is not None:
        trainer.load(state)
    with caught_signals() as received:
        train_group(trainer, run, listener or Quiet(), [], received)
    network, temperature = run.backbone().to(device), 1.0
    for split in SPLITS:
        embeddings = trainer.embeddings(network, split, f"embedding the images of {split}")
        if split == "val":
            temperature = best_temperature(trainer.tasks(embeddings, 0, trainer.recipe.validation.tasks))
        write_embeddings(run.embeddings, split, embeddings, names[split], layout)
    best = max(trainer.history, key=lambda row: row["val_score"])
    run.write_info(
        info
        | {
            "best": {key: best[key] for key in ("epoch", "val_score", "val_interval")},
            "embeddings": {split: len(names[split]) for split in SPLITS},
            "features": trainer.classifier.head.in_features,
            "layout": layout,
            "temperature": temperature,
        }
    )
    return run


def _row_names(images: LabelledImages, layout: Layout) -> list[str]:
    """Return the class of every image in the words of a layout, for LEO's cannot hold ``-`` and ``_``.

    Raises:
        RecipeError: two classes would have the same name.
    """
    names = images.names()
    if layout == "own":
        return names
    told = [name.replace("-", ".").replace("_", ".") for name in names]
    if len(set(told)) < len(set(names)):
        raise RecipeError(f"{images.classes.title}: some have the same name without - and _: use the layout own")
    return told
