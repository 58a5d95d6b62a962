"""Which classes are to train, to validate and to test on: as published, as drawn, as a user says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from quickstudy.data.base import SPLITS, Split, generator
from quickstudy.errors import DataError
from quickstudy.files import write_text

STREAM = 0x73706C6974
"""Sets the draw of a split apart from all others of the same seed."""

SHARES = (0.6, 0.2, 0.2)
"""Of the classes that are drawn to train, to validate and to test on."""


@cache
def published_split(title: str) -> dict[str, Split]:
    """Return the split of each class of a dataset, from the list of that title that comes with the library."""
    text = (resources.files("quickstudy.data") / "splits" / f"{title}.json").read_text(encoding="utf-8")
    names = json.loads(text)
    return {name: split for split in SPLITS for name in names[split]}


def check_split(
    files: Mapping[Split, Mapping[str, Sequence]], known: Mapping[str, Split], title: str, whose: str
) -> None:
    """Raise unless every class is in one split only, and a known one in its own.

    Args:
        files: of every class of every split.
        known: the published split of each class; others may be in any, but not all are others.
        title: what messages call the data, such as ``"miniimagenet: /data/miniImagenet"``.
        whose: split it is, such as ``"Ravi and Larochelle's"``.

    Raises:
        DataError: the message names the classes.
    """
    placed: list[tuple[Split, str]] = [(split, name) for split in SPLITS for name in files[split]]
    wrong = [f"{split}/{name} belongs in {known[name]}/" for split, name in placed if known.get(name, split) != split]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(
            f"{title} has {len(wrong)} classes in another split than {whose}: {'; '.join(wrong[:5])}{more}; "
            "move their folders"
        )
    if known and not any(name in known for _, name in placed):
        raise DataError(
            f"{title} has none of the {len(known)} classes of {whose} split, such as {next(iter(known))}: it is "
            "another dataset, or has other names for its classes"
        )
    seen: dict[str, Split] = {}
    for split, name in placed:
        if name in seen:
            raise DataError(
                f"{title} has the class {name} in both {seen[name]}/ and {split}/, and no class may be in two splits: "
                "remove one of its folders"
            )
        seen[name] = split


def draw_split(names: Iterable[str], seed: int) -> dict[str, Split]:
    """Return the split of each class, drawn at random: 60 % to train, 20 % to validate and 20 % to test on.

    It depends on the set of names and the seed alone.

    Raises:
        DataError: there are fewer than three classes.
    """
    classes = sorted(set(names))
    if len(classes) < len(SPLITS):
        raise DataError(
            f"{len(classes)} classes cannot be split into those to train, to validate and to test on: add classes"
        )
    generator(seed, STREAM).shuffle(classes)
    held_out = [max(1, round(share * len(classes))) for share in SHARES[1:]]
    sizes = (len(classes) - sum(held_out), *held_out)
    drawn = iter(classes)
    return {next(drawn): split for split, size in zip(SPLITS, sizes, strict=True) for _ in range(size)}


def kept_split(path: Path, names: Iterable[str], seed: int) -> dict[str, Split]:
    """Return the split of each class that a file keeps; if there is no such file, draw one and keep it there.

    So a split once drawn stays what it is: a class that comes or goes is an error, never another draw.

    Args:
        path: JSON, ``{"train": [...], "val": [...], "test": [...]}``.
        names: of the classes there are.
        seed: of a draw.

    Raises:
        DataError: the file cannot be read, or is not of these classes.
        FileError: it cannot be written.
    """
    if not path.exists():
        drawn = draw_split(names, seed)
        listed = {split: sorted(name for name, own in drawn.items() if own == split) for split in SPLITS}
        write_text(path, json.dumps(listed, ensure_ascii=False, indent=2) + "\n")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not JSON ({error})"
        raise DataError(f"cannot read the splits in {path}: {reason}") from error
    return split_of_each(content, names, str(path))


def split_of_each(splits: Any, names: Iterable[str], title: str) -> dict[str, Split]:
    """Return the split of each class.

    Args:
        splits: the classes of each split, ``{"train": [...], "val": [...], "test": [...]}``.
        names: of the classes there are.
        title: what messages call the splits.

    Raises:
        DataError: they are not these, a class is in two splits or in none, or is not there.
    """
    lists = isinstance(splits, Mapping) and all(isinstance(part, list | tuple) for part in splits.values())
    if not lists or {*splits} != {*SPLITS}:
        raise DataError(f'{title}: splits are {{"train": [...], "val": [...], "test": [...]}}, with names of classes')
    found: dict[str, Split] = {}
    for split in SPLITS:
        for name in map(str, splits[split]):
            if name in found:
                raise DataError(f"{title}: the class {name!r} is in both {found[name]} and {split}; it can be in one")
            found[name] = split
    classes = set(names)
    for wrong, what in ((classes - {*found}, "are in none of the splits"), ({*found} - classes, "are not there")):
        if wrong:
            listed = ", ".join(map(repr, sorted(wrong)[:5])) + (" ..." if len(wrong) > 5 else "")
            raise DataError(
                f"{title}: {len(wrong)} classes {what}: {listed}; edit the splits, or remove them to have others drawn"
            )
    return found
