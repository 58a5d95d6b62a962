"""The DejaVu fonts, which come with matplotlib, and characters drawn from them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageFont

from quickstudy.errors import DataError

FAMILIES = (
    ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf"),
    ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
)
"""Font files of each family, the regular one first. The first family has all characters."""


def font_folder() -> Path:
    """Return the folder of the DejaVu fonts.

    Raises:
        DataError: a font is missing.
    """
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    missing = [face for family in FAMILIES for face in family if not (folder / face).is_file()]
    if missing:  # some packagers of matplotlib leave its fonts out
        raise DataError(f"{folder} lacks {', '.join(missing)}, which come with matplotlib; reinstall it with pip")
    return folder


def held_by(face: Path) -> set[str]:
    """Return the characters that a font file has."""
    from matplotlib.ft2font import FT2Font

    return {chr(code) for code in FT2Font(str(face)).get_charmap()}


def version_of(face: Path) -> str:
    """Return the version that a font file says it is, such as ``"Version 2.37"``."""
    from matplotlib.ft2font import FT2Font

    return FT2Font(str(face)).get_sfnt()[(3, 1, 0x409, 5)].decode("utf-16-be")  # Microsoft, Unicode, US English


def load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """Open a font; the basic layout engine, because the other is not in every build of Pillow."""
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def framed(font: ImageFont.FreeTypeFont, character: str, side: int, margin: int) -> Image.Image | None:
    """Draw a character as large as fits, in the middle of a square: so neither its size nor its place tells.

    Args:
        font: a font at a size well above ``side``.
        character: what to draw.
        side: height and width of the picture, in pixels.
        margin: empty pixels on each side.

    Returns:
        An "L" picture, ink 255, or None if the character is blank.
    """
    mask = font.getmask(character, mode="L")
    picture = Image.frombytes("L", mask.size, bytes(mask))  # type: ignore[arg-type]
    box = picture.getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    room = side - 2 * margin
    scale = room / max(picture.size)
    picture = picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS
    )
    canvas = Image.new("L", (side, side))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas
