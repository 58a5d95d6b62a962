"""What a training shows while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A progress bar with rate, loss, last and best validation; plain lines where there is no terminal.

    Args:
        title: shown in front, such as the name of the recipe.
        updates: how many there will be, for each group of seeds.
        tasks: tasks of one update of one seed.
        metric: ``accuracy`` or ``mse``.
        console: where to write.
        unit: what the rate counts, if not tasks.
    """

    def __init__(
        self, title: str, updates: int, tasks: int, metric: str, console: Console, unit: str = "tasks"
    ) -> None:
        self.console = console
        self.metric = metric
        self.tasks = tasks
        self.unit = unit
        self.updates = updates
        self.title = title
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("updates · {task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=updates, status="")
        self._validation = ""
        self._loss = ""
        self._seeds = 1
        self._since: tuple[float, int] | None = None
        self._rate = 0.0
        self._shown = 0.0

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, updates: int, loss: Callable[[], float]) -> None:
        """Take note of an update; the picture is renewed a few times a second."""
        now = time.monotonic()
        if self._since is None or updates < self._since[1]:
            self._since = (now, updates)
        if now - self._shown < 0.25 and updates != self.updates:
            return
        started, first = self._since
        if now > started:
            self._rate = (updates - first) * self.tasks * self._seeds / (now - started)
        self._loss = f"loss {loss():.3g}"
        self._shown = now
        self._show(updates)

    def validated(self, rows: list[dict[str, Any]], best: list[float]) -> None:
        """Show the scores of a validation, averaged over the seeds of the group."""
        self._seeds = len(rows)
        losses = [row["train_loss"] for row in rows if row["train_loss"] == row["train_loss"]]  # none before training
        self._loss = f"loss {sum(losses) / len(losses):.3g}" if losses else ""
        self._rate = self._rate if losses else 0.0
        mean = sum(row["val_score"] for row in rows) / len(rows)
        top = sum(best) / len(best)
        self._validation = f"validation {self._score(mean)} · best {self._score(top)}"
        updates = rows[0]["update"]
        self._show(updates)
        self._since = None  # time spent on validation is not the training's
        if not self.console.is_terminal:
            seeds = ",".join(str(row["seed"]) for row in rows)
            line = f"{self.title} · seed {seeds} · {updates:,}/{self.updates:,} updates · {self._status()}"
            self.console.print(line, soft_wrap=True, highlight=False)

    def _score(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.metric == "accuracy" else f"{value:.4g}"

    def _status(self) -> str:
        rate = f"{self._rate:,.0f} {self.unit}/s" if self._rate else ""
        return " · ".join(part for part in (rate, self._loss, self._validation) if part)

    def _show(self, updates: int) -> None:
        self._bar.update(self._task, completed=updates, status=self._status())
