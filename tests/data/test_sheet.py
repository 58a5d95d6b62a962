import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quickstudy.data.images import ImageClasses
from quickstudy.data.sheet import contact_sheet
from quickstudy.errors import DataError, FileError


def classes(channels: int, count: int = 30) -> ImageClasses:
    images = torch.arange(count, dtype=torch.uint8).repeat_interleave(4).view(-1, 1, 1, 1).repeat(1, channels, 6, 8)
    return ImageClasses.from_offsets(images, np.arange(0, 4 * count + 1, 4), [str(c) for c in range(count)], "some")


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_one_row_for_each_class(tmp_path: Path, channels: int, mode: str) -> None:
    path = contact_sheet(classes(channels), tmp_path / "new" / "sheet.png", rows=3, columns=3)
    with Image.open(path) as picture:
        assert picture.mode == mode
        assert picture.size == (3 * 9 - 1, 3 * 7 - 1)
        pixels = np.asarray(picture.convert("L"))
    assert pixels[[0, 7, 14], 0].tolist() == [0, 14, 29]  # first, middle and last class
    assert (pixels[6] == 128).all()


def test_rows_and_columns_are_at_most_what_there_is(tmp_path: Path) -> None:
    with Image.open(contact_sheet(classes(1, 2), tmp_path / "sheet.png", zoom=2)) as picture:
        assert picture.size == (2 * (4 * 9 - 1), 2 * (2 * 7 - 1))


def test_a_sheet_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Image.Image, file: object, format: str) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "sheet.png").write_text("old")
    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(FileError, match=r"cannot write .*sheet\.png: No space left"):
        contact_sheet(classes(1), tmp_path / "sheet.png")
    assert os.listdir(tmp_path) == ["sheet.png"]
    assert (tmp_path / "sheet.png").read_text() == "old"


def test_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one class"):
        contact_sheet(classes(1), tmp_path / "sheet.png", rows=0)
