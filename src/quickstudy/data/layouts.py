"""The ways in which the images of a dataset lie on a disk, and how each is recognised and read."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from quickstudy.data.archive import Member, Source, open_files
from quickstudy.data.base import SPLITS, Split
from quickstudy.data.pictures import Picture
from quickstudy.data.splitting import check_split, published_split
from quickstudy.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Endings of image files, in small letters; other files are ignored."""

Files = Mapping[Split, Mapping[str, Sequence[Picture]]]
"""The pictures of every class of every split."""


@dataclass(frozen=True)
class Layout:
    """One way in which the images of a dataset may lie on a disk.

    Args:
        title: in words, for messages.
        find: returns the folder or file in a place that is laid out so (it may be the place itself), or ``None``.
        files: returns the pictures of every class of every split, given what ``find`` has returned.
    """

    title: str
    find: Callable[[Path], Path | None]
    files: Callable[[Path], Files]


@dataclass(frozen=True)
class Published:
    """A split that was published.

    Args:
        title: of the list that comes with the library, such as ``"miniimagenet-ravi"``.
        whose: it is, for messages, such as ``"Ravi and Larochelle's"``.
    """

    title: str
    whose: str

    def split(self) -> dict[str, Split]:
        """Return the split of each class."""
        return published_split(self.title)

    def apply(self, classes: Mapping[str, Sequence[Picture]], path: Path) -> Files:
        """Return some classes by their published split, in their order; others are left out.

        Raises:
            DataError: one of the published classes is missing.
        """
        known = self.split()
        missing = [name for name in known if name not in classes]
        if missing:
            raise DataError(
                f"{path} lacks {len(missing)} of the {len(known)} classes of {self.whose} split, such as {missing[0]}: "
                "the copy is not complete (add what is missing), or of another dataset"
            )
        files: dict[Split, dict[str, Sequence[Picture]]] = {split: {} for split in SPLITS}
        for name, pictures in classes.items():
            if name in known:
                files[known[name]][name] = pictures
        return files


def places_of(place: Path, names: Iterable[str]) -> Iterator[Path]:
    """Yield what is called so in a place, and the place itself."""
    yield from (place / name for name in names)
    yield place


def split_folders(names: Sequence[str], published: Published | None = None) -> Layout:
    """Class folders that are split: ``{train,val,test}/<class>/<image>``, in a folder or a zip archive.

    Args:
        names: of the folder, or without ``.zip`` of the archive, in a place; the place itself will do too.
        published: which class should be in which split, if that is known.
    """

    def find(place: Path) -> Path | None:
        for path in places_of(place, [f"{name}.zip" for name in names]):
            if path.suffix == ".zip" and path.is_file():
                return path
        return next(
            (path for path in places_of(place, names) if all((path / one).is_dir() for one in SPLITS) and own(path)),
            None,
        )

    def own(path: Path) -> bool:
        """Tell whether the folders are of the published classes, and ``train/`` is not a tree of all of them."""
        return published is None or (
            any((path / split / name).is_dir() for name in published.split() for split in SPLITS)
            and not _is_tree(path / "train", published)
        )

    def files(path: Path) -> Files:
        found: Files
        if path.is_dir():
            found = {split: class_files(path / split) for split in SPLITS}
        else:
            archive = open_files(path)
            found = {split: archive_files(archive, (split,)) for split in SPLITS}
        check_split(found, published.split() if published else {}, str(path), published.whose if published else "")
        return found

    known = f", such as train/{next(iter(published.split()))}" if published else ""
    return Layout(f"train/, val/ and test/ with a folder of images for every class{known}", find, files)


def listed_images(names: Sequence[str], published: Published) -> Layout:
    """All images in ``images/``, and ``{train,val,test}.csv`` with the columns ``filename`` and ``label``.

    Args:
        names: of the folder of these in a place; the place itself will do too.
        published: which class should be in which split.
    """

    def find(place: Path) -> Path | None:
        return next((path for path in places_of(place, names) if (path / "images").is_dir() and lists_in(path)), None)

    def files(path: Path) -> Files:
        found: dict[Split, defaultdict[str, list[Path]]] = {split: defaultdict(list) for split in SPLITS}
        for split, (name, label) in read_lists(path):
            found[split][label].append(path / "images" / name)
        check_split(found, published.split(), str(path), published.whose)
        return found

    return Layout("images/ with train.csv, val.csv and test.csv", find, files)


def imagenet_tree(published: Published, *, listed: bool = False, count: int | None = None, note: str = "") -> Layout:
    """The training images of ILSVRC-2012 as they are unpacked, ``<WordNet id>/*.JPEG``, of all 1,000 classes.

    Args:
        published: the classes to take, and their split.
        listed: take those images alone that ``{train,val,test}.csv`` name, in the tree or in one of the two folders
            above it. There ``n0153282900000005.jpg`` is the fifth image of n01532829 in order of number.
        count: take the first so many images of each class, in order of number; all if not given.
        note: what is to be said of the choice.
    """

    def lists_of(tree: Path) -> Path | None:
        return next((folder for folder in (tree, *tree.parents[:2]) if lists_in(folder)), None)

    def find(place: Path) -> Path | None:
        homes = [place, *(place / name for name in ("imagenet", "ILSVRC2012", "ILSVRC"))]
        below = ("ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "ILSVRC2012_img_train", "train", ".")
        trees = (home / path for home in homes for path in below)
        return next((tree for tree in trees if _is_tree(tree, published) and (lists_of(tree) or not listed)), None)

    def files(tree: Path) -> Files:
        classes = {
            name: sorted(class_images(tree / name), key=lambda path: (len(path.stem), path.stem))
            for name in sorted(published.split())
            if (tree / name).is_dir()
        }
        lists = lists_of(tree) if listed else None
        if lists:
            chosen: defaultdict[str, list[int]] = defaultdict(list)
            for _, (name, label) in read_lists(lists):
                chosen[label].append(_number_of(name, lists))
            for name in classes:
                beyond = max(chosen[name], default=0)
                if beyond > len(classes[name]):
                    raise DataError(
                        f"{tree / name} has {len(classes[name])} images, and {lists} lists number {beyond}: "
                        "the copy is not complete, add what is missing"
                    )
                classes[name] = [classes[name][number - 1] for number in chosen[name]]
        return published.apply({name: images[:count] for name, images in classes.items()}, tree)

    return Layout(f"ILSVRC-2012's training images by class{note}", find, files)


def _is_tree(folder: Path, published: Published) -> bool:
    """Return whether a folder has classes of all splits; ``train/`` of a dataset that is split has those of one."""
    known = published.split()
    return folder.is_dir() and all(
        any((folder / name).is_dir() for name in known if known[name] == split) for split in SPLITS
    )


def _number_of(name: str, lists: Path) -> int:
    match = re.fullmatch(r"n\d{8}(\d{8})\.\w+", name)
    if match is None or not int(match[1]):
        raise DataError(
            f"the lists in {lists} name {name!r}, which is not <WordNet id><number>.jpg, such as n0153282900000005.jpg"
        )
    return int(match[1])


def lists_in(folder: Path) -> bool:
    """Return whether a folder has ``train.csv``, ``val.csv`` and ``test.csv``."""
    return all((folder / f"{split}.csv").is_file() for split in SPLITS)


def read_lists(folder: Path) -> Iterator[tuple[Split, list[str]]]:
    """Yield split, and name and label, of every image that ``{train,val,test}.csv`` list.

    Raises:
        DataError: a list cannot be read.
    """
    for split in SPLITS:
        for row in read_table(folder / f"{split}.csv", ("filename", "label")):
            yield split, row


def read_table(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Return some columns of a CSV file, whose first line names them.

    Raises:
        DataError: it cannot be read, or lacks one of them.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read the list {path}: {getattr(error, 'strerror', None) or error}") from error
    if not rows or any(row.get(column) is None for row in rows for column in columns):
        raise DataError(f"the list {path} needs the columns {', '.join(columns)} in its first line and every other")
    return [[row[column] for column in columns] for row in rows]


def is_image(name: str) -> bool:
    """Return whether a file, given its name alone, is an image, and not hidden."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def class_images(folder: Path) -> list[Path]:
    """Return the image files of one class in order of name.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        return sorted(file for file in folder.iterdir() if is_image(file.name))
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror}; make it readable") from error


def other_files(folder: Path) -> list[Path]:
    """Return what lies in the folder of a class besides image files, folders among it, and is not hidden."""
    return sorted(entry for entry in folder.iterdir() if not is_image(entry.name) and not entry.name.startswith("."))


def class_files(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of each folder in ``folder``; classes and files in order of name, hidden ones ignored.

    Raises:
        DataError: a folder cannot be read, or has no image.
    """
    try:
        classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror}; make it readable") from error
    found = {entry.name: class_images(entry) for entry in classes}
    for name, files in found.items():
        if not files:
            raise DataError(f"{folder / name} has no image ({', '.join(SUFFIXES)}): fill it or remove it")
    return found


def archive_files(source: Source, above: tuple[str, ...]) -> dict[str, list[Member]]:
    """Return the image files of each class of an archive; classes and files in order of name, hidden ones ignored.

    Args:
        source: the archive.
        above: names of the folders that the folders of classes lie in, the innermost last; others may be around these.
    """
    found: defaultdict[str, list[Member]] = defaultdict(list)
    for name in sorted(source.names):
        *folders, label, file = ("", *PurePosixPath(name).parts)
        if is_image(file) and label and tuple(folders[len(folders) - len(above) :]) == above:
            found[label].append(Member(source, name))
    return found
