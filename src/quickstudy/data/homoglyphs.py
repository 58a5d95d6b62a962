"""Which characters of a font are classes of their own: look-alikes are compared as pictures.

``python -m quickstudy.data.homoglyphs`` prints the list that ships as ``splits/glyphs.json``. The list is shipped,
and not made afresh, so that every machine has the same classes, whatever its versions of Unicode and FreeType.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ImageFilter

from quickstudy.data.base import Split
from quickstudy.data.fonts import FAMILIES, font_folder, framed, held_by, load_font

SCRIPTS: dict[Split, tuple[str, ...]] = {
    "test": ("GEORGIAN", "ARMENIAN", "HEBREW", "TIFINAGH"),
    "val": ("LAO", "NKO", "OGHAM"),
    "train": ("LATIN", "GREEK", "CYRILLIC", "COPTIC", "OLD", "LISU", "DIGIT", "ARABIC", "CANADIAN"),
}
"""First words of the Unicode names of the scripts of each split.

Latin, Greek, Cyrillic, Coptic, Old Italic and Lisu are one family of shapes, so they stand on one side; with them,
the two other large scripts make over 1,000 classes to learn from. The scripts to be tested on are unlike all of these
and complete alphabets of their own, and a third group of such scripts is for validation.
"""

ALIKE = 0.91
"""Two characters are alike if their pictures correlate by more than this."""

SAME_SHAPE = 0.60
"""A face's picture of a character that correlates by less with the first face's is of another shape."""

_ALIASES = {"ARABIC-INDIC": "ARABIC", "EXTENDED": "ARABIC"}  # "EXTENDED ARABIC-INDIC DIGIT ..."
_CATEGORIES = {"Lu", "Ll", "Lt", "Lo", "Nd"}


def script(character: str) -> str:
    """Return the script of a character: the first word of its Unicode name."""
    word = unicodedata.name(character, "").split(" ")[0]
    return _ALIASES.get(word, word)


def correlations(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of every picture with every other one.

    The sums are of small integers, exact in float32, so the result does not depend on the order of adding.

    Args:
        pictures: uint8 ``[n, side, side]`` with values below 128 (side at most 32).
        others: uint8 ``[m, side, side]``, likewise.

    Returns:
        ``[n, m]`` float64.
    """
    a = pictures.reshape(len(pictures), -1).astype(np.float32)
    b = others.reshape(len(others), -1).astype(np.float32)
    pixels = a.shape[1]
    a_sum, b_sum = a.sum(1, dtype=np.float64), b.sum(1, dtype=np.float64)
    a_square, b_square = (a * a).sum(1, dtype=np.float64), (b * b).sum(1, dtype=np.float64)
    spread = np.outer(a_square - a_sum**2 / pixels, b_square - b_sum**2 / pixels)
    return ((a @ b.T).astype(np.float64) - np.outer(a_sum, b_sum) / pixels) / np.sqrt(np.maximum(spread, 1e-9))


def comparable(faces: Sequence[Path], characters: Sequence[str]) -> np.ndarray:
    """Draw characters for comparison, a little blurred.

    A picture is empty where a face lacks the character, or has quite another shape for it than the first face.

    Args:
        faces: font files; the first has every character.
        characters: what to draw.

    Returns:
        uint8 ``[faces, n, 28, 28]`` with values below 128.
    """
    blur = ImageFilter.GaussianBlur(1)
    pictures = np.zeros((len(faces), len(characters), 28, 28), np.uint8)
    for face, path in enumerate(faces):
        font, held = load_font(path, 96), held_by(path)
        for i, character in enumerate(characters):
            picture = framed(font, character, 28, 2) if character in held else None
            if picture is not None:
                pictures[face, i] = np.asarray(picture.filter(blur)) // 2
    for i, several in enumerate(pictures.swapaxes(0, 1)):
        pictures[correlations(several[:1], several)[0] < SAME_SHAPE, i] = 0
    return pictures


def distinct(pictures: np.ndarray, threshold: float = ALIKE) -> list[int]:
    """Return the pictures that are not like any earlier one that is returned, nor empty.

    Args:
        pictures: uint8 ``[faces, n, 28, 28]``: each character in several faces (empty where a face lacks it).
        threshold: greatest correlation of two characters in any two faces.
    """
    faces, count = pictures.shape[:2]
    likest = np.full((count, count), -1.0)
    for i in range(faces):
        for j in range(faces):
            likest = np.maximum(likest, correlations(pictures[i], pictures[j]))
    out = ~pictures[0].any(axis=(1, 2))
    kept: list[int] = []
    for i in range(count):
        if not out[i]:
            kept.append(i)
            out |= likest[i] > threshold
    return kept


def choose(faces: Sequence[Path]) -> dict[Split, dict[str, str]]:
    """Return the characters of each split, by script, of which no two look alike.

    Where two do, the one kept is of the smaller scripts (so test and validation alphabets stay complete), then the one
    without accents, then the one with the lower code point.

    Args:
        faces: font files; the first has every character, the others have some of them.
    """
    home: dict[str, Split] = {word: split for split, words in SCRIPTS.items() for word in words}
    candidates = [c for c in held_by(faces[0]) if unicodedata.category(c) in _CATEGORIES and script(c) in home]
    # A compatibility character (a presentation form, a letter in a circle) is another one in a different dress.
    candidates = [c for c in candidates if not unicodedata.decomposition(c).startswith("<")]
    rank = {split: number for number, split in enumerate(SCRIPTS)}
    candidates.sort(key=lambda c: (rank[home[script(c)]], len(unicodedata.normalize("NFD", c)), c))
    pictures = comparable(faces, candidates)
    chosen: dict[Split, dict[str, str]] = {"train": {}, "val": {}, "test": {}}
    for i in distinct(pictures):
        word = script(candidates[i])
        chosen[home[word]][word] = chosen[home[word]].get(word, "") + candidates[i]
    return chosen


if __name__ == "__main__":
    regular = [font_folder() / family[0] for family in FAMILIES]
    print(json.dumps(choose(regular), ensure_ascii=False, indent=0))
