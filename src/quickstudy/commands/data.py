"""``quickstudy data list|get|show``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def list_datasets() -> None:
    """List the datasets: what they are, where they are on this machine, and how to get them."""
    from quickstudy.data.registry import DATASETS

    for entry in DATASETS.values():
        facts = {
            "": entry.description,
            "classes": entry.classes,
            "size": entry.size,
            "here": entry.load()().location() or "no",
            "get it": entry.how,
            "licence": entry.licence,
            "from": entry.homepage,
            "cite": entry.citation,
        }
        print(entry.name)
        for key, value in facts.items():
            if value:
                print(f"  {key:<8}{value}" if key else f"  {value}")
        print()


def get(name: str) -> None:
    """Download a dataset, verify its checksum, and pack its images.

    Args:
        name: of the dataset (`quickstudy data list`).
    """
    from quickstudy.data.registry import dataset_entry

    kind = dataset_entry(name).load()
    kind.get()
    kind().prepare()
    print(f"{name}: {kind().location()}")


def show(
    name: str,
    split: Literal["train", "val", "test"] = "train",
    out: Path | None = None,
    rows: int = 20,
    columns: int = 20,
    zoom: int = 1,
) -> None:
    """Draw a contact sheet of a dataset as PNG: a row for each of some classes; of sine waves, some tasks.

    Args:
        name: of the dataset (`quickstudy data list`).
        split: classes for meta-training, meta-validation or meta-test.
        out: file to write; NAME-SPLIT.png if not given.
        rows: classes at most.
        columns: images of a class at most.
        zoom: how many times as large as they are.
    """
    from quickstudy.data import ImageClasses, contact_sheet
    from quickstudy.data.registry import dataset_entry
    from quickstudy.task import TaskShape

    path = out or Path(f"{name}-{split}.png")
    source = dataset_entry(name).load()().split(split)
    if isinstance(source, ImageClasses):
        contact_sheet(source, path, rows=rows, columns=columns, zoom=zoom)
        print(f"{path}   {len(source):,} classes, {int(source.counts.sum()):,} images")
    else:
        from quickstudy.analysis import draw_waves

        draw_waves(source.tasks(TaskShape(None, 10, 100), 0, 12, seed=0), path, f"{name}: 12 tasks of ten points")
        print(path)
