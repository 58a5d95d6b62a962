"""``quickstudy data list|get|prepare|show``."""

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
    """Download a dataset, verify its checksum, and pack its images; a broken download is continued.

    Args:
        name: of the dataset (`quickstudy data list`).
    """
    from quickstudy.data.paths import download_folder
    from quickstudy.data.registry import dataset_entry

    kind = dataset_entry(name).load()
    kind.get()
    dataset = kind()
    if dataset.store is not None:
        dataset.prepare()
    print(f"{name}: {dataset.location() or f'in {download_folder(name)}'}")


def prepare(
    name: str,
    from_: Path | None = None,
    image_size: int | None = None,
    resize: Literal["squash", "crop"] | None = None,
) -> None:
    """Pack the images of your own copy of a dataset, whichever of the known layouts it has.

    The copy is remembered: whatever asks for the dataset, in this size or another, is served from it. Images that
    cannot be read are left out and named. A stopped command is continued by the next.

    Args:
        name: of the dataset (`quickstudy data list`).
        from_: the folder, or the archive, of your copy; where the dataset is looked for anyway, if not given.
        image_size: height and width to pack, in pixels, if not those of the dataset.
        resize: how photographs become square, whatever their aspect or by cutting off what is too long.
    """
    import inspect

    from quickstudy.data.paths import remember_place, remembered_place
    from quickstudy.data.registry import dataset_entry
    from quickstudy.data.store import read_index
    from quickstudy.errors import DataError

    kind = dataset_entry(name).load()
    given = {"image_size": image_size, "resize": resize}
    settings = {key: value for key, value in given.items() if value is not None}
    known = inspect.signature(kind).parameters
    wrong = [key for key in settings if key not in known]
    if wrong:
        raise DataError(f"{name} has no {wrong[0]} to choose: leave --{wrong[0]} out")
    dataset = kind(**settings)
    if dataset.store is None:
        raise DataError(f"{name} has no images to pack; to get it: {dataset_entry(name).how}")
    place = from_ and from_.expanduser().resolve()
    if place and "root" not in known:
        raise DataError(f"{name} is made here, not read from a copy: leave --from out")
    if place and dataset.store.exists() and remembered_place(name) != place:
        raise DataError(f"{name} is packed already, in {dataset.store}: remove that folder to pack it anew")
    copy = kind(**settings, **{"root": str(place)}) if place else dataset
    if copy.location() is None:
        copy.prepare()  # says what was looked for
    if place:
        remember_place(name, place)
    print(f"{name}: {dataset.location()}")
    dataset.prepare(skip=True)
    folder = dataset.store
    index = read_index(folder)
    print(f"{name}: {index['offsets'][-1]:,} images of {len(index['names']):,} classes, packed in {folder}")
    unreadable = index.get("unreadable", [])
    if unreadable:
        print(f"{len(unreadable):,} images cannot be read and were left out:", *unreadable, sep="\n  ")


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
