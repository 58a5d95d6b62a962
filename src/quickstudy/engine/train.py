"""Meta-training."""

from __future__ import annotations

import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import nan
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from quickstudy.engine.checkpoint import load_state, load_weights
from quickstudy.engine.evaluate import draw, evaluate, make_current, seed_randomness
from quickstudy.engine.models import LOOP, Models, fastest_chunk, meta_loss
from quickstudy.engine.recipe import Recipe
from quickstudy.engine.run import Run
from quickstudy.engine.statistics import estimate
from quickstudy.errors import BackboneError, RecipeError, TrainingError
from quickstudy.methods import Method
from quickstudy.task import Task

ELEMENTWISE = {"Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop"}
"""Optimisers that treat every number on its own, so that seeds stacked on an axis stay independent."""

SECONDS_BETWEEN_CHECKPOINTS = 60.0


class NotFinite(TrainingError):
    """A loss or a gradient is infinite or not a number.

    Attributes:
        remedy: what may help besides a lower learning rate.
    """

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


class Stopped(TrainingError):
    """A training ended early.

    Attributes:
        trained: what a training in memory had come to by then, the method with the weights of the best validation.
        history: its rows of metrics.
    """

    trained: Any = None
    history: Sequence[dict[str, Any]] = ()


class Diverged(Stopped):
    """A loss or a gradient is not finite; what the training had come to is kept, if it had."""


class Interrupted(Stopped):
    """A signal stopped the training after a whole step, and what it had come to is kept.

    Attributes:
        signal_number: which signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Listener(Protocol):
    """What a training tells of itself while it runs."""

    def step(self, updates: int, loss: Callable[[], float]) -> None:
        """``updates`` are done; ``loss()`` is the mean meta-loss of the last one."""

    def validated(self, rows: list[dict[str, Any]], best: list[float]) -> None:
        """A validation is done: its rows of metrics, and the best score of each seed so far."""


class Trainee(Protocol):
    """What :func:`train_group` trains: all of the state of a training that changes.

    Attributes:
        seeds: one for each row of a validation.
        updates: done so far.
        seconds: taken by them.
        history: rows of metrics, one a validation and seed.
        best_scores: best validation score of each seed.
    """

    seeds: list[int]
    updates: int
    seconds: float
    history: list[dict[str, Any]]
    best_scores: list[float]

    @property
    def total(self) -> int:
        """Updates in all."""
        ...

    @property
    def every(self) -> int:
        """Updates from one validation to the next."""
        ...

    def update(self) -> Tensor:
        """Do one update; return the loss."""
        ...

    def check(self) -> None:
        """Raise :class:`NotFinite` if a loss or a gradient was not finite."""

    def validate(self) -> list[dict[str, Any]]:
        """Validate, keep the best state, and return the new rows of metrics."""
        ...

    def save(self, run: Run) -> None:
        """Save the state and the weights into the folder of the run."""

    def keep(self, run: Run) -> None:
        """Save the weights of the validation that was just done, if the recipe says so."""


@dataclass
class Group:
    """One or several seeds that train together, and all of their state that changes.

    Args:
        recipe: the setting.
        seeds: of the parameters' draw, the task streams and the method's own randomness.
        methods: a built method for each seed.
        device: where to train.
    """

    recipe: Recipe
    seeds: list[int]
    methods: Sequence[Method]
    device: str

    def __post_init__(self) -> None:
        make_current(self.device)
        train = self.recipe.train
        self.models = Models([method.to(self.device, train.dtype) for method in self.methods])
        self.optimizer = self._optimizer()
        self.schedule = self._schedule()
        self.sources = {split: self.recipe.dataset.split(split).to(self.device) for split in ("train", "val")}
        for split, shape in (("train", train.task), ("val", self.recipe.validation_task)):
            self.methods[0].check(self.sources[split].tasks(shape, 0, 1, seed=self.seeds[0])[0])
        self.higher_is_better = self.recipe.dataset.metric == "accuracy"
        self.updates = 0
        self.seconds = 0.0
        self.loss_sums = torch.zeros(len(self.seeds), device=self.device)  # of the updates since the last validation
        self.losses_summed = 0
        self.broken = torch.zeros(len(self.seeds), dtype=torch.bool, device=self.device)
        self.chunks: dict[str, int] = {}
        self.history: list[dict[str, Any]] = []
        self.best_scores = [float("-inf") if self.higher_is_better else float("inf")] * len(self.seeds)
        self.best = [self.models.state(i) for i in range(len(self.seeds))]

    def _optimizer(self) -> Optimizer:
        parameters = list(self.models.trained.values())
        if not parameters:
            raise RecipeError(
                f"{type(self.models.method).__name__} has no parameters to meta-learn: it is only tested "
                "(`quickstudy test RECIPE`, in Python meta_test)"
            )
        optimizer = build_optimizer(self.recipe.optimizer, parameters)
        # Let Adam update all parameters in one kernel, unless the recipe says how.
        if type(optimizer).__name__ in {"Adam", "AdamW"}:
            for group in optimizer.param_groups:
                if group.get("fused") is None and group.get("foreach") is None:
                    group["fused"] = True
        return optimizer

    def _schedule(self) -> LRScheduler | ReduceLROnPlateau | None:
        try:
            return self.recipe.schedule(self.optimizer) if self.recipe.schedule else None
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"the schedule cannot be built: {error}; in Python it is a function of the optimizer, such as "
                "functools.partial(StepLR, step_size=100)"
            ) from error

    @property
    def total(self) -> int:
        """Updates in all."""
        return self.recipe.train.updates

    @property
    def every(self) -> int:
        """Updates from one validation to the next."""
        return self.recipe.validation.every

    # ------------------------------------------------------------------ one update

    def batch(self, update: int) -> Task:
        """Return the meta-batch of an update (counted from 0), ``[B, ...]`` or ``[seeds, B, ...]``."""
        size = self.recipe.train.meta_batch
        shape = self.recipe.train.task
        return self.recipe.train.cast(
            draw(self.sources["train"], shape, update * size, (update + 1) * size, self.seeds)
        )

    def gradients(self, batch: Task, chunk: int, traced: bool = False) -> tuple[list[Tensor], Tensor]:
        """Return the meta-gradient of a batch, one tensor a parameter, and the mean loss of each seed."""
        train = self.recipe.train
        total: list[Tensor] = []
        losses = []
        one_by_one = train.clip_each_task
        with self._autocast():
            for loss, parts in self.models.differentiate(meta_loss, batch, chunk, traced=traced, each_task=one_by_one):
                losses.append(loss)
                axis = int(self.models.stacked)
                tasks = zip(*(gradient.unbind(axis) for gradient in parts)) if one_by_one else [parts]
                for new in tasks:
                    total = [a + b for a, b in zip(total, new)] if total else list(new)
                    if one_by_one:
                        total = _clip_value(total, train.clip_value)
        if train.reduction == "mean":
            total = [gradient / train.meta_batch for gradient in total]
        return total, torch.cat(losses, dim=-1).mean(-1)

    def _autocast(self) -> AbstractContextManager:
        if self.recipe.train.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.split(":")[0], torch.bfloat16)

    def update(self) -> Tensor:
        """Do one update; return the mean meta-loss of each seed, ``[seeds]`` or a scalar."""
        batch = self.batch(self.updates)
        if "train" not in self.chunks:
            self.chunks["train"] = self._choose_chunk(batch)
        seed_randomness(self.device, self.seeds[0], self.updates)
        gradients, loss = self.gradients(batch, self.chunks["train"], self.recipe.train.trace)
        gradients = self._watched(loss, gradients)
        for parameter, gradient in zip(self.models.trained.values(), self._clipped(gradients)):
            parameter.grad = gradient.contiguous()  # as the parameter is: a fused optimiser on a GPU asks for that
        self.loss_sums += loss
        self.losses_summed += 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.schedule and not isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step()
        self.updates += 1
        return loss

    def _choose_chunk(self, batch: Task) -> int:
        train = self.recipe.train
        largest = min(train.meta_batch, train.chunk or train.meta_batch)
        if train.batching == "vmap":
            try:
                self.gradients(batch, largest)
            except (RuntimeError, NotImplementedError) as error:
                raise BackboneError(
                    f"train.batching is vmap, but {type(self.models.method.backbone).__name__} cannot run under it: "
                    f"{str(error).splitlines()[0]}; use auto or loop"
                ) from error
            return largest
        return fastest_chunk(
            lambda size: self.gradients(batch, size),
            largest,
            loop=not self.models.stacked,
            only_loop=train.batching == "loop",
            final=(lambda size: self.gradients(batch, size, True)) if train.trace else None,
        )

    def _asked_chunk(self) -> int | None:
        """Return how a validation is to be batched; ``None``: as is fastest."""
        train = self.recipe.train
        if train.batching == "auto":
            return None
        return LOOP if train.batching == "loop" else train.chunk or train.meta_batch

    def _clipped(self, gradients: list[Tensor]) -> list[Tensor]:
        train = self.recipe.train
        if train.clip_value is not None and not train.clip_each_task:
            gradients = _clip_value(gradients, train.clip_value)
        if train.clip_parameter_norm is not None:
            gradients = [_clip_norm([g], train.clip_parameter_norm, self.models.seeds)[0] for g in gradients]
        if train.clip_norm is not None:
            gradients = _clip_norm(gradients, train.clip_norm, self.models.seeds)
        return gradients

    def _watched(self, loss: Tensor, gradients: list[Tensor]) -> list[Tensor]:
        """Note which seeds have a loss or a gradient that is not finite, or give these a gradient of weight decay."""
        sums = loss.reshape(-1)
        for gradient in gradients:
            sums = sums + gradient.reshape(len(self.seeds), -1).sum(1)
        broken = ~torch.isfinite(sums)
        decay = self.recipe.train.decay_if_broken
        if decay is not None:
            return _decayed_where(broken, gradients, list(self.models.trained.values()), decay)
        self.broken |= broken
        if self.device == "cpu" or self.updates % 50 == 0:
            self.check()
        return gradients

    def check(self) -> None:
        """Raise if a loss or a gradient was not finite.

        A GPU is asked only now and then, because each answer makes it wait; and always before a state is kept.
        """
        if self.broken.any():
            seeds = [str(seed) for seed, broken in zip(self.seeds, self.broken.tolist()) if broken]
            at = "at" if self.device == "cpu" else "at or shortly before"
            raise NotFinite(
                f"the meta-loss or its gradient is not finite {at} update {self.updates} (seed {', '.join(seeds)})",
                "gradient clipping (train.clip_norm) or float64",
            )

    # ------------------------------------------------------------------ validation and state

    def validate(self) -> list[dict[str, Any]]:
        """Validate, keep each seed's best state, and return the new rows of metrics.

        The training loss of a row is the mean over the updates since the last validation.
        """
        settings = self.recipe.validation
        number = len(self.history) // len(self.seeds)
        results, self.chunks["val"] = evaluate(
            self.models,
            self.sources["val"],
            self.recipe.validation_task,
            self.seeds,
            tasks=settings.tasks,
            first=number * settings.tasks,
            chunk=self.chunks.get("val", self._asked_chunk()),
            bound=self.recipe.train.chunk,
            cast=self.recipe.train.cast,
            traced=self.recipe.train.trace,
        )
        losses = [total / self.losses_summed if self.losses_summed else nan for total in self.loss_sums.tolist()]
        self.loss_sums, self.losses_summed = torch.zeros_like(self.loss_sums), 0
        rows = []
        for i, seed in enumerate(self.seeds):
            score = estimate(results[i, :, 1])
            best = self.best_scores[i]
            if score.mean > best if self.higher_is_better else score.mean < best:
                self.best_scores[i] = score.mean
                self.best[i] = self.models.state(i)
            rows.append(
                {
                    "update": self.updates,
                    "tasks": self.updates * self.recipe.train.meta_batch,
                    "seed": seed,
                    "train_loss": losses[i],
                    "val_loss": results[i, :, 0].mean().item(),
                    "val_score": score.mean,
                    "val_interval": score.interval,
                    "best_score": self.best_scores[i],
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "seconds": round(self.seconds, 3),
                }
            )
        self.history += rows
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(rows[0]["val_score" if self.schedule.mode == "max" else "val_loss"])
        return rows

    def state(self) -> dict[str, Any]:
        """Return all that is needed to continue, in types that load without running code."""
        return {
            "updates": self.updates,
            "seconds": self.seconds,
            "loss_sums": self.loss_sums,
            "losses_summed": self.losses_summed,
            "chunks": self.chunks,
            "history": self.history,
            "parameters": {name: tensor.detach() for name, tensor in self.models.parameters.items()},
            "buffers": self.models.buffers,
            "best": self.best,
            "best_scores": self.best_scores,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else None,
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        for name in ("updates", "seconds", "losses_summed", "chunks", "history", "best_scores"):
            setattr(self, name, state[name])
        self.loss_sums.copy_(state["loss_sums"])
        for name, tensor in {**self.models.parameters, **self.models.buffers}.items():
            tensor.copy_({**state["parameters"], **state["buffers"]}[name])
        self.best = [{name: tensor.to(self.device) for name, tensor in best.items()} for best in state["best"]]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])

    def save(self, run: Run) -> None:
        """Save the state and the weights into the folder of the run."""
        run.save_state(self.seeds, self.state())
        for i, seed in enumerate(self.seeds):
            run.save_weights("last", seed, self.models.state(i))
            run.save_weights("best", seed, self.best[i])

    def keep(self, run: Run) -> None:
        """Save the weights of the validation that was just done, if the recipe says so."""
        if self.recipe.validation.keep:
            for i, seed in enumerate(self.seeds):
                run.save_weights(run.validation(self.updates), seed, self.models.state(i))


def train_group(
    group: Trainee, run: Run, listener: Listener, others: list[dict[str, Any]], received: Sequence[int] = ()
) -> None:
    """Train a group of seeds to the end of its recipe, from wherever its state is.

    Args:
        group: the seeds and their state.
        run: the folder to save into.
        listener: told of every step.
        others: rows of metrics of seeds that trained before, kept in the run's files.
        received: signals that came, see :func:`caught_signals`: the training stops after its step.

    Raises:
        Diverged: a loss is not finite; the message names the last good checkpoint.
        Interrupted: SIGINT or SIGTERM came; the step was finished and the state saved.
    """
    total = group.total
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        group.check()
        group.save(run)
        if group.history:
            run.write_metrics(others + group.history)
        saved = time.monotonic()

    def validate() -> None:
        rows = group.validate()
        group.keep(run)
        save()  # first: what a listener writes (curves, for instance) is of no use without the weights
        listener.validated(rows, group.best_scores)

    try:
        if group.history:
            save()  # weights and metrics too are of this state, wherever a training before was cut off
        else:
            validate()
        while group.updates < total:
            if advance(group, listener):
                group.check()
                validate()
            elif received or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                save()
            if received and group.updates < total:
                raise Interrupted(
                    f"stopped by {signal.Signals(received[0]).name} after update {group.updates:,} of {total:,}, "
                    f"which is saved; `quickstudy {run.COMMAND} {run.folder} --resume` continues",
                    received[0],
                )
    except NotFinite as error:
        path = run.state_path(group.seeds)
        good = load_state(path)["updates"] if path.exists() else None
        kept = f"the last good checkpoint is {path} (update {good})" if path.exists() else "nothing was saved"
        raise Diverged(
            f"{error}, in recipe {run.name}; {kept}. A lower learning rate, {error.remedy} may help"
        ) from error


def advance(group: Trainee, listener: Listener) -> bool:
    """Do one update, and tell whether it is time for a validation."""
    start = time.monotonic()
    loss = group.update()
    group.seconds += time.monotonic() - start
    listener.step(group.updates, lambda: loss.mean().item())
    return group.updates % group.every == 0 or group.updates == group.total


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one is not caught."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():  # elsewhere the caller's handlers stay
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _clip_value(gradients: list[Tensor], bound: float | None) -> list[Tensor]:
    return [gradient.clamp(-bound, bound) for gradient in gradients] if bound is not None else gradients


def _clip_norm(gradients: list[Tensor], bound: float, seeds: int) -> list[Tensor]:
    """Scale the gradients of each seed so that the norm of all of them together is at most ``bound``."""
    rows = [gradient.reshape(seeds, -1) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.cat(rows, dim=1), dim=1, keepdim=True)
    scale = bound / norm.clamp(min=bound)
    return [(row * scale).view_as(gradient) for row, gradient in zip(rows, gradients)]


def _decayed_where(broken: Tensor, gradients: list[Tensor], parameters: list[Tensor], decay: float) -> list[Tensor]:
    """Replace the gradients of the ``broken [seeds]``: by ``decay`` times matrices and kernels, others by zero."""
    axes = 1 + (len(broken) > 1)
    return [
        torch.where(
            broken[:, None],
            decay * parameter.detach().reshape(len(broken), -1) * (parameter.dim() > axes),
            gradient.reshape(len(broken), -1),
        ).view_as(gradient)
        for gradient, parameter in zip(gradients, parameters)
    ]


def build_optimizer(make: Callable[[Iterable], Optimizer], parameters: list[Tensor]) -> Optimizer:
    """Return the optimiser of a recipe.

    Raises:
        RecipeError: its settings do not fit, or one gradient an update is not enough for it.
    """
    try:
        optimizer = make(parameters)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the optimizer cannot be built: {error}") from error
    step = inspect.signature(type(optimizer).step).parameters.get("closure")
    if step is not None and step.default is step.empty:
        raise RecipeError(
            f"{type(optimizer).__name__} evaluates the loss several times a step; training has one gradient an "
            "update: choose another optimizer"
        )
    return optimizer


def build_methods(recipe: Callable[[], Recipe], seeds: Sequence[int], example: Task | None = None) -> list[Method]:
    """Return a built method for each seed, its parameters drawn by that seed alone (unless it was built before).

    Args:
        recipe: makes the objects of the recipe anew on each call.
        seeds: the seeds.
        example: a task of the shape of those to come; the first of meta-training if not given.
    """
    methods = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = recipe()
            if not made.method.built:
                if example is None:
                    example = made.dataset.split("train").tasks(made.train.task, 0, 1, seed=seed)[0]
                made.method.build(example)
            methods.append(made.method)
    return methods


def initial_methods(recipe: Callable[[], Recipe], seeds: Sequence[int]) -> list[Method]:
    """Return a built method for each seed as a training begins with it: with the backbone that the recipe starts from.

    Args:
        recipe, seeds: as of :func:`build_methods`.

    Raises:
        RecipeError: there are no such weights, or they are those of another network.
    """
    methods, pretrained = build_methods(recipe, seeds), recipe().pretrained
    if pretrained is not None:
        for method in methods:
            load_backbone(method.backbone, Path(pretrained))
    return methods


def load_backbone(backbone: torch.nn.Module, path: Path) -> None:
    """Give a backbone the weights that a file holds, by its own names for them, or by these after ``backbone.``.

    Beside names with ``backbone.`` all others are left: the head of a run, the statistics of ``quickstudy embed``.

    Args:
        backbone: of a built method.
        path: in the safetensors format.

    Raises:
        RecipeError: there is no such file, or its names or shapes are not those of the backbone.
    """
    if not path.is_file():
        raise RecipeError(
            f"the recipe starts from the backbone weights {path}, and there is no such file: pre-train them with "
            "`quickstudy embed`, or say where they are with --pretrained"
        )
    found, own, prefix = load_weights(path), backbone.state_dict(), "backbone."
    if any(name.startswith(prefix) for name in found):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    wrong = [f"has no {name!r}" for name in own if name not in found]
    wrong += [f"has {name!r}, which the network has not" for name in found if name not in own]
    wrong += [
        f"has {name!r} of shape {[*found[name].shape]}, and the network of {[*tensor.shape]}"
        for name, tensor in own.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        raise RecipeError(
            f"{path} holds the weights of another network than this {type(backbone).__name__}: it {wrong[0]}"
            + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
            + "; choose the backbone, and its settings, that they are of"
        )
    backbone.load_state_dict(found)
