"""Training and testing of what was made in Python: a dataset, a method, an optimiser as objects, and no files.

What is to be stopped and continued, or kept, is named in a recipe instead, and trained into the folder of a run.
"""

from __future__ import annotations

import copy
import dataclasses
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from rich.console import Console

from quickstudy.data.base import Dataset
from quickstudy.data.reader import reader_of
from quickstudy.engine.checkpoint import restore
from quickstudy.engine.evaluate import make_current, pick_device
from quickstudy.engine.progress import Bar
from quickstudy.engine.recipe import Recipe
from quickstudy.engine.statistics import Estimate, estimate
from quickstudy.engine.testing import calibrate, test_methods
from quickstudy.engine.train import (
    Diverged,
    Group,
    Interrupted,
    Listener,
    NotFinite,
    Stopped,
    advance,
    caught_signals,
    initial_methods,
)
from quickstudy.engine.trained import Trained
from quickstudy.errors import RecipeError
from quickstudy.methods import Method
from quickstudy.task import TaskShape


def meta_train(
    recipe: Recipe, *, seed: int = 0, device: str = "auto", listener: Listener | None = None
) -> tuple[Trained, list[dict[str, Any]]]:
    """Meta-train the method of a recipe, in memory.

    Args:
        recipe: its method stays as it is. If it is built, a copy trains on from the weights that it has; if not, from
            weights that ``seed`` draws. Weights that it has before it is built stay what they are: those of most
            networks that are not of :mod:`quickstudy.nn`, and of the LSTM of OPLSTM and MetaLSTM. Call
            ``torch.manual_seed`` before you make these.
        seed: of the tasks, and of all else that is drawn.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; ``auto`` is a GPU if there is one.
        listener: told of every update and validation; a progress bar if not given.

    Returns:
        The trained method, with the weights of the best validation, which :class:`~quickstudy.FewShotClassifier`
        takes for a model; and the history, one row a validation, as in the ``metrics.csv`` of a run.

    Raises:
        RecipeError: the method has no parameters to learn, or there is no such device.
        BackboneError: the network cannot serve (:func:`quickstudy.nn.adopt`).
        DataError: the data is not on this machine, or too little for the tasks.
        Diverged, Interrupted: a loss or a gradient is not finite, or Ctrl-C or a signal came (after the update that it
            came in; a second one ends at once). The exception has what would have been returned, as of the best
            validation until then: ``trained`` and ``history``.
    """
    _check_recipe(recipe)
    device = pick_device(device)
    pretrained = None if recipe.method.built else recipe.pretrained

    def make() -> Recipe:
        return dataclasses.replace(recipe, method=copy.deepcopy(recipe.method).train(), pretrained=pretrained)

    with ExitStack() as stack:
        stack.enter_context(_own_randomness(device))
        (method,) = initial_methods(make, [seed])
        group = Group(recipe, [seed], [method], device)
        if listener is None:
            title, metric = type(method).__name__, recipe.dataset.metric
            listener = stack.enter_context(Bar(title, group.total, recipe.train.meta_batch, metric, Console()))
        listener.validated(group.validate(), group.best_scores)
        early = _train(group, listener)
        restore(method, group.best[0])
        calibrate(method, recipe, seed, device)
    trained = Trained(method.eval(), reader_of(method.input_shape, recipe.dataset))
    if early is None:
        return trained, group.history
    early.trained, early.history = trained, group.history
    raise early


def _train(group: Group, listener: Listener) -> Stopped | None:
    """Train to the end, or return why it ended early."""
    kept = "this exception has what it had come to until then, as its .trained (in a notebook: sys.last_value.trained)"
    with caught_signals() as received:
        try:
            while group.updates < group.total:
                if advance(group, listener):
                    group.check()
                    listener.validated(group.validate(), group.best_scores)
                if received and group.updates < group.total:
                    name = signal.Signals(received[0]).name
                    return Interrupted(
                        f"stopped by {name} after update {group.updates:,} of {group.total:,}; {kept}", received[0]
                    )
        except NotFinite as error:
            early = Diverged(f"{error}; {kept}. A lower learning rate, {error.remedy} may help")
            early.__cause__ = error
            return early
    return None


def meta_test(
    trained: Trained | Method,
    recipe: Recipe,
    *,
    on: Dataset | None = None,
    task: TaskShape | None = None,
    tasks: int | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Estimate:
    """Score a trained method on meta-test tasks.

    Args:
        trained: as of :func:`meta_train`, or a method: one that learns nothing need not be built. Its ``norm`` and
            ``test_steps`` are used, and it stays as it is.
        recipe: that it was trained by.
        on: another dataset to test on, without transforms. Its images get the transforms of the recipe's dataset;
            before, pictures are brought to the colours and the size that the method reads.
        task: size of the test tasks; that of the recipe if not given.
        tasks: how many; as many as the recipe says if not given.
        seed: of the tasks.
        device: as of :func:`meta_train`.

    Returns:
        The mean accuracy (as a fraction) or mean squared error, with its 95 % interval.

    Raises:
        RecipeError: the method cannot take such tasks, or there is no such device.
        DataError: the data is not on this machine, or too little for the tasks.
    """
    _check_recipe(recipe)
    if not isinstance(trained, Trained | Method):
        raise RecipeError(
            "what is tested is a method, or what meta_train returns first (trained, history = meta_train(recipe)), "
            f"not {type(trained).__name__}"
        )
    device = pick_device(device)
    shape, count = task or recipe.test_task, recipe.test.tasks if tasks is None else tasks
    if on is not None and getattr(on, "test_transforms", None):
        raise RecipeError(
            f"the images of {on.name} get the transforms of {recipe.dataset.name}: make it without its own"
        )
    method = copy.deepcopy(trained if isinstance(trained, Method) else trained.method)
    with _own_randomness(device):
        if not method.built:
            method.build(recipe.dataset.split("test").tasks(shape, 0, 1, seed=seed)[0])
            if any(parameter.requires_grad for parameter in method.parameters()):
                raise RecipeError(f"{type(method).__name__} has to be trained before it is tested, by meta_train")
        method.to(device, recipe.train.dtype)
        scores, _ = test_methods({seed: method}, recipe, on or recipe.dataset, shape, count, device)
    return estimate(scores[seed])


def _check_recipe(recipe: Recipe) -> None:
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"a recipe is a quickstudy.Recipe, not {recipe!r}; Recipe.named(NAME) is one of the library's or of a file"
        )


@contextmanager
def _own_randomness(device: str) -> Iterator[None]:
    """Leave the random numbers that the caller will draw as they are."""
    make_current(device)
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        yield
