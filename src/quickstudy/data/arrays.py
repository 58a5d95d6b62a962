"""Datasets that circulate as pickles and arrays, instead of as image files."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from quickstudy.data.archive import Member, Source
from quickstudy.data.base import SPLITS, Split
from quickstudy.data.layouts import Files, Layout, Published, places_of
from quickstudy.data.pictures import Encoded, Picture, Pixels
from quickstudy.data.splitting import check_split
from quickstudy.data.unpickle import load_pickle
from quickstudy.errors import DataError


def miniimagenet_pickles(names: Sequence[str], published: Published) -> Layout:
    """``mini-imagenet-cache-{train,val,test}.pkl``: the pixels of all images, and the rows of each class.

    Args:
        names: of the folder of these in a place; the place itself will do too.
        published: which class should be in which split.
    """

    def file(path: Path, split: Split) -> Path:
        return path / f"mini-imagenet-cache-{split}.pkl"

    def find(place: Path) -> Path | None:
        return next(
            (path for path in places_of(place, names) if all(file(path, split).is_file() for split in SPLITS)), None
        )

    def read(path: Path) -> dict[str, list[Pixels]]:
        content = load_pickle(path)
        try:
            images, classes = pixels(content["image_data"], path), content["class_dict"]
            return {name: [_row(images, int(row), path) for row in rows] for name, rows in classes.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(path, f"it has no image_data and class_dict ({error!r})") from error

    def files(path: Path) -> Files:
        found: Files = {split: read(file(path, split)) for split in SPLITS}
        check_split(found, published.split(), str(path), published.whose)
        return found

    return Layout("mini-imagenet-cache-{train,val,test}.pkl", find, files)


def tieredimagenet_arrays(names: Sequence[str]) -> Layout:
    """``{split}_images.npz`` or ``{split}_images_png.pkl``, beside ``{split}_labels.pkl``, as Ren et al. released them.

    The arrays are as OpenCV reads images, blue first; the PNG files are as any are. Label files have names of classes
    or, in copies, numbers.

    Args:
        names: of the folder of these in a place; the place itself will do too.
    """

    def images_file(path: Path, split: Split) -> Path | None:
        found = (path / f"{split}_images{ending}" for ending in (".npz", "_png.pkl"))
        return next((file for file in found if file.is_file()), None)

    def find(place: Path) -> Path | None:
        for path in places_of(place, names):
            if all(images_file(path, one) and (path / f"{one}_labels.pkl").is_file() for one in SPLITS):
                return path
        return None

    def read(path: Path, split: Split) -> dict[str, list[Picture]]:
        file = images_file(path, split)
        assert file is not None
        mapped = file.suffix == ".npz"
        images: Any = pixels(mapped_array(file, "images"), file)[..., ::-1] if mapped else load_pickle(file)
        labels = _labels(path / f"{split}_labels.pkl")
        if len(labels) != len(images):
            raise _damaged(file, f"{len(images)} images, and {len(labels)} labels beside them")
        found: dict[str, list[Picture]] = {}
        for row, label in enumerate(labels):
            picture = Pixels(images, row, file) if mapped else Encoded(images, row, file)
            found.setdefault(label, []).append(picture)
        return found

    def files(path: Path) -> Files:
        found: Files = {split: read(path, split) for split in SPLITS}
        check_split(found, {}, str(path), "")
        return found

    title = "{train,val,test}_images.npz or _images_png.pkl, with {train,val,test}_labels.pkl"
    return Layout(title, find, files)


def _labels(path: Path) -> list[str]:
    """Return the class of each image, in words if the file has them."""
    content = load_pickle(path)
    try:
        if "label_specific_str" in content:
            names = [str(name) for name in content["label_specific_str"]]
            return [f"{number:03d} {names[number]}" for number in map(int, content["label_specific"])]
        return [f"{path.stem.removesuffix('_labels')} {int(number):03d}" for number in content["labels"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _damaged(path, f"it has neither label_specific and label_specific_str nor labels ({error!r})") from error


def cifar100_classes(source: Source) -> dict[str, list[Pixels]]:
    """Return the images of each of the 100 classes of CIFAR-100, those to train on before those to test on.

    Args:
        source: the official archive for Python, or the folder ``cifar-100-python`` that it unpacks to.

    Raises:
        DataError: it is not complete, or damaged.
    """
    names = _field(source, "meta", "fine_label_names")
    found: dict[str, list[Pixels]] = {name: [] for name in sorted(names)}
    for part in ("train", "test"):
        data, labels = _field(source, part, "data"), _field(source, part, "fine_labels")
        path = source.path / part
        try:
            images = pixels(np.asarray(data).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), path)
            for row, label in zip(range(len(images)), labels, strict=True):
                found[names[label]].append(Pixels(images, row, path))
        except (TypeError, ValueError, IndexError) as error:
            raise _damaged(path, str(error)) from error
    return found


def _field(source: Source, file: str, key: str) -> Any:
    name = next((name for name in source.names if PurePosixPath(name).parts[1:] == (file,)), f"cifar-100-python/{file}")
    content = load_pickle(Member(source, name))
    if not isinstance(content, dict) or key not in content:
        raise _damaged(source.path / file, f"it has no {key}")
    return content[key]


def pixels(images: Any, path: Path) -> np.ndarray:
    """Return the images of a file, if that is what they are: uint8 ``[n, H, W, 3]``.

    Raises:
        DataError: they are not.
    """
    found = getattr(images, "dtype", type(images).__name__), getattr(images, "shape", "")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise _damaged(path, f"its images are {found[0]} {found[1]}, not uint8 [n, height, width, 3]")
    return images


def mapped_array(path: Path, name: str) -> np.ndarray:
    """Return an array of an ``.npz`` file: mapped, if it lies there uncompressed, for it may be larger than memory.

    Raises:
        DataError: the file cannot be read, or has no such array, or one of objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            with np.load(path, allow_pickle=False) as arrays:
                return arrays[name]
        with path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(30)  # the lengths of the name and of more, before the content
            file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read_header(file)
            if dtype.hasobject:
                raise ValueError("it has objects")
            return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, f"{name}: {error}") from error


def _row(images: np.ndarray, row: int, path: Path) -> Pixels:
    if not 0 <= row < len(images):
        raise ValueError(f"row {row} of {len(images)}")
    return Pixels(images, row, path)


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged, or not what its name says ({reason}): get it again")
