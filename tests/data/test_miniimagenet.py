import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from helpers import write_class_folders
from PIL import Image

from quickstudy.data import folders
from quickstudy.data.base import SPLITS, Split
from quickstudy.data.decode import Resize, square
from quickstudy.data.images import ImageClasses
from quickstudy.data.miniimagenet import MiniImageNet, ravi_split
from quickstudy.data.transformed import TransformedTasks
from quickstudy.data.transforms import CenterCrop, RandomFlip
from quickstudy.engine.recipe import dump_recipe, instantiate, parse_recipe
from quickstudy.errors import DataError
from quickstudy.task import TaskShape

NAMES: dict[str, list[str]] = {
    "train": ["n01532829", "n01558993", "n01704323"],
    "val": ["n01855672", "n02091244"],
    "test": ["n01930112", "n01981276"],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_class_folders(tmp_path / "own" / "miniImagenet", NAMES, images=5, side=(40, 30)).parent


def classes(data: MiniImageNet, split: Split) -> ImageClasses:
    source = data.split(split)
    assert isinstance(source, ImageClasses)
    return source


def test_the_split_is_that_of_ravi_and_larochelle() -> None:
    splits = list(ravi_split().values())
    assert {split: splits.count(split) for split in SPLITS} == {"train": 64, "val": 16, "test": 20}
    assert ravi_split()["n01532829"] == "train"  # house finch
    assert ravi_split()["n02110341"] == "test"  # dalmatian


def test_every_split_has_the_images_of_its_classes(root: Path) -> None:
    data = MiniImageNet(image_size=20, root=str(root))
    for number, split in enumerate(SPLITS):
        own = classes(data, split)
        assert own.names == tuple(NAMES[split])
        assert (own.counts == 5).all()
        assert own.images.shape == (5 * len(own), 3, 20, 20)
        assert own.images.dtype == torch.uint8
        before = sum(len(NAMES[earlier]) for earlier in SPLITS[:number])
        for c in range(len(own)):
            red, green, blue = own.of_class(c).float().mean((2, 3)).unbind(1)
            assert red.numpy() == pytest.approx(np.full(5, 255 * (before + c + 1) // 7), abs=3)
            assert green.numpy() == pytest.approx(np.arange(5) * 51, abs=3)
            assert blue.max() < 6
    assert classes(data, "val").title == "miniimagenet, meta-validation classes"
    assert data.split("train").tasks(TaskShape(3, 1, 4), 0, 2, seed=0).query_x.shape == (2, 12, 3, 20, 20)


def gradient(width: int, height: int) -> Image.Image:
    """A picture whose red is the column and whose green is the row, in parts of the whole."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, 0 * red], -1).round().astype(np.uint8))


def test_squashing_keeps_everything_and_cropping_keeps_the_aspect() -> None:
    wide = gradient(160, 40)
    squashed, cropped = (np.asarray(square(wide, 20, resize)).astype(int) for resize in get_args(Resize))
    assert squashed.shape == cropped.shape == (20, 20, 3)
    for image in (squashed, cropped):
        assert image[0, :, 1].max() < 15
        assert image[-1, :, 1].min() > 240
    assert squashed[:, 0, 0].max() < 15
    assert squashed[:, -1, 0].min() > 240
    assert cropped[0, [0, -1], 0] == pytest.approx([255 * 3 / 8, 255 * 5 / 8], abs=4)  # columns 60 to 100 of 160
    tall = np.asarray(square(gradient(40, 160), 20, "crop")).astype(int)
    assert np.array_equal(tall[..., 1].T, cropped[..., 0])


@pytest.mark.parametrize("size", [(7, 7), (9, 7), (7, 10), (200, 13)])
def test_a_crop_is_the_middle_of_pillow_s_resized_image(size: tuple[int, int]) -> None:
    picture = gradient(*size)
    short = min(size)
    resized = picture.resize((size[0] * 6 // short, size[1] * 6 // short), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 6) / 2), round((resized.height - 6) / 2)
    expected = np.asarray(resized)[top : top + 6, left : left + 6]
    assert np.array_equal(np.asarray(square(picture, 6, "crop")), expected)


@pytest.mark.parametrize("below", ["miniImagenet", "miniimagenet", "."])
@pytest.mark.parametrize("by", ["root", "own", "own, in a folder"])
def test_the_folder_is_found_and_never_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str, by: str
) -> None:
    place = tmp_path / "place"
    write_class_folders(place / ("miniimagenet" if "folder" in by else "") / below, NAMES)
    if by != "root":
        monkeypatch.setenv("QUICKSTUDY_DATA", str(place))
    before = sorted(place.rglob("*"))
    data = MiniImageNet(image_size=8, root=str(place) if by == "root" else None)
    assert str(place) in (data.location() or "")
    assert classes(data, "test").names == tuple(NAMES["test"])
    assert "packed in" in (data.location() or "")
    assert sorted(place.rglob("*")) == before


def test_packed_once_for_each_size_and_way_of_resizing(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [{"image_size": 8}, {"image_size": 9}, {"image_size": 8, "resize": "crop"}]
    first = [classes(MiniImageNet(**setting, root=str(root)), "test").images for setting in settings]
    assert len(list((cache / "stores").iterdir())) == 3
    monkeypatch.setattr(folders, "read_classes", None)
    for setting, images in zip(settings, first):
        assert torch.equal(classes(MiniImageNet(**setting, root=str(root)), "test").images, images)


def test_other_files_are_ignored(root: Path) -> None:
    (root / "miniImagenet" / "train" / "n01532829" / "notes.txt").write_text("stray")
    (root / "miniImagenet" / "train" / "n01532829" / "._0000.jpg").write_text("hidden")
    (root / "miniImagenet" / "train" / "train.csv").write_text("stray")
    (root / "miniImagenet" / "train" / ".cache").mkdir()
    assert (classes(MiniImageNet(image_size=8, root=str(root)), "train").counts == 5).all()


def test_png_and_grey_and_palette_images_are_read_too(root: Path) -> None:
    folder = root / "miniImagenet" / "val" / "n01855672"
    Image.new("L", (10, 10), 77).save(folder / "5.PNG")
    Image.new("RGBA", (10, 10), (10, 20, 30, 255)).save(folder / "6.png")
    Image.new("RGB", (10, 10), (40, 50, 60)).quantize(2).save(folder / "7.png")
    images = classes(MiniImageNet(image_size=8, root=str(root)), "val").of_class(0)
    assert images[5:, :, 4, 4].tolist() == [[77, 77, 77], [10, 20, 30], [40, 50, 60]]


def test_a_class_under_another_split_is_refused(root: Path, cache: Path) -> None:
    shutil.move(root / "miniImagenet" / "train" / "n01704323", root / "miniImagenet" / "test")
    with pytest.raises(DataError, match=r"another split than Ravi .*: test/n01704323 belongs in train/; move"):
        MiniImageNet(root=str(root)).split("train")
    assert not (cache / "stores").exists()


def test_a_class_in_two_splits_is_refused(root: Path) -> None:
    for split in ("val", "test"):
        write_class_folders(root / "miniImagenet", {split: ["tiger"]})
    with pytest.raises(DataError, match=r"miniImagenet has the class tiger in both val/ and test/"):
        MiniImageNet(root=str(root)).prepare()


def test_a_split_or_a_class_without_anything_is_named(root: Path) -> None:
    for file in (root / "miniImagenet" / "val" / "n02091244").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"val/n02091244 has no image \(.jpg, .jpeg, .png, .webp\): fill"):
        MiniImageNet(root=str(root)).prepare()
    for folder in (root / "miniImagenet" / "val").iterdir():
        shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"miniimagenet, meta-validation classes: there are none in .*miniImagenet"):
        MiniImageNet(root=str(root)).prepare()


@pytest.mark.parametrize("content", [b"", b"<html>", b"truncated"])
def test_a_corrupt_image_is_named_and_nothing_is_left(root: Path, cache: Path, content: bytes) -> None:
    bad = root / "miniImagenet" / "test" / "n01981276" / "0003.jpg"
    if content == b"truncated":
        Image.effect_noise((60, 60), 50).save(bad)
        content = bad.read_bytes()[: bad.stat().st_size // 2]
    bad.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the image .*test/n01981276/0003\.jpg: .*; it is damaged"):
        MiniImageNet(root=str(root)).prepare()
    assert list((cache / "stores").iterdir()) == []


def test_missing_data_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTUDY_DATA", str(tmp_path / "mine"))
    for ask in (MiniImageNet.get, MiniImageNet().prepare, lambda: MiniImageNet().split("test")):
        with pytest.raises(DataError) as raised:
            ask()
        for way in (
            "train/, val/ and test/",
            "mine/miniimagenet\n",
            "cache/downloads",
            "https://image-net.org",
            "$QUICKSTUDY_DATA/miniimagenet/{train,val,test}/<WordNet id>/*.jpg",
            "`root`",
        ):
            assert way in str(raised.value)
    assert MiniImageNet().location() is None


def test_there_is_nothing_to_get_where_the_data_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTUDY_DATA", str(root))
    MiniImageNet.get()


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match="miniimagenet: image_size is at least 1 pixel; got 0"):
        MiniImageNet(image_size=0)
    with pytest.raises(DataError, match="'squash' or 'crop', not 'stretch'"):
        MiniImageNet(resize="stretch")  # type: ignore[arg-type]


def test_transforms_are_those_of_the_split(root: Path) -> None:
    data = MiniImageNet(20, train_transforms=[RandomFlip()], test_transforms=[CenterCrop(16)], root=str(root))
    sides = {split: data.split(split).tasks(TaskShape(2, 1, 1), 0, 1, seed=0).query_x.shape[-1] for split in SPLITS}
    assert sides == {"train": 20, "val": 16, "test": 16}
    assert isinstance(data.split("train"), TransformedTasks)


def test_moving_a_split_moves_its_own_images_only(root: Path) -> None:
    own = classes(MiniImageNet(image_size=8, root=str(root)), "val").to("cpu")
    assert len(own.images) == 10


def test_a_recipe_names_transforms_by_their_class(root: Path) -> None:
    recipe = f"""
    dataset:
      class_path: quickstudy.data.MiniImageNet
      init_args:
        image_size: 20
        resize: crop
        root: {root}
        train_transforms:
          - class_path: quickstudy.data.RandomResizedCrop
            init_args: {{size: 16, area: [0.2, 1.0]}}
          - class_path: quickstudy.data.ColorJitter
          - class_path: quickstudy.data.Normalise
            init_args: {{mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]}}
    method:
      class_path: quickstudy.methods.ProtoNet
      init_args: {{backbone: {{class_path: quickstudy.nn.Conv4}}}}
    train: {{task: {{way: 3, shot: 1, queries: 2}}}}
    """
    parsed = parse_recipe(recipe)
    again = parse_recipe(dump_recipe(parsed))
    assert yaml.safe_load(dump_recipe(again)) == yaml.safe_load(dump_recipe(parsed))
    source = instantiate(again).dataset.split("train")
    assert isinstance(source, TransformedTasks)
    assert [type(transform).__name__ for transform in source.transforms] == [
        "RandomResizedCrop",
        "ColorJitter",
        "Normalise",
    ]
    assert source.tasks(TaskShape(3, 1, 2), 0, 2, seed=0).query_x.shape == (2, 6, 3, 16, 16)
