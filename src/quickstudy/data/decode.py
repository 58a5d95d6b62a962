"""Image files to pixels."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Literal

from PIL import Image

from quickstudy.errors import DataError

Resize = Literal["squash", "crop"]
"""How an image becomes a square: whatever its aspect, or by cutting off what is too long."""

# Pillow's decoders raise each of these, depending on the format and on where the damage is.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def decode_image(content: bytes, title: str, *, mode: str) -> Image.Image:
    """Decode an image file.

    Args:
        content: the whole file.
        title: what error messages call it.
        mode: Pillow's name of the colours to convert to, such as ``"L"`` or ``"RGB"``.

    Raises:
        DataError: the file is damaged, of an unknown format, or absurdly large.
    """
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return picture.convert(mode)
    except _DAMAGED as error:
        reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise DataError(f"cannot read the image {title}: {reason}; it is damaged: replace or remove it") from error


def shrink(picture: Image.Image, side: int) -> Image.Image:
    """Resize to a square with Pillow's bilinear filter, which averages over all pixels that a new pixel covers."""
    return picture if picture.size == (side, side) else picture.resize((side, side), Image.Resampling.BILINEAR)


def square(picture: Image.Image, side: int, resize: Resize) -> Image.Image:
    """Make an image a square of ``side`` pixels, with the filter of :func:`shrink`.

    Args:
        picture: of any size.
        side: height and width of the result.
        resize: ``"squash"`` resizes both sides, whatever the aspect. ``"crop"`` resizes the shorter side and keeps the
            aspect, then keeps the central square, by the rules of torchvision's ``Resize`` and ``CenterCrop``.
    """
    if resize == "squash":
        return shrink(picture, side)
    short = min(picture.size)
    width, height = (side * length // short for length in picture.size)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return picture.crop((left, top, left + side, top + side))
