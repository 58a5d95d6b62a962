"""Contact sheets: one look at the pictures of a dataset."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from quickstudy.data.images import ImageClasses
from quickstudy.errors import DataError
from quickstudy.files import write_file


def contact_sheet(
    classes: ImageClasses, path: str | os.PathLike[str], *, rows: int = 20, columns: int = 20, zoom: int = 1
) -> Path:
    """Write a PNG with one row for each of some classes, spread evenly over all of them.

    Args:
        classes: what to show.
        path: file to write; it appears whole, or not at all.
        rows: classes at most.
        columns: images of a class at most.
        zoom: width and height of a pixel of an image, in pixels of the sheet.

    Returns:
        The path.

    Raises:
        DataError: there is nothing to show.
        FileError: the file cannot be written.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise DataError(f"a sheet is drawn as PNG: give {path} the ending .png")
    if min(rows, columns, zoom, len(classes)) < 1:
        raise DataError(f"{classes.title}: a sheet needs at least one class, row, column and a zoom of 1")
    if classes.images.dim() != 4:
        raise DataError(f"{classes.title}: these are not images, and cannot be drawn")
    chosen = np.unique(np.linspace(0, len(classes) - 1, rows).round().astype(int))
    columns = min(columns, int(classes.counts[chosen].max()))
    channels, height, width = classes.images.shape[1:]
    sheet = np.full((len(chosen) * (height + 1) - 1, columns * (width + 1) - 1, channels), 128, np.uint8)
    for row, index in enumerate(chosen):
        images = classes.of_class(int(index))[:columns].permute(0, 2, 3, 1).cpu().numpy()
        for column, image in enumerate(images):
            top, left = row * (height + 1), column * (width + 1)
            sheet[top : top + height, left : left + width] = image
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet[..., :3])
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    return write_file(path, lambda file: picture.save(file, format="PNG"))
