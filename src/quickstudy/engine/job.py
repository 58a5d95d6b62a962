"""A training as a whole: its folder, its seeds together or in turn, its end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from quickstudy.data.reader import picture_size
from quickstudy.engine.recipe import Recipe, differences, dump_recipe, instantiate, parse_recipe
from quickstudy.engine.run import Run, environment
from quickstudy.engine.train import (
    ELEMENTWISE,
    Group,
    Interrupted,
    Listener,
    caught_signals,
    initial_methods,
    train_group,
)
from quickstudy.errors import BackboneError, RecipeError, TrainingError


class Quiet:
    """A listener that says nothing."""

    def step(self, updates: int, loss: Callable[[], float]) -> None:
        """Ignore an update."""

    def validated(self, rows: list[dict[str, Any]], best: list[float]) -> None:
        """Ignore a validation."""


def train(
    settings: Namespace,
    folder: Path,
    *,
    name: str,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Run:
    """Meta-train a recipe with one or several seeds, in one folder.

    Args:
        settings: a parsed recipe (:func:`quickstudy.engine.recipe.parse_recipe`).
        folder: where the run is kept.
        name: of the recipe.
        seeds: one model is trained for each.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        resume: continue what the folder holds.
        overwrite: remove what the folder holds.
        listener: told of every step and validation.

    Returns:
        The finished run.

    Raises:
        RecipeError: the folder holds another training, or resuming was asked with other settings.
        TrainingError: a loss is not finite, or a file cannot be written.
        Interrupted: a signal stopped it, after saving.
    """
    run = Run(folder)
    listener = listener or Quiet()
    seeds = list(dict.fromkeys(seeds))
    text = dump_recipe(settings)
    begun = run.begun(resume=resume, overwrite=overwrite)

    def make() -> Recipe:
        return instantiate(settings)

    def group_of(group_seeds: list[int]) -> Group:
        return Group(make(), group_seeds, initial_methods(make, group_seeds), device)

    kept = run.metrics() if begun else []  # of all seeds, of which some may be grown later than others
    if begun:
        info = run.info
        check_same(run, settings, seeds)
        trained = max((row["update"] for row in kept), default=0)
        if settings.train.updates < trained:
            raise RecipeError(
                f"{run.folder} has trained for {trained} updates already, and is asked for {settings.train.updates}: "
                "more can be added, but none taken away"
            )
    else:
        info = {"recipe": name, "seeds": seeds, "groups": _grouping(group_of, seeds), **environment(device)}
    first = group_of(info["groups"][0])  # may complain of data or network: before anything is written or removed
    shape, way = first.methods[0].input_shape, first.methods[0].way
    info |= {"input_shape": [*shape], "way": way, "picture_size": picture_size(shape, first.recipe.dataset)}
    if not begun:  # also of a run that was only half removed
        run.clear()
    run.write_text("recipe.yaml", text)
    run.write_info(info)

    done: list[dict[str, Any]] = []
    with caught_signals() as received:
        for index, group_seeds in enumerate(info["groups"]):
            group = group_of(group_seeds) if index else first
            state = run.load_state(group_seeds)
            if state is not None:
                group.load(state)
            later = {seed for others in info["groups"][index + 1 :] for seed in others}
            train_group(group, run, listener, done + [row for row in kept if row["seed"] in later], received)
            done += group.history
            if received and index < len(info["groups"]) - 1:
                raise Interrupted(
                    f"stopped by {signal.Signals(received[0]).name} when the seeds {group_seeds} were trained; "
                    f"`quickstudy train {folder} --resume` continues",
                    received[0],
                )
    return run


def _grouping(group_of: Callable[[list[int]], Group], seeds: list[int]) -> list[list[int]]:
    """Decide which seeds train as one job: all, where the network allows it and it is faster, or each alone."""
    together, in_turn = [seeds], [[seed] for seed in seeds]
    if len(seeds) == 1:
        return together
    probe = group_of(seeds[:1])
    train = probe.recipe.train
    optimizer, schedule = type(probe.optimizer).__name__, type(probe.schedule).__name__
    if optimizer not in ELEMENTWISE or schedule == "ReduceLROnPlateau" or train.batching == "loop":
        if train.together:
            raise RecipeError(
                "seeds can train together only under vmap, with an element-wise optimiser and a schedule that does not "
                f"look at scores; here these are {train.batching}, {optimizer} and {schedule}; "
                "leave train.together out"
            )
        return in_turn
    if train.together is not None:
        return together if train.together else in_turn
    try:
        all_at_once = _seconds_per_update(group_of(seeds))
    except (BackboneError, RuntimeError):  # no rule for vmap, or not enough memory
        return in_turn
    return together if all_at_once < len(seeds) * _seconds_per_update(probe) else in_turn


def _seconds_per_update(group: Group) -> float:
    """Return the least time of a few updates (of a group that is thrown away)."""
    group.update()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        float(group.update().mean())
        best = min(best, time.perf_counter() - start)
    return best


def check_same(run: Run, settings: Namespace, seeds: list[int], kind: type = Recipe, *, updates: bool = False) -> None:
    """Raise unless a training has the settings and seeds that it began with.

    Args:
        run: its folder.
        settings, seeds: that are asked for now.
        kind: of the settings.
        updates: also of as many updates; else these may grow.

    Raises:
        RecipeError: it has other seeds.
        TrainingError: it has other settings.
    """
    begun = run.info["seeds"]
    if begun != seeds:
        raise RecipeError(f"{run.folder} was trained with seeds {begun}, not {seeds}; choose another --out")
    changed = [
        f"{key}: {old} became {new}"
        for key, (old, new) in differences(parse_recipe(run.recipe_text, kind=kind), settings).items()
        if updates or key != "train.updates"
    ]
    if changed:
        raise TrainingError(
            f"{run.folder} was trained with other settings ({'; '.join(changed)}); "
            "go on with the same ones, or choose another folder with --out"
        )
