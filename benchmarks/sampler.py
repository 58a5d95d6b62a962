"""The share of a training step that the sampler takes; the target is under 2 %."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jobs
import torch
from jobs import Job
from jsonargparse import auto_cli
from report import load, machine, publish

from quickstudy.data.images import BLOCK
from quickstudy.task import Task

TARGET_PERCENT = 2.0
FRESH_BLOCKS = 9


@dataclass
class Share:
    """What the sampler takes of one job.

    Args:
        job: its name.
        tasks: of an update.
        sampler_ms: of the sampler, for an update.
        of_which_draw_ms: the part of an update in drawing the indices of a block of tasks.
        update_ms: of the update as a whole.
        percent: the sampler's share.
        chunk: tasks at a time (0: a loop).
    """

    job: str
    tasks: int
    sampler_ms: float
    of_which_draw_ms: float
    update_ms: float
    percent: float
    chunk: int


def share(job: Job, seconds: float) -> Share:
    """Measure the sampler inside real updates, where the caches are as cold as they are in a training.

    Indices are drawn for a block of tasks at a time, so most updates draw none: that is measured on fresh blocks,
    and its part for one update is added.
    """
    group = jobs.group(job)
    jobs.touch(group)
    size = group.recipe.train.meta_batch
    sample = group.batch
    samples: list[float] = []
    updates: list[float] = []

    def watched(update: int) -> Task:
        start = time.perf_counter()
        batch = sample(update)
        samples.append(time.perf_counter() - start)
        return batch

    for _ in range(3):
        group.update()
    group.batch = watched  # type: ignore[method-assign]
    while sum(updates) < seconds or len(updates) < 3:
        start = time.perf_counter()
        group.update()
        updates.append(time.perf_counter() - start)

    extra = []
    for number in range(FRESH_BLOCKS):
        first = (1000 + number) * BLOCK  # update whose first task begins a block, far from all others
        with_draw, without = [_seconds(sample, first + offset) for offset in (0, 0)]
        extra.append(with_draw - without)
    draw = max(0.0, statistics.median(extra)) * size / BLOCK
    typical, update = statistics.median(samples), statistics.median(updates)
    return Share(
        job=job.name,
        tasks=size,
        sampler_ms=(typical + draw) * 1e3,
        of_which_draw_ms=draw * 1e3,
        update_ms=(update + draw) * 1e3,
        percent=100 * (typical + draw) / (update + draw),
        chunk=group.chunks["train"],
    )


def _seconds(sample, update: int) -> float:
    start = time.perf_counter()
    sample(update)
    return time.perf_counter() - start


def main(
    threads: int = 2,
    seconds: float = 1.0,
    only: str = "",
    out: Path | None = None,
    markdown: Path | None = None,
) -> None:
    """Measure the share of a training step that the sampler takes.

    Args:
        threads: of PyTorch.
        seconds: how long the updates of a job are watched.
        only: regular expression; only jobs whose names match.
        out: CSV file to write.
        markdown: Markdown file to write.
    """
    torch.set_num_threads(threads)
    facts = {**machine(), "images": jobs.images_from(), "load average before": load()}
    shares = [share(job, seconds) for job in jobs.jobs_matching(only)]
    header = ["job", "tasks", "sampler, ms", "of which draw, ms", "update, ms", "share", f"under {TARGET_PERCENT:g} %"]
    cells = [
        [
            one.job,
            str(one.tasks),
            f"{one.sampler_ms:.3f}",
            f"{one.of_which_draw_ms:.3f}",
            f"{one.update_ms:.2f}",
            f"{one.percent:.2f} %",
            "met" if one.percent < TARGET_PERCENT else "missed",
        ]
        for one in shares
    ]
    publish("The sampler's share of an update", header, cells, [asdict(one) for one in shares], facts, out, markdown)


if __name__ == "__main__":
    auto_cli(main)
