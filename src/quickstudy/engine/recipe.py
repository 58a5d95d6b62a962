"""Recipes: the full setting of one published row, as typed YAML."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from pydoc import locate
from typing import Any, ClassVar, Literal, TypeVar

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from quickstudy.choices import check_choices
from quickstudy.data.base import Dataset
from quickstudy.errors import RecipeError, suggest
from quickstudy.methods import Method
from quickstudy.task import Task, TaskShape


@dataclass
class Training:
    """Meta-training.

    Args:
        task: size of the meta-training tasks.
        meta_batch: tasks of one update.
        updates: updates in all; with 0 the method is only tested.
        reduction: whether the task losses of a meta-batch are averaged or summed.
        clip_value: bound on the absolute value of each element of the meta-gradient.
        clip_parameter_norm: bound on the norm of the meta-gradient of each parameter by itself, after ``clip_value``.
        clip_norm: bound on the norm of the whole meta-gradient.
        clip_each_task: apply ``clip_value`` to the running sum after every task, not once an update.
        decay_if_broken: where a loss or a meta-gradient is not finite, go on with this times the weights (matrices and
            kernels; nothing else moves) in the place of the meta-gradient; if not given, stop with an error.
        precision: of the forward passes (``bfloat16`` by autocast; weights stay in float32), or ``float64`` for all.
        batching: ``auto`` times the loop, vmap, and chunks of it on the first batch; ``loop`` and ``vmap`` choose.
        chunk: most tasks at a time (less memory); no bound if not given.
        together: train several seeds as one job, or in turn; by timing if not given.
        trace: run updates as a flat program, traced once: the same numbers (large perceptrons on a CPU: to rounding),
            faster after some seconds of tracing.
    """

    task: TaskShape
    meta_batch: int = 4
    updates: int = 10_000
    reduction: Literal["mean", "sum"] = "mean"
    clip_value: float | None = None
    clip_parameter_norm: float | None = None
    clip_norm: float | None = None
    clip_each_task: bool = False
    decay_if_broken: float | None = None
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    batching: Literal["auto", "vmap", "loop"] = "auto"
    chunk: int | None = None
    together: bool | None = None
    trace: bool = True

    def __post_init__(self) -> None:
        check_choices("train.", Training, vars(self))
        if self.meta_batch < 1 or self.updates < 0 or (self.chunk is not None and self.chunk < 1):
            raise RecipeError(
                "meta_batch and chunk are at least 1, and updates at least 0 (only tested); "
                f"got {self.meta_batch}, {self.chunk}, {self.updates}"
            )
        for name in ("clip_value", "clip_parameter_norm", "clip_norm"):
            bound = getattr(self, name)
            if bound is not None and bound <= 0:
                raise RecipeError(f"train.{name} is a bound above zero, or not given; got {bound}")
        if self.decay_if_broken is not None and not 0 <= self.decay_if_broken < float("inf"):
            raise RecipeError(f"train.decay_if_broken is zero or more, or not given; got {self.decay_if_broken}")
        if self.clip_each_task and self.clip_value is None:
            raise RecipeError("clip_each_task bounds the running sum by clip_value: give train.clip_value too")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def cast(self, task: Task) -> Task:
        """Bring the images or points of tasks to the precision of the weights."""
        return task.map(lambda tensor: tensor.to(self.dtype) if tensor.is_floating_point() else tensor)


@dataclass
class Validation:
    """Meta-validation: before training, every so many updates, and at the end; the best state is kept.

    Args:
        every: updates from one to the next.
        tasks: tasks of one validation, drawn afresh each time.
        task: their size; that of the test if not given.
        keep: keep the weights of every validation, for studies of how the learner changes.
    """

    every: int = 1000
    tasks: int = 600
    task: TaskShape | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        if self.every < 1 or self.tasks < 1:
            raise RecipeError(f"validation.every and .tasks are at least 1; got {self.every} and {self.tasks}")


@dataclass
class Testing:
    """Meta-test.

    Args:
        tasks: tasks of each seed.
        task: their size; that of meta-training with 15 queries a class (regression: as many) if not given.
    """

    tasks: int = 600
    task: TaskShape | None = None

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise RecipeError(f"test.tasks is at least 1; got {self.tasks}")


def _adam(parameters: Iterable[Any]) -> Optimizer:
    return Adam(parameters, **Recipe.OPTIMIZER["init_args"])


@dataclass
class Recipe:
    """The full setting of a training and its test.

    Args:
        dataset: where tasks come from.
        method: the meta-learner.
        train: meta-training.
        validation: meta-validation.
        test: meta-test.
        optimizer: any PyTorch optimiser, by ``class_path``; Adam with a learning rate of 0.001 if not given.
        schedule: any PyTorch learning-rate schedule, stepped every update (``ReduceLROnPlateau``: every validation).
        pretrained: file of backbone weights to start from: the ``backbone.safetensors`` of ``quickstudy embed``, or
            weights of a run.
        published: rows of ``results/published.csv`` that this recipe is to reproduce, by their id.
    """

    dataset: Dataset
    method: Method
    train: Training
    validation: Validation = field(default_factory=Validation)
    test: Testing = field(default_factory=Testing)
    optimizer: Callable[[Iterable], Optimizer] = _adam
    schedule: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None
    pretrained: str | None = None
    published: list[str] = field(default_factory=list)

    OPTIMIZER: ClassVar[dict[str, Any]] = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}
    """The default optimiser, in words of which single settings can be overridden."""

    @classmethod
    def named(cls, name: str, *overrides: str) -> Recipe:
        """Return one of the recipes that come with the library, or of a YAML file, as objects.

        Args:
            name: such as ``"omniglot/protonet-conv4-5w1s"``, or a path that ends in ``.yaml``.
            overrides: settings in command-line form, such as ``"--train.updates=100"``.

        Raises:
            RecipeError: there is no such recipe, or a setting is wrong; the message suggests the nearest name.
        """
        if not all(isinstance(override, str) for override in overrides):
            raise RecipeError(f"overrides are words one after the other, as in {name!r}, '--train.updates=100'")
        return instantiate(parse_recipe(recipe_text(name), overrides))

    @property
    def test_task(self) -> TaskShape:
        """Size of the tasks of the test, given or not."""
        return self.test.task or testing_task(self.train.task)

    @property
    def validation_task(self) -> TaskShape:
        """Size of the tasks of a validation, given or not."""
        return self.validation.task or self.test_task


def testing_task(task: TaskShape | Namespace) -> TaskShape:
    """Return the size of test tasks if none is given, by that of meta-training tasks."""
    return TaskShape(task.way, task.shot, task.queries if task.way is None else 15)


EMBED = "embed"
"""The folder of the recipes of ``quickstudy embed``, which pre-train a backbone and know of no method."""

Kind = TypeVar("Kind")
"""A dataclass of all settings of a kind of recipe, such as :class:`Recipe`."""


def recipe_names(command: str = "train") -> list[str]:
    """Return the names of the recipes that come with the library, such as ``omniglot/maml-mlp-5w1s``.

    They are in the order of the alphabet, and of numbers in it: 5 shots before 10.

    Args:
        command: that they are for: ``train``, or ``embed`` (such as ``embed/cifar-fs-resnet12``).
    """
    root = resources.files("quickstudy") / "recipes"
    names = [
        f"{folder.name}/{file.name.removesuffix('.yaml')}"
        for folder in root.iterdir()
        if folder.is_dir() and (folder.name == EMBED) == (command == EMBED)
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    ]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def matching_recipes(filter: str) -> list[str]:
    """Return the names of the recipes in which a word begins with ``filter``; just that one if it is a whole name.

    Raises:
        RecipeError: there is none; the message suggests the nearest.
    """
    names = recipe_names()
    found = [filter] if filter in names else [n for n in names if re.search(rf"(?<![a-z0-9]){re.escape(filter)}", n)]
    if not found:
        known = [*dict.fromkeys(name.split("/")[0] for name in names), *names]
        raise RecipeError(f"no recipe has {filter!r} in its name{suggest(filter, known)}; leave it out to see all")
    return found


def recipe_text(name: str, command: str = "train") -> str:
    """Return the YAML of a recipe, given its name or the path of a file.

    Args:
        name: as :func:`recipe_names` returns it, or a path that ends in ``.yaml``.
        command: that it is for.

    Raises:
        RecipeError: there is none; the message suggests the nearest name.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not a text file in UTF-8"
            raise RecipeError(f"cannot read the recipe {name}: {reason}") from error
    names = recipe_names(command)
    if name not in names:
        raise RecipeError(
            f"no recipe {name!r}{suggest(name, names)}; `quickstudy recipes` lists them, and a path ending in "
            ".yaml reads your own"
        )
    return (resources.files("quickstudy") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_parser(kind: type = Recipe) -> ArgumentParser:
    """Return the parser of all settings of a kind of recipe."""
    parser = ArgumentParser(exit_on_error=False, prog="quickstudy train RECIPE", default_env=False)
    parser.add_argument("--recipe", action="config", help="YAML file of settings, applied in order")
    parser.add_class_arguments(kind)
    if hasattr(kind, "OPTIMIZER"):
        parser.set_defaults({"optimizer": kind.OPTIMIZER})
    return parser


def parse_recipe(text: str, overrides: Sequence[str] = (), kind: type = Recipe) -> Namespace:
    """Check a recipe against the types of what it names, and return all of its settings.

    Args:
        text: YAML.
        overrides: settings in command-line form, such as ``["--train.updates=100"]``.
        kind: the dataclass of its settings.

    Raises:
        RecipeError: a key or a value is wrong; the message names it and suggests the nearest key.
    """
    parser = recipe_parser(kind)
    try:
        yaml.safe_load(text)
        settings = parser.parse_args([f"--recipe={text}", *_whole_tasks(text, overrides, parser)])
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe is not valid YAML: {error}") from error
    except ArgumentError as error:
        raise RecipeError(_explained(str(error), parser)) from error
    settings.pop("recipe", None)
    return settings


def _whole_tasks(text: str, overrides: Sequence[str], parser: ArgumentParser) -> list[str]:
    """Put the sizes of test and validation tasks that a recipe does not give in front of overrides of single ones."""
    whole = [*overrides]
    for section in ("test", "validation"):
        single = f"--{section}.task."
        if any(override.startswith(single) for override in overrides):
            others = [override for override in whole if not override.startswith(("--validation.task.", single))]
            given = parser.parse_args([f"--recipe={text}", *others])
            if given.get("train.task") is not None and given[section].task is None:
                sizes = given.get("test.task") or testing_task(given.train.task)
                whole.insert(0, f"--{section}.task={json.dumps(vars(sizes))}")
    return whole


def dump_recipe(settings: Namespace, kind: type = Recipe) -> str:
    """Return the YAML of a parsed recipe, with every default written out."""
    return recipe_parser(kind).dump(settings, skip_unset=True)


def differences(old: Namespace, new: Namespace) -> dict[str, tuple[Any, Any]]:
    """Return the settings that two parsed recipes do not share, each with its old and its new value.

    What they name as published is no setting.
    """
    keys = [key for key in dict.fromkeys([*old.keys(), *new.keys()]) if key != "published"]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def instantiate(settings: Namespace, kind: type[Kind] = Recipe) -> Kind:
    """Make the objects of a parsed recipe: a new, unbuilt method on every call.

    Raises:
        RecipeError: a value is out of range.
    """
    try:
        return kind(**recipe_parser(kind).instantiate(settings).as_dict())
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the recipe cannot be built: {error}") from error


def _explained(message: str, parser: ArgumentParser) -> str:
    """Add the nearest right name to a parser's complaint about a wrong one."""
    message = re.sub(r"\s*\n\s*", " ", message).strip()
    keys = {part for action in parser._actions for part in action.dest.split(".")}
    for path in re.findall(r"class_path '([\w.]+)'", message):
        located = locate(path)
        if inspect.isclass(located):
            keys |= set(inspect.signature(located).parameters)
    hint = ""
    key = re.search(r"(?:[Oo]ption|unrecognized arguments:) '?-*([\w.]+)", message)
    attribute = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message)
    if key:
        wrong = [part for part in key.group(1).split(".") if part not in keys]
        hint = suggest(wrong[0], keys) if wrong else ""
    elif attribute:
        module = locate(attribute.group(1))
        hint = suggest(attribute.group(2), getattr(module, "__all__", dir(module)))
    return f"the recipe has a setting that is not understood: {message}{hint}"
