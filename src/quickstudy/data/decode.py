"""Image files to pixels."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

from quickstudy.errors import DataError

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
