"""Recipes run to their full schedule, each in a process of its own, until all are done or the time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from quickstudy.data.base import Dataset
from quickstudy.data.registry import dataset_entry
from quickstudy.engine.recipe import instantiate, parse_recipe, recipe_text
from quickstudy.engine.run import Run
from quickstudy.engine.testing import Wish, append_measured, has_recipe, is_recorded, kept_result
from quickstudy.engine.train import caught_signals
from quickstudy.errors import QuickstudyError, RecipeError

SECONDS_TO_STOP = 120.0
"""How long a training may take to finish its update and save its state, before it is killed."""

Stage = Literal["train", "test", "done", "failed", "no data"]


class Row:
    """One recipe on its way to a measured number.

    Args:
        recipe: its name.
        run: where its run is kept.
        seeds: one model is trained for each; a run that has begun keeps its own.
        elsewhere: names of other datasets to test it on as well, those of them that are on this machine.

    Attributes:
        stage: what is to be done next, or how it ended.
        message: why it ended so.
    """

    def __init__(self, recipe: str, run: Run, seeds: Sequence[int], elsewhere: Sequence[str] = ()) -> None:
        self.recipe, self.run, self.seeds = recipe, run, seeds
        here = [on for on in elsewhere if not _missing(dataset_entry(on).load()())]
        self._everywhere: list[str | None] = [None, *here]  # datasets that it is to be tested on, its own first
        self._tests = [*self._everywhere]  # those that are left
        self.message = ""
        made = instantiate(parse_recipe(recipe_text(recipe)))
        self.trains = made.train.updates > 0
        self.stage: Stage = "train"
        missing = _missing(made.dataset)
        if missing:
            self.stage, self.message = "no data", f"{made.dataset.name}: {missing}; `quickstudy data list` tells more"
        elif not self.trains:
            self.stage = "test"
        elif run.exists() and run.finished:
            self._tests = [on for on in self._tests if kept_result(run, Wish(on=on)) is None]
            self.stage = "test" if self._tests else "done"

    @property
    def log(self) -> Path:
        """The file that its processes write to."""
        return self.run.folder.with_name(f"{self.run.folder.name}.log")

    @property
    def updates(self) -> int:
        """Updates after which all of its seeds were validated, or more."""
        if not self.run.exists():
            return 0
        last = {row["seed"]: row["update"] for row in self.run.metrics()}
        return min(last.get(seed, 0) for seed in self.run.info["seeds"])

    def record_kept(self, record: Path) -> None:
        """Record what was tested before, if the record has it not."""
        for on in self._everywhere:
            result = kept_result(self.run, Wish(on=on))
            if result is not None and not is_recorded(record, result):
                append_measured(record, result)

    def command(self, device: str, record: Path) -> list[str]:
        """Return the arguments of ``quickstudy`` that do what is to be done next."""
        on = ["--device", device]
        if self.stage == "test":
            there = [] if self._tests[0] is None else ["--on", self._tests[0]]
            return ["test", str(self.run.folder) if self.trains else self.recipe, *there, "--record", str(record), *on]
        if self.run.exists():
            return ["train", str(self.run.folder), "--resume", *on]
        return ["train", self.recipe, "--seeds", ",".join(map(str, self.seeds)), "--out", str(self.run.folder), *on]

    def ended(self, status: int) -> None:
        """Take note of how the process of a stage ended."""
        if status == 0:
            if self.stage == "test":
                self._tests.pop(0)
            self.stage = "test" if self._tests else "done"
        else:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            self.stage, self.message = "failed", lines[-1] if lines else f"exit status {status}"


def _missing(dataset: Dataset) -> str:
    """Say why a dataset cannot be used here; nothing if it can."""
    try:
        return "not on this machine" if dataset.location() is None else ""
    except QuickstudyError as error:
        return str(error)


def reproduce(
    rows: Sequence[Row],
    record: Path,
    *,
    device: str,
    jobs: int = 1,
    seconds: float | None = None,
    partial: bool = False,
    tell: Callable[[Row], None] = lambda row: None,
) -> bool:
    """Train and test the rows; how far each has come is in its ``stage``.

    When the time is up, or a signal comes, trainings finish their update and save their state; the next call continues
    them. What a row's processes print goes to its log.

    Args:
        rows: what to run, in this order.
        record: the CSV file to which results are appended.
        device: where to train and test.
        jobs: processes at a time; the cores are shared out among them, unless ``OMP_NUM_THREADS`` is set.
        seconds: after which all stop; no limit if ``None``.
        partial: then also test what has had no time to finish, with the best weights it has.
        tell: called whenever a stage of a row begins, or the last one ends.

    Returns:
        Whether it was stopped by a signal.

    Raises:
        RecipeError: a process cannot be started with these settings.
    """
    if jobs < 1:
        raise RecipeError(f"--jobs is at least 1, not {jobs}")
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}

    def start(row: Row) -> subprocess.Popen:
        tell(row)
        row.log.parent.mkdir(parents=True, exist_ok=True)
        with open(row.log, "a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "quickstudy", *row.command(device, record)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches this process alone, which then stops the others
            )

    def work(waiting: list[Row], goes_on: Callable[[], bool]) -> None:
        running: dict[Row, subprocess.Popen] = {}
        try:
            while (waiting or running) and goes_on():
                while waiting and len(running) < jobs:
                    running[waiting[0]] = start(waiting[0])
                    waiting.pop(0)
                time.sleep(0.2)
                for row, process in [*running.items()]:
                    if process.poll() is not None:
                        del running[row]
                        row.ended(process.returncode)
                        if row.stage == "test":
                            waiting.insert(0, row)
                        else:
                            tell(row)
        finally:
            _stop([*running.values()])

    for row in rows:
        if row.stage == "done":
            row.record_kept(record)
        elif not row.trains and row.stage == "test" and has_recipe(record, row.recipe):
            row.stage = "done"
    with caught_signals() as received:
        end = float("inf") if seconds is None else time.monotonic() + seconds
        work([row for row in rows if row.stage in ("train", "test")], lambda: time.monotonic() < end and not received)
        if partial and not received:
            for row in rows:
                if row.stage == "train" and row.updates:
                    row.stage = "test"
            work([row for row in rows if row.stage == "test"], lambda: not received)
        return bool(received)


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """Ask processes to stop, and kill those that do not."""
    for process in processes:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    end = time.monotonic() + SECONDS_TO_STOP
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
