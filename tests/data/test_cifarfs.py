import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quickstudy.data.base import SPLITS
from quickstudy.data.cifarfs import CIFARFS
from quickstudy.data.decode import decode_image
from quickstudy.data.folders import published_split
from quickstudy.data.images import ImageClasses
from quickstudy.errors import DataError
from quickstudy.task import TaskShape

NAMES = {"train": ["apple", "aquarium_fish", "bear"], "val": ["beaver", "beetle"], "test": ["baby", "bed"]}


def encoded(red: int, green: int, side: int = 32, format: str = "WEBP") -> bytes:
    pixels = np.full((side, side, 3), (red, green, 7), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, lossless=True)
    return file.getvalue()


def members(above: str = "") -> dict[str, bytes]:
    """Four images of each class, whose red is the class and whose green is the number."""
    classes = [(split, name) for split in SPLITS for name in NAMES[split]]
    return {
        f"{above}{split}/{name}/{i:03d}.webp": encoded(30 * c, 60 * i)
        for c, (split, name) in enumerate(classes)
        for i in range(4)
    }


def assert_is_all_there(data: CIFARFS) -> None:
    number = 0
    for split in SPLITS:
        source = data.split(split)
        assert isinstance(source, ImageClasses)
        assert source.names == tuple(NAMES[split])
        assert source.images.shape == (4 * len(source), 3, 32, 32)
        for c in range(len(source)):  # lossless: every pixel as it was
            expected = torch.tensor([[30 * number, 60 * i, 7] for i in range(4)], dtype=torch.uint8)
            assert torch.equal(source.of_class(c), expected[:, :, None, None].expand(-1, -1, 32, 32))
            number += 1
    assert source.title == "cifar-fs, meta-test classes"
    assert data.split("train").tasks(TaskShape(3, 1, 3), 0, 2, seed=0).query_x.shape == (2, 9, 3, 32, 32)


@pytest.mark.parametrize("above", ["", "cifar-fs/"])
@pytest.mark.parametrize("by", ["own", "root", "the archive as root"])
def test_the_archive_is_read_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_zip: Callable[..., Path], above: str, by: str
) -> None:
    archive = make_zip(members(above), "own/cifar-fs.zip")
    if by == "own":
        monkeypatch.setenv("QUICKSTUDY_DATA", str(archive.parent))
    root = {"root": str(archive.parent), "the archive as root": str(archive)}.get(by)
    data = CIFARFS(root=root)
    assert data.location() == f"{archive}; packed at first use"
    assert_is_all_there(data)
    assert "packed in" in str(data.location())
    assert os.listdir(archive.parent) == ["cifar-fs.zip"]


@pytest.mark.parametrize("below", ["cifar-fs", "."])
def test_a_folder_will_do(tmp_path: Path, make_zip: Callable[..., Path], below: str) -> None:
    with zipfile.ZipFile(make_zip(members())) as archive:
        archive.extractall(tmp_path / "own" / below)
    assert_is_all_there(CIFARFS(root=str(tmp_path / "own")))


def test_other_files_are_ignored_and_other_formats_and_sizes_read(make_zip: Callable[..., Path]) -> None:
    extra = {
        "readme.txt": b"",
        "__MACOSX/train/apple/._000.webp": b"",
        "train/apple/notes.txt": b"",
        "more/apple/000.webp": b"",
        "000.webp": b"",
        "train/apple/900.png": encoded(200, 100, 40, "PNG"),
    }
    data = CIFARFS(root=str(make_zip({**members(), **extra})))
    source = data.split("train")
    assert isinstance(source, ImageClasses)
    assert source.counts.tolist() == [5, 4, 4]
    assert source.of_class(0)[4, :, 3, 3].tolist() == [200, 100, 7]


def test_the_split_is_that_of_bertinetto_et_al(make_zip: Callable[..., Path]) -> None:
    splits = list(published_split("cifar-fs").values())
    assert [splits.count(split) for split in SPLITS] == [64, 16, 20]
    wrong = {**members(), "val/apple/000.webp": encoded(0, 0)}
    with pytest.raises(DataError, match=r"another split than Bertinetto et al.'s: val/apple belongs in train/; move"):
        CIFARFS(root=str(make_zip(wrong))).prepare()
    twice = {**members(), "val/tiger2/000.webp": encoded(0, 0), "test/tiger2/000.webp": encoded(0, 0)}
    with pytest.raises(DataError, match="has the class tiger2 in both val/ and test/"):
        CIFARFS(root=str(make_zip(twice))).prepare()


def test_what_is_damaged_or_missing_is_named(
    tmp_path: Path, make_zip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = {**members(), "val/beaver/002.webp": b"no image"}
    with pytest.raises(DataError, match=r"cannot read the image val/beaver/002\.webp in .*files\.zip"):
        CIFARFS(root=str(make_zip(damaged))).prepare()
    no_val = {name: content for name, content in members().items() if not name.startswith("val")}
    with pytest.raises(DataError, match="cifar-fs, meta-validation classes: there are none in"):
        CIFARFS(root=str(make_zip(no_val))).prepare()
    monkeypatch.setenv("QUICKSTUDY_DATA", str(tmp_path / "mine"))
    with pytest.raises(DataError) as raised:
        CIFARFS.get()
    for words in ("cifar-fs.zip, or a folder cifar-fs/", "mine/cifar-fs\n", "the images of CIFAR-100"):
        assert words in str(raised.value)


def test_the_real_one_is_complete(own_data: str) -> None:
    found = CIFARFS.find(Path(own_data))
    if found is None:
        pytest.skip("QUICKSTUDY_DATA has no CIFAR-FS")
    files = CIFARFS.files(found)
    assert [len(files[split]) for split in SPLITS] == [64, 16, 20]
    assert {len(images) for split in SPLITS for images in files[split].values()} == {600}
    known = published_split("cifar-fs")
    assert all(known[name] == split for split in SPLITS for name in files[split])
    image = files["test"]["worm"][599]
    assert decode_image(image.read_bytes(), str(image), mode="RGB").size == (32, 32)
