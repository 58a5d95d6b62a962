import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_class_folders
from PIL import Image

from quickstudy.data.base import SPLITS
from quickstudy.data.cub import CUB, split_of
from quickstudy.data.images import ImageClasses
from quickstudy.errors import DataError

NAMES = [f"{number:03d}.Bird_{number}" for number in range(1, 9)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder that the official archive was unpacked in."""
    return write_class_folders(tmp_path / "own" / "CUB_200_2011", {"images": NAMES}, images=3, side=(50, 40)).parent


def test_the_number_of_a_class_decides_its_split(root: Path) -> None:
    names = {}
    for split in SPLITS:
        source = CUB(image_size=10, root=str(root)).split(split)
        assert isinstance(source, ImageClasses)
        assert source.images.shape == (3 * len(source), 3, 10, 10)
        assert source.title.startswith("cub, meta-")
        names[split] = source.names
        for name, c in zip(source.names, range(len(source))):  # the red of an image is its class
            red = 255 * int(name[:3]) // len(NAMES)
            assert source.of_class(c)[:, 0].float().mean() == pytest.approx(red, abs=3)
    assert names == {
        "train": ("001.Bird_1", "003.Bird_3", "005.Bird_5", "007.Bird_7"),
        "val": ("002.Bird_2", "006.Bird_6"),
        "test": ("004.Bird_4", "008.Bird_8"),
    }


def test_200_classes_are_split_in_100_and_50_and_50() -> None:
    splits = [split_of(f"{number:03d}.Some_bird", Path("images")) for number in range(1, 201)]
    assert [splits.count(split) for split in SPLITS] == [100, 50, 50]


@pytest.mark.parametrize("by", ["root", "the archive's folder as root", "own", "own, in a folder"])
def test_the_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    place = tmp_path / "place"
    below = {"own, in a folder": "cub/CUB_200_2011", "the archive's folder as root": "."}.get(by, "CUB_200_2011")
    write_class_folders(place / below, {"images": NAMES})
    if "root" not in by:
        monkeypatch.setenv("QUICKSTUDY_DATA", str(place))
    data = CUB(image_size=8, root=str(place) if "root" in by else None)
    assert str(data.location()).startswith(f"{place / below / 'images'} (images/ with a folder like 001.")
    assert data.split("test").to("cpu") is not None
    assert str(data.location()).startswith("packed in ")


def test_grey_photographs_become_rgb(root: Path) -> None:
    Image.new("L", (30, 20), 99).save(root / "CUB_200_2011" / "images" / NAMES[0] / "9.jpg")
    source = CUB(image_size=8, root=str(root)).split("train")
    assert isinstance(source, ImageClasses)
    assert torch.equal(source.of_class(0)[3], torch.full((3, 8, 8), 99, dtype=torch.uint8))


def test_a_folder_without_a_number_is_named(root: Path) -> None:
    write_class_folders(root / "CUB_200_2011", {"images": ["Some_bird"]})
    with pytest.raises(
        DataError, match=r"images/Some_bird is not named like a class, such as 001\..*: rename or remove"
    ):
        CUB(root=str(root)).prepare()


def test_a_folder_of_other_images_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path / "mine", {"images": ["holidays", "cats"]})
    monkeypatch.setenv("QUICKSTUDY_DATA", str(tmp_path / "mine"))
    assert CUB().location() is None


def test_too_few_classes_for_the_three_splits(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "CUB_200_2011", {"images": NAMES[:3]})
    with pytest.raises(DataError, match=r"cub, meta-test classes: there are none in .*images; .*not complete"):
        CUB(root=str(tmp_path)).split("train")


def test_missing_data_says_what_to_fetch_and_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTUDY_DATA", str(tmp_path / "mine"))
    for ask in (CUB().prepare, lambda: CUB().split("test")):
        with pytest.raises(DataError) as raised:
            ask()
        for way in ("mine/cub\n", "data get cub", "data.caltech.edu/records/65de6", "$QUICKSTUDY_DATA/cub", "`root`"):
            assert way in str(raised.value)
    assert CUB().location() is None


def test_the_official_archive_is_downloaded_and_read_as_it_is(
    root: Path, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "CUB_200_2011.tgz", "w:gz") as archive:
        archive.add(root / "CUB_200_2011", "CUB_200_2011")
        for name in ("CUB_200_2011/README", "attributes.txt", "CUB_200_2011/images/001.Bird_1/._0000.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    remote = server.remote("CUB_200_2011.tgz", (tmp_path / "CUB_200_2011.tgz").read_bytes())
    monkeypatch.setattr(CUB, "remotes", (remote,))
    CUB.get()
    assert str(CUB().location()).endswith("cub/CUB_200_2011.tgz (CUB_200_2011.tgz); packed at first use")
    for split in SPLITS:
        unpacked = CUB(image_size=8, root=str(root)).split(split)
        for data in (CUB(image_size=8), CUB(image_size=8, root=str(tmp_path / "CUB_200_2011.tgz"))):
            packed = data.split(split)
            assert isinstance(packed, ImageClasses)
            assert isinstance(unpacked, ImageClasses)
            assert packed.names == unpacked.names
            assert torch.equal(packed.images, unpacked.images)
