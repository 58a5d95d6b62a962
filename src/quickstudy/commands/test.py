"""``quickstudy test``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from quickstudy.commands import pick_device


def test(
    run: Path,
    on: str | None = None,
    tasks: int | None = None,
    queries: int | None = None,
    way: int | None = None,
    shot: int | None = None,
    steps: int | None = None,
    norm: Literal["batch", "support", "joint"] | None = None,
    weights: Literal["best", "last"] = "best",
    device: str = "auto",
    record: Path | None = None,
) -> None:
    """Test a run on the meta-test classes of its dataset, or of another; print and keep the result.

    Args:
        run: folder of a run.
        on: another dataset, by name (`quickstudy data list`): the score across domains.
        tasks: test tasks of each seed; those of the recipe if not given, as are the settings below.
        queries: query examples of each class.
        way: classes of a task.
        shot: support examples of each class.
        steps: inner steps, of methods that take some.
        norm: whose statistics normalise queries.
        weights: of the best validation, or the last.
        device: cpu, cuda, cuda:1, mps; auto is a GPU if there is one.
        record: append the result to this CSV file, such as results/measured.csv.
    """
    from rich.console import Console

    from quickstudy.engine.run import Run
    from quickstudy.engine.testing import Wish, append_measured, test_run

    result = test_run(
        Run.open(run),
        Wish(on=on, tasks=tasks, way=way, shot=shot, queries=queries, steps=steps, norm=norm, weights=weights),
        pick_device(device),
    )
    console = Console()
    console.print(result.text(), soft_wrap=True, highlight=False)
    if record is not None:
        append_measured(record, result)
        console.print(f"recorded in {record}", highlight=False)
