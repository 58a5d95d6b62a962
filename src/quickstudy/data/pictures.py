"""What the pictures of a dataset come as: image files, encoded or plain pixels that lie in arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quickstudy.data.archive import Member
from quickstudy.data.decode import Resize, decode_image, square
from quickstudy.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """One of many image files that lie in memory, with what a ``Path`` offers for reading it.

    Args:
        images: the content of each file.
        row: which.
        path: of the file that they were read from.
    """

    images: Sequence[Any]
    row: int
    path: Path

    def read_bytes(self) -> bytes:
        """Return its content."""
        return bytes(self.images[self.row])

    def __str__(self) -> str:
        return f"{self.row} of {self.path}"


@dataclass(frozen=True)
class Pixels:
    """One of many pictures that lie decoded in one array.

    Args:
        images: RGB, uint8 ``[n, H, W, 3]``.
        row: which.
        path: of the file that they were read from.
    """

    images: np.ndarray
    row: int
    path: Path

    def picture(self) -> Image.Image:
        """Return it as Pillow's."""
        return Image.fromarray(np.ascontiguousarray(self.images[self.row]))

    def __str__(self) -> str:
        return f"{self.row} of {self.path}"


Picture = Path | Member | Encoded | Pixels


def read_image(picture: Picture, side: int, resize: Resize, upright: bool = False) -> np.ndarray:
    """Return a picture in RGB, uint8 ``[3, side, side]``.

    Args:
        picture: what to read.
        side: height and width of the result.
        resize: how it becomes square.
        upright: turn it as its EXIF orientation says.

    Raises:
        DataError: it cannot be read, or is damaged; the message names it.
    """
    if isinstance(picture, Pixels):
        decoded = picture.picture()
    else:
        try:
            content = picture.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {picture}: {error.strerror}") from error
        decoded = decode_image(content, str(picture), mode="RGB", upright=upright)
    return np.asarray(square(decoded, side, resize)).transpose(2, 0, 1)
