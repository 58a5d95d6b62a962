"""What a training tells while it runs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from helpers import SINE
from rich.console import Console

from quickstudy import engine
from quickstudy.engine.progress import Bar
from quickstudy.engine.tensorboard import Board, Several


@pytest.mark.parametrize("terminal", [True, False])
def test_bar_shows_rate_loss_and_validation(tmp_path: Path, terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160)
    with Bar("sine/x", 30, 4, "mse", console) as bar:
        engine.train(engine.parse_recipe(SINE), tmp_path / "run", name="sine/x", listener=bar)
    text = out.getvalue()
    for part in ("sine/x", "tasks/s", "loss", "validation", "best"):
        assert part in text
    if not terminal:  # one line a validation, for log files
        assert text.count("\n") == 4
        assert "30/30 updates" in text


def test_tensorboard_gets_every_validation_of_every_seed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    listener = Several(Board(tmp_path / "run"))
    engine.train(engine.parse_recipe(SINE), tmp_path / "run", name="x", seeds=[0, 1], listener=listener)
    for seed in (0, 1):
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / f"seed-{seed}"))
        events.Reload()
        assert [event.step for event in events.Scalars("val_score")] == [0, 10, 20, 30]
