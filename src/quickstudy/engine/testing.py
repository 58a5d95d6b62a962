"""Meta-test of a finished run: the number, its interval and the setting that it belongs to."""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor

from quickstudy.data.base import Dataset, TaskSource
from quickstudy.data.reader import reader_of
from quickstudy.data.registry import DATASETS, dataset_entry
from quickstudy.engine.checkpoint import restore
from quickstudy.engine.evaluate import evaluate, make_current
from quickstudy.engine.models import Models, TaskFunction, scores
from quickstudy.engine.recipe import Recipe, differences, instantiate, parse_recipe, recipe_names, recipe_text
from quickstudy.engine.run import Run, environment
from quickstudy.engine.statistics import Estimate, estimate
from quickstudy.engine.train import build_methods, initial_methods
from quickstudy.errors import RecipeError
from quickstudy.files import append_text, create_text, csv_text
from quickstudy.methods import Method, Norm
from quickstudy.task import TaskShape


@dataclass(frozen=True)
class Wish:
    """What a test does otherwise than the recipe says; ``None`` is as it says.

    A run is tested on its own dataset as its recipe has it, and on another (``on``) as that is by default. Where that
    has certain tasks and no others, a wish that does not say which means all of these.
    """

    on: str | None = None
    tasks: int | None = None
    way: int | None = None
    shot: int | None = None
    queries: int | None = None
    steps: int | None = None
    norm: Norm | None = None
    weights: str = "best"

    def filled(self) -> Wish:
        """Return the wish with the tasks of a dataset that has no others than these."""
        fixed = dataset_entry(self.on).load().fixed if self.on in DATASETS else None
        if fixed is None or any(part is not None for part in (self.tasks, self.way, self.shot, self.queries)):
            return self
        tasks, shape = fixed
        return dataclasses.replace(self, tasks=tasks, **dataclasses.asdict(shape))


@dataclass(frozen=True)
class Result:
    """A measured score.

    Attributes:
        metric: ``accuracy`` (as a fraction) or ``mse``.
        score: mean over the tasks of all seeds pooled, with its 95 % interval.
        per_seed: mean of each seed.
        setting: everything the number depends on.
    """

    recipe: str
    metric: str
    score: Estimate
    per_seed: dict[int, float]
    setting: dict[str, Any]
    environment: dict[str, Any] = field(repr=False, default_factory=dict)

    def text(self) -> str:
        """Return the result in a few lines."""
        s = self.setting
        way = f"{s['way']}-way " if s["way"] else ""
        lines = [
            f"{self.recipe}   {way}{s['shot']}-shot on {s['tested_on']} "
            + (f"(trained on {s['trained_on']})" if s["updates"] else "(not trained)"),
            f"{self.metric}   {self.score.show(self.metric)}   "
            f"({self.score.count:,} tasks, {s['queries']} queries{' a class' if way else ''}, norm {s['norm']}"
            + (f", {s['steps']} inner steps" if s["steps"] is not None else "")
            + f", {s['weights']} weights, {s['updates']:,} updates)",
        ]
        if s["differs"]:
            lines.append(f"not as in the recipe   {s['differs']}")
        if len(self.per_seed) > 1:
            scale = 100 if self.metric == "accuracy" else 1
            lines.append("seeds   " + ", ".join(f"{seed}: {scale * v:.4g}" for seed, v in self.per_seed.items()))
        return "\n".join(lines)

    def row(self) -> dict[str, Any]:
        """Return the row of ``results/measured.csv``; accuracies in percent."""
        scale = 100 if self.metric == "accuracy" else 1
        return {
            "recipe": self.recipe,
            "metric": self.metric,
            "value": f"{scale * self.score.mean:.5g}",
            "interval": f"{scale * self.score.interval:.2g}",
            "per_seed": " ".join(f"{seed}:{scale * value:.5g}" for seed, value in self.per_seed.items()),
            **self.setting,
            "device": self.environment["device"],
            "processor": self.environment["machine"]["processor"],
            "torch": self.environment["versions"]["torch"],
            "quickstudy": self.environment["versions"]["quickstudy"],
            "commit": self.environment["commit"],
        }


def trained_methods(run: Run, weights: str, device: str = "cpu", seeds: Sequence[int] | None = None) -> list[Method]:
    """Return the methods that a run has trained, one for each seed, on a device and in the run's type.

    Args:
        run: the run.
        weights: ``best``, ``last``, or those of a validation (:meth:`~quickstudy.engine.run.Run.validation`).
        device: where to put them.
        seeds: of the run; all of them if ``None``.
    """
    settings = parse_recipe(run.recipe_text)
    dtype = instantiate(settings).train.dtype
    seeds = run.info["seeds"] if seeds is None else seeds
    assert seeds is not None
    methods = build_methods(lambda: instantiate(settings), seeds, run.example)
    for seed, method in zip(seeds, methods):
        method.to(device, dtype)
        restore(method, run.load_weights(weights, seed))
    return methods


def test_run(run: Run, wish: Wish, device: str) -> Result:
    """Test the models of a run on meta-test classes; the result is also appended to its ``test.jsonl``.

    Each seed is tested on its own stream of test tasks, and the tasks of all seeds are pooled.

    Raises:
        RecipeError: the wish does not fit the method (its way, its norm, its inner steps).
    """
    seeds, last_rows = run.info["seeds"], _last_rows(run)
    first_of_groups = [last_rows[group[0]] for group in run.info["groups"] if group[0] in last_rows]
    result = _tested(
        run.name,
        parse_recipe(run.recipe_text),
        dict(zip(seeds, trained_methods(run, wish.weights, device))),
        wish,
        device,
        weights=(wish.weights, "best"),
        updates=min((last_rows[seed]["update"] if seed in last_rows else 0 for seed in seeds), default=0),
        seconds=sum(row["seconds"] for row in first_of_groups),
    )
    append_text(run.folder / "test.jsonl", json.dumps(dataclasses.asdict(result)) + "\n")
    return result


def test_recipe(settings: Namespace, wish: Wish, device: str, *, name: str, seed: int = 0) -> Result:
    """Test a recipe that needs no training: of a method that learns nothing, or of no updates.

    Args:
        settings: a parsed recipe.
        wish: what to do otherwise.
        device: where to test.
        name: of the recipe.
        seed: of the test tasks, and of weights that are drawn.

    Raises:
        RecipeError: the recipe has to be trained, or the wish does not fit the method.
    """
    recipe = instantiate(settings)
    (method,) = initial_methods(lambda: instantiate(settings), [seed])
    if recipe.train.updates and any(parameter.requires_grad for parameter in method.parameters()):
        raise RecipeError(
            f"{name} has to be trained before it is tested: give it to `quickstudy train`, and the folder of that run "
            "to `quickstudy test`"
        )
    weights = "initial" if recipe.pretrained is None else "pretrained"
    methods = {seed: method.to(device, recipe.train.dtype)}
    return _tested(name, settings, methods, wish, device, weights=(weights, weights), updates=0, seconds=0)


def _tested(
    name: str,
    settings: Namespace,
    methods: Mapping[int, Method],
    wish: Wish,
    device: str,
    *,
    weights: tuple[str, str],
    updates: int,
    seconds: float,
) -> Result:
    """Test methods, one for each seed.

    Args:
        name, settings: of their recipe.
        methods, wish, device: what to test, how and where.
        weights: what they are, and what the recipe says.
        updates: of the training behind them.
        seconds: that it took.
    """
    make_current(device)
    recipe, seeds, wish = instantiate(settings), [*methods], wish.filled()
    on = wish.on or recipe.dataset.name
    own = on == recipe.dataset.name
    dataset = recipe.dataset if own else dataset_entry(on).load()()
    shape = _shape(recipe.test_task, wish)
    tasks = recipe.test.tasks if wish.tasks is None else wish.tasks
    first = methods[seeds[0]]
    as_trained = {"norm": first.norm, "steps": first.test_steps}
    for method in methods.values():
        if wish.norm:
            method.set_norm(wish.norm)
        if wish.steps is not None:
            method.set_test_steps(wish.steps)
    start = time.monotonic()
    scores, images = test_methods(methods, recipe, dataset, shape, tasks, device)
    pooled = [score for own_scores in scores.values() for score in own_scores]
    setting = {
        **dataclasses.asdict(shape),
        "tested_on": dataset.name,
        "tasks": tasks,
        "norm": first.norm,
        "steps": first.test_steps,
        "weights": weights[0],
    }
    planned = {
        **dataclasses.asdict(recipe.test_task),
        "tested_on": recipe.dataset.name,
        "tasks": recipe.test.tasks,
        "weights": weights[1],
        **as_trained,
    }
    changed = {key: new for key, new in setting.items() if new != planned[key]}
    if images is not None:
        changed["images"] = images
    return Result(
        recipe=name,
        metric=dataset.metric,
        score=estimate(pooled),
        per_seed={seed: estimate(own_scores).mean for seed, own_scores in scores.items()},
        setting={
            "trained_on": recipe.dataset.name,
            **setting,
            "tasks": len(pooled),
            "seeds": len(seeds),
            "updates": updates,
            "planned_updates": recipe.train.updates,
            "differs": differs(name, settings, changed),
            "train_seconds": round(seconds),
            "train_tasks_per_second": f"{updates * recipe.train.meta_batch * len(seeds) / seconds:.3g}"
            if seconds
            else "",
            "test_seconds": round(time.monotonic() - start, 1),
        },
        environment=environment(device),
    )


def test_methods(
    methods: Mapping[int, Method], recipe: Recipe, dataset: Dataset, shape: TaskShape, tasks: int, device: str
) -> tuple[dict[int, list[float]], str | None]:
    """Return the scores of methods on meta-test tasks, and in words how these had to be changed for them, if they had.

    Images of another dataset than the recipe's are brought to the colours and the size that the method reads.

    Args:
        methods: built, one for each seed.
        recipe: that they were trained by.
        dataset: to test on.
        shape: of the test tasks.
        tasks: how many, for each seed.
        device: where the methods are.

    Raises:
        RecipeError: they cannot take such tasks, or there are none.
    """
    if tasks < 1:
        raise RecipeError(f"a test needs at least one task, not {tasks}")
    if dataset.metric != recipe.dataset.metric:
        raise RecipeError(
            f"the score on {dataset.name} is {dataset.metric}, and that on {recipe.dataset.name}, which the method is "
            f"for, {recipe.dataset.metric}: choose another dataset"
        )
    for seed, method in methods.items():
        calibrate(method, recipe, seed, device)
    number, first = next(iter(methods.items()))
    source = dataset.split("test").to(device)
    given = example = source.tasks(shape, 0, 1, seed=number)[0]
    if dataset is not recipe.dataset and given.support_x.ndim == 4:
        source = reader_of(first.input_shape, recipe.dataset).tasks(source)
        example = source.tasks(shape, 0, 1, seed=number)[0]
    first.check(example)
    measured = evaluate_each(methods, recipe, source, shape, tasks)
    was, now = ("×".join(map(str, task.support_x.shape[1:])) for task in (given, example))
    return {seed: own[:, 1].tolist() for seed, own in measured.items()}, None if was == now else f"of {was} as {now}"


def evaluate_each(
    methods: Mapping[int, Method],
    recipe: Recipe,
    source: TaskSource,
    shape: TaskShape,
    tasks: int,
    measure: TaskFunction = scores,
) -> dict[int, Tensor]:
    """Return the measure of every task for each method, ``[tasks, ...]``; all are batched as is fastest for the first.

    Args:
        methods: built, one for each seed, on whose stream of tasks it is evaluated.
        recipe: that they were trained by.
        source: where the tasks come from.
        shape: their size.
        tasks: how many, for each seed.
        measure: what to compute of each task, by default its query loss and its score.
    """
    measured, chunk = {}, None
    for seed, method in methods.items():
        result, chunk = evaluate(
            Models([method]),
            source,
            shape,
            [seed],
            tasks=tasks,
            chunk=chunk,
            bound=recipe.train.chunk,
            cast=recipe.train.cast,
            measure=measure,
        )
        measured[seed] = result[0]
    return measured


def calibrate(method: Method, recipe: Recipe, seed: int, device: str) -> None:
    """Show a method on a device the meta-training tasks that it asks for before a test, of the stream of a seed."""
    if method.calibration_tasks:
        source, count = recipe.dataset.split("train").to(device), method.calibration_tasks
        tasks = (source.tasks(recipe.train.task, number, number + 1, seed=seed)[0] for number in range(count))
        method.eval()
        with torch.no_grad():
            method.calibrate(recipe.train.cast(task) for task in tasks)


def _last_rows(run: Run) -> dict[int, dict[str, Any]]:
    """Return the last row of metrics of each seed."""
    return {row["seed"]: row for row in run.metrics()}


def kept_result(run: Run, wish: Wish = Wish()) -> Result | None:
    """Return the last result of :func:`test_run` with a wish, for the weights that a run has now, if there is one."""
    asked = {key: value for key, value in dataclasses.asdict(wish.filled()).items() if value is not None}
    if "on" in asked:
        asked["tested_on"] = asked.pop("on")
    if "tasks" in asked:
        asked["tasks"] *= len(run.info["seeds"])
    may_differ = {*asked, "images"}
    path = run.folder / "test.jsonl"
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    done = min((row["update"] for row in _last_rows(run).values()), default=0)
    for row in reversed(kept):
        setting = row["setting"]
        differing = {part.split()[1] for part in setting["differs"].split("; ") if part.startswith("test ")}
        as_wished = differing <= may_differ and all(setting[key] == value for key, value in asked.items())
        if as_wished and setting["updates"] >= done:
            per_seed = {int(seed): value for seed, value in row["per_seed"].items()}
            return Result(**{**row, "score": Estimate(**row["score"]), "per_seed": per_seed})
    return None


_OF_NO_INFLUENCE = (
    *("train.batching", "train.chunk", "train.together", "train.trace", "validation.keep"),
    *("dataset.init_args.root", "method.init_args.compiled"),
)
"""Settings that change how something is computed, and not what."""


def differs(name: str, settings: Namespace, tested: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Say in which settings a training, and a test, are not those of the recipe they are named after."""
    changed = {}
    if name in recipe_names():
        recipe = parse_recipe(recipe_text(name))
        changed = {key: new for key, (_, new) in differences(recipe, settings).items() if key not in _OF_NO_INFLUENCE}
    changed |= {f"test {key}": value for key, value in tested.items()}
    return "; ".join(f"{key} {value}" for key, value in changed.items())


def _shape(shape: TaskShape, wish: Wish) -> TaskShape:
    if wish.way is not None and shape.way is None:
        raise RecipeError("a regression task has no classes; leave --way out")
    asked = {key: getattr(wish, key) for key in ("way", "shot", "queries") if getattr(wish, key) is not None}
    return dataclasses.replace(shape, **asked)


def append_measured(path: Path, result: Result) -> None:
    """Append a result to a CSV file of measured scores, which is created if it is not there.

    Raises:
        RecipeError: the file has other columns.
        FileError: it cannot be written.
    """
    row = result.row()
    header = ",".join(row) + "\n"
    if not path.exists():
        with suppress(FileExistsError):  # of two processes one makes the file, and both append
            create_text(path, header)
    text = path.read_text(encoding="utf-8")
    if not text:
        append_text(path, header)
    elif next(csv.reader([text.splitlines()[0]])) != list(row):
        raise RecipeError(f"{path} has other columns than the results of this version; choose another file")
    append_text(path, csv_text([row], header=False))


def has_recipe(path: Path, name: str) -> bool:
    """Tell whether a CSV file of measured scores has a score of a recipe in its own setting."""
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
    return any(row["recipe"] == name and not row["differs"] for row in rows)


def is_recorded(path: Path, result: Result) -> bool:
    """Tell whether a CSV file of measured scores has the row of a result."""
    return path.exists() and csv_text([result.row()], header=False) in path.read_text(encoding="utf-8")
