"""How fast are the images of a dataset decoded and packed, and then drawn as tasks from memory?

The targets are those for CIFAR-FS from its archive on two cores.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path

import torch
from jsonargparse import auto_cli
from report import load, machine, publish

from quickstudy.data import ImageClasses, dataset_entry
from quickstudy.data.store import read_index
from quickstudy.task import TaskShape

PACKED_WITHIN_S = 60.0
IMAGES_PER_SECOND = 100_000.0

WAY, SHOT, QUERIES, META_BATCH = 5, 1, 15, 4


@dataclasses.dataclass
class Rate:
    """How fast something is done.

    Args:
        what: in words.
        images: how many.
        seconds: that it takes, on average.
        per_second: images.
        met: whether the target is.
    """

    what: str
    images: int
    seconds: float
    per_second: float
    met: bool


def packing(name: str) -> tuple[Rate, ImageClasses]:
    """Pack a dataset into an empty cache; return also its meta-train classes, with their images in memory."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QUICKSTUDY_CACHE"] = folder
        dataset = dataset_entry(name).load()()
        start = time.perf_counter()
        dataset.prepare()
        seconds = time.perf_counter() - start
        assert dataset.store is not None
        images = read_index(dataset.store)["offsets"][-1]
        source = dataset.split("train")
        assert isinstance(source, ImageClasses)
        source = dataclasses.replace(source, images=source.images.clone())
    return Rate(f"{name}, packed", images, seconds, images / seconds, seconds < PACKED_WITHIN_S), source


def sampling(source: ImageClasses, seconds: float) -> Rate:
    """Draw meta-batches one after the other."""
    begin, drawn = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        source.tasks(TaskShape(WAY, SHOT, QUERIES), drawn, drawn + META_BATCH, seed=0)
        drawn += META_BATCH
    per_task = (time.perf_counter() - begin) / drawn
    images = META_BATCH * WAY * (SHOT + QUERIES)
    rate = WAY * (SHOT + QUERIES) / per_task
    what = f"{META_BATCH} tasks, {WAY}-way {SHOT}-shot with {QUERIES} queries"
    return Rate(what, images, META_BATCH * per_task, rate, rate >= IMAGES_PER_SECOND)


def main(
    dataset: str = "cifar-fs",
    threads: int = 1,
    seconds: float = 3.0,
    out: Path | None = None,
    markdown: Path | None = None,
) -> None:
    """Measure how fast images are packed, and then drawn as tasks.

    Args:
        dataset: that is on this machine (`quickstudy data list`).
        threads: of PyTorch, for the tasks; packing has those that Python chooses.
        seconds: how long tasks are drawn.
        out: CSV file to write.
        markdown: Markdown file to write.
    """
    torch.set_num_threads(threads)
    facts = {**machine(), "threads": threads, "load average before": load()}
    packed, source = packing(dataset)
    rates = [packed, sampling(source, seconds)]
    header = ["what", "images", "seconds", "images/s", "target"]
    cells = [
        [
            rate.what,
            f"{rate.images:,}",
            f"{rate.seconds:.4g}",
            f"{rate.per_second:,.0f}",
            "met" if rate.met else "missed",
        ]
        for rate in rates
    ]
    publish(
        "Images packed, and drawn from memory",
        header,
        cells,
        [dataclasses.asdict(rate) for rate in rates],
        facts,
        out,
        markdown,
    )


if __name__ == "__main__":
    auto_cli(main)
