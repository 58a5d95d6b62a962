"""``quickstudy reproduce``."""

from __future__ import annotations

import signal
from pathlib import Path

from quickstudy.commands import numbers_of, pick_device


def reproduce(
    filter: str = "",
    seeds: str = "0,1,2",
    budget: float | None = None,
    jobs: int = 1,
    missing: bool = False,
    partial: bool = False,
    device: str = "auto",
    runs: Path = Path("runs"),
    record: Path = Path("results/measured.csv"),
) -> int | None:
    """Train recipes to their full schedule, test them, and put the results beside the published ones.

    Those with numbers published on other datasets are tested on these too, where they are on this machine. What is done
    already is not done again, and what was stopped is continued. Each result is appended to RECORD, and in the end the
    figures beside it and the table of README.md are made anew.

    Args:
        filter: names of recipes, or beginnings of words in them (as of `quickstudy recipes`), with commas between
            them; they run in this order. All recipes if not given.
        seeds: one model is trained for each, together in one job where that is faster.
        budget: minutes after which all stop, with their state saved; the next call continues.
        jobs: trainings at a time, each a process; the cores are shared out among them, unless OMP_NUM_THREADS is set.
        missing: only recipes of which RECORD has no result of the full schedule.
        partial: when the budget is spent, test and record also what has not finished, which takes some time more.
        device: cpu, cuda, cuda:1, mps; auto is a GPU if there is one.
        runs: folder of the runs.
        record: CSV file of the results.
    """
    from rich.console import Console

    from quickstudy.analysis.report import write_report
    from quickstudy.analysis.results import cut_short, measured_of, measured_rows, published_elsewhere
    from quickstudy.engine.recipe import matching_recipes
    from quickstudy.engine.reproduce import Row
    from quickstudy.engine.reproduce import reproduce as run_all
    from quickstudy.engine.run import Run

    names = list(dict.fromkeys(name for part in filter.split(",") for name in matching_recipes(part.strip())))
    if missing:
        found = measured_rows(record)
        names = [name for name in names if name not in found or cut_short(found[name])]
    numbers = numbers_of(seeds, "--seeds")
    rows = [Row(name, Run(runs / name), numbers, published_elsewhere(name)) for name in names]
    console = Console()

    def tell(row: Row) -> None:
        score = measured_of(row.recipe, record) if row.stage == "done" else None
        text = {"train": f"training, see {row.log}", "test": "testing"}.get(row.stage, row.stage)
        console.print(f"{row.recipe}   {score or row.message or text}", soft_wrap=True, highlight=False)

    for row in rows:
        if row.stage in ("done", "no data"):
            tell(row)
    where, seconds = pick_device(device), None if budget is None else 60 * budget
    interrupted = run_all(rows, record, device=where, jobs=jobs, seconds=seconds, partial=partial, tell=tell)
    for path in write_report(record, [row.run for row in rows if row.stage == "done" and row.trains]):
        console.print(str(path), soft_wrap=True, highlight=False)
    cut = [row for row in rows if row.stage == "done" and row.trains and not row.run.finished]
    left = [row for row in rows if row.stage in ("train", "test")] + cut
    if left:
        console.print(f"{len(left)} of {len(rows)} to be continued by the same command", highlight=False)
    if interrupted:
        return 128 + signal.SIGINT
    return 1 if any(row.stage == "failed" for row in rows) else None
