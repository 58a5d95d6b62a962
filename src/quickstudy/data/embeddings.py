"""Embeddings: images that a pre-trained network has turned into vectors, once and for all."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from quickstudy.data.archive import open_files
from quickstudy.data.base import SPLITS, Dataset, Split, check_split_name, split_title
from quickstudy.data.download import Remote, fetch
from quickstudy.data.images import ImageClasses
from quickstudy.data.paths import download_folder, source_folders
from quickstudy.data.progress import track
from quickstudy.data.registry import dataset_entry
from quickstudy.data.unpickle import load_pickle
from quickstudy.errors import DataError
from quickstudy.files import write_file

Layout = Literal["own", "leo"]
"""Of the files: ``<split>.safetensors``, or ``<split>_embeddings.pkl`` as LEO's authors released theirs."""

FILES: dict[Layout, str] = {"own": "{}.safetensors", "leo": "{}_embeddings.pkl"}

LEO_FOLDERS = {"miniimagenet": "miniImageNet", "tieredimagenet": "tieredImageNet"}
"""What the released embeddings are of, and the folders they unpack to."""

ARCHIVE = Remote(
    "embeddings.zip",
    None,  # no checksum has been published; the pickles in it are read without running code
    ("https://storage.googleapis.com/leo-embeddings/embeddings.zip",),
)
"""As LEO's authors released it."""

Rows = tuple[Tensor, list[str]]
"""Embeddings, float32 ``[n, D]``, and the class of each."""


class Embeddings(Dataset):
    """Embeddings of the images of a dataset: each example is a float32 vector ``[D]``.

    They are those that LEO's authors released (Rusu et al., 2019; 640 numbers of a WRN-28-10), in
    ``{miniImageNet,tieredImageNet}/{center,multiview}/{train,val,test}_embeddings.pkl``, or your own, in
    ``{train,val,test}.safetensors`` (:func:`write_embeddings`). Pickles are read without running the code they may
    hold.

    Args:
        of: the dataset they are embeddings of, such as ``"miniimagenet"``; it names the results. They are looked for
            in the folder of that name in each place, and the released ones in the folder of their own name.
        crop: which of the released ones: of the central crop, or of several (miniImageNet alone).
        train_on_val: meta-train on the classes of meta-validation too, as the authors did for their last numbers. The
            validation score then tells nothing: fix the number of updates without it.
        root: the folder to look in, or the one that holds the files; if not given, ``$QUICKSTUDY_DATA/embeddings``,
            ``$QUICKSTUDY_DATA``, and the folder of downloads in the cache.
    """

    name = "embeddings"

    def __init__(
        self,
        of: str = "embeddings",
        crop: Literal["center", "multiview"] = "center",
        train_on_val: bool = False,
        root: str | None = None,
    ) -> None:
        if crop not in ("center", "multiview"):
            raise DataError(f"embeddings: crop is 'center' or 'multiview', not {crop!r}")
        if of == "tieredimagenet" and crop == "multiview":
            raise DataError("embeddings: tieredImageNet has none of several crops, only miniImageNet has: crop: center")
        self.name = of
        self.crop = crop
        self.train_on_val = train_on_val
        self.root = root

    def split(self, split: Split) -> ImageClasses:
        """Return the classes of one split, whose ``images`` are embeddings, float32 ``[n, D]``.

        Raises:
            DataError: the files are not on this machine, or damaged.
        """
        check_split_name(split)
        folder, layout = self._source()
        parts = [read_embeddings(folder, split, layout)]
        if split == "train" and self.train_on_val:
            parts.append(read_embeddings(folder, "val", layout))
            both = set(parts[0][1]) & set(parts[1][1])
            if both:
                raise DataError(f"{self.name}: the class {min(both)} is in both train and val of {folder}")
        return grouped(
            parts[0][0] if len(parts) == 1 else torch.cat([embeddings for embeddings, _ in parts]),
            [name for _, names in parts for name in names],
            split_title(self.name, split),
        )

    def location(self) -> str | None:
        """Return in words where the embeddings are, or ``None`` if nowhere."""
        try:
            return f"in {self._source()[0]}"
        except DataError:
            return None

    def prepare(self, *, skip: bool = False) -> Path:
        """Return the folder of the files: they are read as they are.

        Args:
            skip: has no effect.

        Raises:
            DataError: they are not on this machine.
        """
        return self._source()[0]

    @classmethod
    def get(cls) -> None:
        """Download the embeddings that LEO's authors released, and unpack them, unless some of them are here.

        Raises:
            DataError: they cannot be downloaded, or the archive holds something else.
        """
        if any(cls(of).location() for of in LEO_FOLDERS):
            return
        folder = download_folder("embeddings")
        path = fetch(ARCHIVE, folder)
        with open_files(path) as archive:
            parts = {name: PurePosixPath(name).parts[-3:] for name in archive.names}
            found = {name: own for name, own in parts.items() if own[0] in LEO_FOLDERS.values() and len(own) == 3}
            if not found:
                raise DataError(f"{path} holds no embeddings of {' or '.join(LEO_FOLDERS.values())}: remove it")
            for name, own in track(found.items(), "unpacking the embeddings", len(found)):
                write_file(folder.joinpath(*own), lambda file, name=name: file.write(archive.read(name)))
        path.unlink()

    def _source(self) -> tuple[Path, Layout]:
        """Return the first folder that has the files of all splits, and their layout."""
        places = source_folders("embeddings", self.root)
        candidates = [place / self.name for place in places]
        if self.name in LEO_FOLDERS:
            candidates += [place / LEO_FOLDERS[self.name] / self.crop for place in places]
        if self.root is not None or self.name == "embeddings":
            candidates += places
        for folder in candidates:
            for layout, file in FILES.items():
                if all((folder / file.format(split)).is_file() for split in SPLITS):
                    return folder, layout
        looked = "".join(f"\n  {folder}" for folder in candidates)
        files = " or ".join(file.format("{train,val,test}") for file in FILES.values())
        raise DataError(
            f"{self.name}: {files} are in none of these folders:{looked}\n{dataset_entry('embeddings').how}"
        )


def write_embeddings(
    folder: str | Path,
    split: str,
    embeddings: np.ndarray | Tensor,
    names: Sequence[Any] | np.ndarray | Tensor,
    layout: Layout = "own",
) -> Path:
    """Write the embeddings of one split, the whole file or nothing, and return its path.

    Args:
        folder: where; made if need be.
        split: ``train``, ``val`` or ``test``.
        embeddings: ``[n, D]``, a row for each image.
        names: the class of each row, a word or a number.
        layout: ``own``: ``<split>.safetensors`` with ``embeddings`` (float32) and ``labels`` (int64), and the list of
            class names as JSON in its metadata. ``leo``: ``<split>_embeddings.pkl``, for the code of LEO's authors.

    Raises:
        DataError: the arguments do not fit together, or ``leo`` cannot hold such a class name.
        FileError: the file cannot be written.
    """
    if split not in SPLITS or layout not in get_args(Layout):
        raise DataError(f"embeddings are of train, val or test, in layout own or leo; got {split!r}, {layout!r}")
    rows = torch.as_tensor(embeddings).detach().to("cpu", torch.float32).contiguous()
    names = [str(name) for name in (names.tolist() if isinstance(names, np.ndarray | Tensor) else names)]
    if rows.dim() != 2 or len(rows) != len(names) or not len(rows):
        raise DataError(f"there is a class name for each row of [n, D]; got {[*rows.shape]} and {len(names)} names")
    if not torch.isfinite(rows).all():
        raise DataError("embeddings are finite numbers, and these are not all")
    if layout == "own":
        classes = {name: label for label, name in enumerate(dict.fromkeys(names))}
        tensors = {"embeddings": rows, "labels": torch.tensor([classes[name] for name in names])}
        blob = save_tensors(tensors, {"classes": json.dumps([*classes])})
    else:
        wrong = next((name for name in names if not name or "-" in name or "_" in name), None)
        if wrong is not None:
            raise DataError(f"the layout leo parts names by - and _, so that no class can be called {wrong!r}")
        keys = [f"{number}-{name}-{name}_{number}" for number, name in enumerate(names)]
        blob = pickle.dumps({"embeddings": rows.numpy(), "keys": np.array(keys)}, protocol=2)
        blob = blob.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")  # for NumPy 1, as theirs was
    return write_file(Path(folder) / FILES[layout].format(split), lambda file: file.write(blob))


def read_embeddings(folder: Path, split: str, layout: Layout = "own") -> Rows:
    """Return the embeddings of one split, float32 ``[n, D]``, and the class of each.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = folder / FILES[layout].format(split)
    embeddings, names = (_read_own if layout == "own" else _read_leo)(path)
    if embeddings.dim() != 2 or len(embeddings) != len(names):
        raise _damaged(path, f"embeddings are {[*embeddings.shape]}, and {len(names)} have a class")
    if not torch.isfinite(embeddings).all():
        raise _damaged(path, "not all embeddings are finite")
    return embeddings, names


def _read_own(path: Path) -> Rows:
    try:
        with safe_open(path, "pt") as file:
            embeddings, labels = file.get_tensor("embeddings"), file.get_tensor("labels")
            classes = json.loads(file.metadata()["classes"])
        return embeddings.float(), [classes[label] for label in labels.tolist()]
    except Exception as error:
        raise _damaged(path, str(error)) from error


def _read_leo(path: Path) -> Rows:
    content = load_pickle(path)
    try:
        embeddings = torch.from_numpy(np.array(content["embeddings"], dtype=np.float32))
        keys = [key.decode("latin-1") if isinstance(key, bytes) else str(key) for key in content["keys"]]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"it holds no embeddings and keys: {error}") from error
    names, files = [], set()
    for key in keys:
        fields = key.split("-")
        if len(fields) != 3 or fields[2].split("_")[0] != fields[1]:
            raise _damaged(path, f"the key {key!r} is not <any>-<class>-<class>_<any>")
        names.append(fields[1])
        files.add(fields[2])
    if len(files) != len(keys):
        raise _damaged(path, f"{len(keys)} keys name {len(files)} different images")
    return embeddings, names


def grouped(embeddings: Tensor, names: Sequence[str], title: str) -> ImageClasses:
    """Return rows as classes, in the order in which the classes are first seen.

    Args:
        embeddings: ``[n, D]``.
        names: the class of each row.
        title: what error messages call them.
    """
    classes = {name: label for label, name in enumerate(dict.fromkeys(names))}
    labels = np.array([classes[name] for name in names])
    if (np.diff(labels) < 0).any():
        embeddings = embeddings[torch.from_numpy(labels.argsort(kind="stable"))]
    offsets = np.concatenate([[0], np.bincount(labels).cumsum()])
    return ImageClasses.from_offsets(embeddings, offsets, [*classes], title)


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"the embeddings in {path} are damaged ({reason}): get or write them again")
