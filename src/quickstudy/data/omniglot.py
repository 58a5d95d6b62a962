"""Omniglot (Lake et al., 2015): 1,623 handwritten characters of 50 alphabets, each drawn by 20 people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

from quickstudy.data.archive import GIB, Member, Source, open_files
from quickstudy.data.base import Dataset, Split, check_split_name, split_title
from quickstudy.data.decode import decode_image, shrink
from quickstudy.data.download import Remote, fetch
from quickstudy.data.images import ImageClasses
from quickstudy.data.paths import download_folder, source_folders, store_folder
from quickstudy.data.progress import track
from quickstudy.data.store import open_store, write_store
from quickstudy.errors import DataError

VERSION = 1
"""Raised with every change that changes a pixel of the packed store."""

DRAWERS = 20
SIDE = 105
"""Height and width of the images as they were published, in pixels."""


@dataclass(frozen=True)
class Half:
    """One of the two archives that Omniglot comes in: ``<name>/<alphabet>/<character>/<image>.png``."""

    name: str
    characters: int
    md5: str

    @property
    def remote(self) -> Remote:
        """The official archive."""
        file = f"{self.name}.zip"
        mirrors = (
            f"https://raw.githubusercontent.com/brendenlake/omniglot/master/python/{file}",
            f"https://github.com/brendenlake/omniglot/raw/master/python/{file}",
        )
        return Remote(file, f"md5:{self.md5}", mirrors)


BACKGROUND = Half("images_background", 964, "68d2efa1b9178cc56df9314c21c6e718")
EVALUATION = Half("images_evaluation", 659, "6b91aef0f799c5bb55b94e3f2daec811")
HALVES = (BACKGROUND, EVALUATION)

VALIDATION_ALPHABETS = 5
"""The last so many background alphabets, in order of name, are the validation classes of the "background" split."""


class Omniglot(Dataset):
    """Omniglot: handwritten characters as grey images, ink 255 (1.0 in a task), paper 0.

    The images are inverted, made smaller with Pillow's bilinear filter (which averages over all pixels that a new
    pixel covers; torchvision's ``Resize``, and so the published code on torchmeta, does the same), and packed once.

    Args:
        split: ``"vinyals"``: 1028 / 172 / 423 characters for meta-training, validation and test, as in Vinyals et al.
            (2016) and most papers since. ``"background"``: the 659 evaluation characters to test on (20 alphabets);
            of the 964 background characters those of the last five alphabets in order of name to validate on.
        rotations: also count each character turned by 90, 180 and 270 degrees as a class: four times as many classes
            in every split, as the papers do.
        image_size: height and width, in pixels.
        root: folder that holds ``images_background.zip`` and ``images_evaluation.zip``, or these unzipped; if not
            given, ``$QUICKSTUDY_DATA/omniglot``, ``$QUICKSTUDY_DATA``, and what ``quickstudy data get omniglot``
            has downloaded.
    """

    name = "omniglot"
    ink = True

    def __init__(
        self,
        split: Literal["vinyals", "background"] = "vinyals",
        rotations: bool = False,
        image_size: int = 28,
        root: str | None = None,
    ) -> None:
        if split not in {"vinyals", "background"}:
            raise DataError(f"omniglot has the splits 'vinyals' and 'background', not {split!r}")
        if not 1 <= image_size <= SIDE:
            raise DataError(f"omniglot: image_size must be 1 to {SIDE}, the size of the images; got {image_size}")
        self.splitting = split
        self.rotations = rotations
        self.image_size = image_size
        self.root = root

    def split(self, split: Split) -> ImageClasses:
        """Return the classes of one split, named ``"alphabet/character"``; uint8 ``[n, 1, image_size, image_size]``.

        Raises:
            DataError: the data is not on this machine, incomplete or damaged.
        """
        check_split_name(split)
        everything = open_store(self.prepare(), self.name)
        members = split_members(self.splitting, everything.names)[split]
        classes = everything.select(members, split_title(f"omniglot ({self.splitting} split)", split))
        return classes.rotated() if self.rotations else classes

    def location(self) -> str | None:
        """Return in words where the packed images or the archives are, or ``None`` if nowhere."""
        if self.store.exists():
            return f"packed in {self.store}"
        try:
            archives = [str(find_half(half, source_folders(self.name, self.root))) for half in HALVES]
        except DataError:
            return None
        return f"{' and '.join(archives)}; packed at first use"

    def prepare(self, *, skip: bool = False) -> Path:
        """Decode and pack all images, unless that has been done, and return the folder of the packed store.

        Args:
            skip: has no effect, for no character can do without an image.

        Raises:
            DataError: the data is not on this machine, incomplete or damaged, or the cache cannot be written.
        """
        folder = self.store
        if folder.exists():
            return folder
        places = source_folders(self.name, self.root)
        sources = [find_half(half, places) for half in HALVES]
        origin = {"dataset": self.name, "version": VERSION, "sources": [str(path) for path in sources]}
        return write_store(folder, read_all(sources, self.image_size), (1, self.image_size, self.image_size), origin)

    @property
    def store(self) -> Path:
        """The folder of the packed images, whether they are there or not."""
        return store_folder(f"omniglot-{self.image_size}-v{VERSION}", self.root)

    @classmethod
    def get(cls) -> None:
        """Download the two archives into the cache, 14 MB, unless they are there.

        Raises:
            DataError: no mirror has them; the message says how to fetch them by hand.
        """
        for half in HALVES:
            fetch(half.remote, download_folder(cls.name))


def split_members(splitting: str, names: Sequence[str]) -> dict[Split, list[int]]:
    """Return the positions in ``names`` (``alphabet/character``, background characters first) of each split's classes.

    Args:
        splitting: ``"vinyals"`` or ``"background"``.
        names: all 1,623 characters.
    """
    if splitting == "background":
        alphabets = sorted({name.split("/")[0] for name in names[: BACKGROUND.characters]})
        held_out = set(alphabets[-VALIDATION_ALPHABETS:])
        background = range(BACKGROUND.characters)
        return {
            "train": [i for i in background if names[i].split("/")[0] not in held_out],
            "val": [i for i in background if names[i].split("/")[0] in held_out],
            "test": list(range(BACKGROUND.characters, len(names))),
        }
    text = (resources.files("quickstudy.data") / "splits" / "omniglot-vinyals.json").read_text(encoding="utf-8")
    where = {name: i for i, name in enumerate(names)}
    return {
        split: [where[f"{a}/character{i:02d}"] for a, (first, last) in spans.items() for i in range(first, last + 1)]
        for split, spans in json.loads(text).items()
    }


def find_half(half: Half, places: Sequence[Path]) -> Path:
    """Return the archive or the unzipped folder of one half of Omniglot, from the first of ``places`` that has it.

    Raises:
        DataError: none has; the message names every way to get it.
    """
    for place in places:
        for path in (place / f"{half.name}.zip", place / half.name):
            if path.exists():
                return path
    looked = "".join(f"\n  {place}" for place in places)
    raise DataError(
        f"omniglot: {half.name}.zip, or a folder {half.name}/, is in none of these folders:{looked}\n"
        "run `quickstudy data get omniglot` to download it (14 MB), or set QUICKSTUDY_DATA to the folder of your own "
        "copy, or name that folder as the dataset's `root`"
    )


def read_all(sources: Sequence[Path], image_size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and images, uint8 ``[20, 1, image_size, image_size]``, of every character of both halves, in order.

    Args:
        sources: archive or folder of the background half, and of the evaluation half.
        image_size: height and width to shrink to.

    Raises:
        DataError: a half is not complete, or an image cannot be read; the message names it.
    """
    with ExitStack() as stack:
        halves = [stack.enter_context(open_files(source, limit=GIB)) for source in sources]
        pool = stack.enter_context(ThreadPoolExecutor())
        todo = [
            (files, name, images)
            for half, files in zip(HALVES, halves, strict=True)
            for name, images in characters_of(half, files).items()
        ]

        def read(item: tuple[Source, str, list[str]]) -> np.ndarray:
            files, _, images = item
            return np.stack([read_ink(Member(files, image), image_size) for image in images])

        step = 64  # bounds what is decoded ahead of the disk, and what is in vain after an error
        for start in track(range(0, len(todo), step), f"packing omniglot at {image_size}×{image_size}"):
            batch = todo[start : start + step]
            yield from zip((name for _, name, _ in batch), pool.map(read, batch))


def characters_of(half: Half, files: Source) -> dict[str, list[str]]:
    """Return the 20 image files of each character (``alphabet/character``) of one half, in order of name.

    Raises:
        DataError: there are not as many characters, or not as many images of each, as there should be.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(files.names):
        parts = name.split("/")
        if len(parts) == 4 and parts[0] == half.name and parts[3].endswith(".png") and not parts[3].startswith("."):
            found.setdefault(f"{parts[1]}/{parts[2]}", []).append(name)
    remedy = "it is not complete: fetch it again (`quickstudy data get omniglot`)"
    if len(found) != half.characters:
        raise DataError(f"{files.path} has {len(found)} characters of {half.name}, not {half.characters}; {remedy}")
    for character, images in found.items():
        if len(images) != DRAWERS:
            raise DataError(f"{files.path} has {len(images)} images of {character}, not {DRAWERS}; {remedy}")
    return found


def read_ink(member: Member, image_size: int) -> np.ndarray:
    """Return one image, uint8 ``[1, image_size, image_size]``, ink 255.

    Raises:
        DataError: it cannot be read, or has not the size of the published ones.
    """
    picture = decode_image(member.read_bytes(), str(member), mode="L")
    if picture.size != (SIDE, SIDE):
        raise DataError(f"{member} is {picture.width}×{picture.height} pixels, not {SIDE}×{SIDE}")
    return 255 - np.asarray(shrink(picture, image_size))[None]
