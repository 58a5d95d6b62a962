"""Glyphs: characters of many scripts, drawn from the fonts that ship with matplotlib; needs no download."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import ImageFont

from quickstudy.data.base import SPLITS, Dataset, Split, check_split_name, generator, split_title
from quickstudy.data.distort import FINE, NUMBERS, SIDE, distort
from quickstudy.data.fonts import FAMILIES, font_folder, framed, held_by, load_font, version_of
from quickstudy.data.homoglyphs import comparable
from quickstudy.data.images import ImageClasses
from quickstudy.data.paths import store_folder
from quickstudy.data.progress import track
from quickstudy.data.store import open_store, write_store

VERSION = 1
"""Raised with every change that changes a picture."""

SAMPLES = 20
"""Pictures of each class."""

LARGE = 96
"""Characters are first drawn with so many pixels to the em."""

MARGIN = 4
"""Empty pixels on each side of an undistorted picture, where there is room for the distortion."""

CHUNK = 32
"""Classes drawn at a time: more would not be faster, and take more memory."""


def characters() -> dict[Split, dict[str, str]]:
    """Return the characters of each split, by script (a string of them each)."""
    text = (resources.files("quickstudy.data") / "splits" / "glyphs.json").read_text(encoding="utf-8")
    return json.loads(text)


class Glyphs(Dataset):
    """Characters of fifteen scripts, and digits, in the DejaVu fonts, 28×28, 20 randomly distorted pictures of each.

    Every script is in one split only, and no two characters of all splits look alike (see
    :mod:`quickstudy.data.homoglyphs`). The pictures are drawn in seconds at first use, the same ones every time, and
    kept in the cache.
    """

    name = "glyphs"
    ink = True

    def split(self, split: Split) -> ImageClasses:
        """Return the classes of one split, named ``"SCRIPT/character"``; uint8 ``[n, 1, 28, 28]``, ink 255, paper 0.

        Raises:
            DataError: the fonts are missing, or the cache cannot be written.
        """
        check_split_name(split)
        everything = open_store(self.prepare(), self.name)
        scripts = characters()[split]
        members = (i for i, name in enumerate(everything.names) if name.split("/")[0] in scripts)
        return everything.select(members, split_title(self.name, split))

    def location(self) -> str:
        """Return in words where the pictures are."""
        return f"packed in {self.store}" if self.store.exists() else "not drawn yet: drawn at first use"

    @property
    def store(self) -> Path:
        """The folder of the packed images, whether they are there or not."""
        return store_folder(f"glyphs-v{VERSION}")

    def prepare(self, *, skip: bool = False) -> Path:
        """Draw all pictures, unless that has been done, and return the folder of the packed store.

        Args:
            skip: has no effect, for nothing is read.

        Raises:
            DataError: the fonts are missing, or the cache cannot be written.
        """
        folder = self.store
        if not folder.exists():
            font = version_of(font_folder() / FAMILIES[0][0])
            origin = {"dataset": self.name, "version": VERSION, "font": font, "families": FAMILIES}
            write_store(folder, _draw_all(), (1, SIDE, SIDE), origin)
        return folder


def _draw_all() -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and pictures, uint8 ``[SAMPLES, 1, 28, 28]``, of every class, split after split."""
    classes = [(script, c) for split in SPLITS for script, own in characters()[split].items() for c in own]
    faces = _faces_of([character for _, character in classes])
    for start in track(range(0, len(classes), CHUNK), "drawing glyphs"):
        chunk = classes[start : start + CHUNK]
        rngs = [generator(ord(character), VERSION) for _, character in chunk]
        printed = np.concatenate([_printed(c, faces[c], rng) for (_, c), rng in zip(chunk, rngs)])
        noise = np.concatenate([rng.uniform(-1, 1, (SAMPLES, NUMBERS)) for rng in rngs])
        pictures = distort(torch.from_numpy(printed.astype(np.float32) / 255), noise).numpy()
        for i, (script, character) in enumerate(chunk):
            yield f"{script}/{character}", pictures[i * SAMPLES : (i + 1) * SAMPLES]


def _faces_of(characters: list[str]) -> dict[str, list[ImageFont.FreeTypeFont]]:
    """Return the fonts that each character can be drawn from: those of a family that gives it another shape are out."""
    folder = font_folder()
    pictures = comparable([folder / family[0] for family in FAMILIES], characters)
    fonts = [[(load_font(folder / f, LARGE), held_by(folder / f)) for f in family] for family in FAMILIES]
    usable = np.max(pictures, axis=(2, 3)) > 0  # [families, characters]
    return {
        c: [font for family, use in zip(fonts, usable[:, i]) if use for font, held in family if c in held]
        for i, c in enumerate(characters)
    }


def _printed(character: str, fonts: list[ImageFont.FreeTypeFont], rng: np.random.Generator) -> np.ndarray:
    """Return undistorted pictures from fonts drawn at random, uint8 ``[SAMPLES, FINE * SIDE, FINE * SIDE]``."""
    drawn = (framed(font, character, FINE * SIDE, FINE * MARGIN) for font in fonts)
    bitmaps = np.stack([np.asarray(picture) for picture in drawn if picture is not None])
    return bitmaps[(rng.random(SAMPLES) * len(bitmaps)).astype(int)]
