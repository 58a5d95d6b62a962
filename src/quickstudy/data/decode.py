"""Image files to pixels."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from quickstudy.errors import DataError

Resize = Literal["squash", "crop"]
"""How an image becomes a square: whatever its aspect, or by cutting off what is too long."""

# Pillow's decoders raise each of these, depending on the format and on where the damage is.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

_SCALES = {"I;16": {65535: 1 / 257}, "I": {255: 1.0, 65535: 1 / 257}, "F": {1: 255.0, 255: 1.0}}
"""What makes greys of more than 8 bits 0 to 255, by Pillow's mode and by the least limit that they do not exceed."""


def decode_image(content: bytes, title: str, *, mode: str, upright: bool = False) -> Image.Image:
    """Decode an image file.

    Args:
        content: the whole file.
        title: what error messages call it.
        mode: Pillow's name of the colours to convert to, such as ``"L"`` or ``"RGB"``.
        upright: turn it as its EXIF orientation says; photographs may lie on their side.

    Raises:
        DataError: the file is damaged, of an unknown format, absurdly large, or of greys of an unknown range.
    """
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return convert(picture, title, mode=mode, upright=upright)
    except _DAMAGED as error:
        reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise DataError(f"cannot read the image {title}: {reason}; it is damaged: replace or remove it") from error


def convert(picture: Image.Image, title: str, *, mode: str, upright: bool = False) -> Image.Image:
    """Return an image in other colours, as :func:`decode_image` does, with white behind what is transparent.

    Pillow alone cuts off 16-bit greys at 255, and gives what is transparent whatever colour it hides.

    Raises:
        DataError: black and white of its greys cannot be known.
    """
    if upright:
        picture = _turned(picture)
    if picture.has_transparency_data:  # what drawings are exported on; without it they are often black on black
        ink = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", ink.size, "white"), ink)
    scales = _SCALES.get(picture.mode[:4])  # I;16 is also called I;16B, I;16L and I;16N
    if scales is None:
        return picture.convert(mode)
    picture.load()
    greys = np.asarray(picture)
    low, high = greys.min(), greys.max()
    scale = next((scale for limit, scale in scales.items() if low >= 0 and high <= limit), None)
    if scale is None:
        expected = " or ".join(f"0 to {limit}" for limit in scales)
        raise DataError(
            f"the image {title} has the mode {picture.mode} and greys from {low:.6g} to {high:.6g}, where {expected} "
            "is expected: scale them to 0 to 255, in 8 bits (mode L)"
        )
    return Image.fromarray(np.rint(greys * scale).astype(np.uint8)).convert(mode)


def _turned(picture: Image.Image) -> Image.Image:
    """Return an image as its EXIF orientation says, or as it is if its EXIF cannot be read."""
    picture.load()  # or damaged pixels would pass for damaged EXIF
    try:
        return ImageOps.exif_transpose(picture)
    except _DAMAGED:
        return picture


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
