"""TensorBoard, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quickstudy.engine.train import Listener


class Board:
    """Writes what a training tells into TensorBoard's files, one line of curves a seed.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._new = SummaryWriter
        self._folder = folder / "tensorboard"
        self._writers: dict[int, Any] = {}

    def step(self, updates: int, loss: Callable[[], float]) -> None:
        """Ignore a single update."""

    def validated(self, rows: list[dict[str, Any]], best: list[float]) -> None:
        """Write every number of a validation."""
        for row in rows:
            seed = row["seed"]
            if seed not in self._writers:
                self._writers[seed] = self._new(str(self._folder / f"seed-{seed}"), purge_step=row["update"])
            writer = self._writers[seed]
            for name in ("train_loss", "val_loss", "val_score", "best_score", "lr"):
                writer.add_scalar(name, row[name], row["update"])
            writer.flush()


class Several:
    """Tells several listeners what it is told."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners

    def step(self, updates: int, loss: Callable[[], float]) -> None:
        for listener in self.listeners:
            listener.step(updates, loss)

    def validated(self, rows: list[dict[str, Any]], best: list[float]) -> None:
        for listener in self.listeners:
            listener.validated(rows, best)
