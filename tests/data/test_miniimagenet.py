import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from helpers import read_twice, write_class_folders
from PIL import Image

from quickstudy.data import folders
from quickstudy.data.base import SPLITS, Split
from quickstudy.data.decode import Resize, square
from quickstudy.data.images import ImageClasses
from quickstudy.data.miniimagenet import RAVI, MiniImageNet
from quickstudy.data.store import read_index
from quickstudy.data.transformed import TransformedTasks
from quickstudy.data.transforms import CenterCrop, RandomFlip
from quickstudy.engine.recipe import instantiate
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
    splits = list(RAVI.split().values())
    assert {split: splits.count(split) for split in SPLITS} == {"train": 64, "val": 16, "test": 20}
    assert RAVI.split()["n01532829"] == "train"  # house finch
    assert RAVI.split()["n02110341"] == "test"  # dalmatian


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


def test_another_dataset_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path, {split: ["tiger", "lion"] for split in SPLITS})  # whatever it is
    monkeypatch.setenv("QUICKSTUDY_DATA", str(tmp_path))
    assert MiniImageNet().location() is None
    with pytest.raises(DataError, match="folder of images for every class, such as train/n01532829"):
        MiniImageNet().prepare()
    listed = tmp_path / "miniImagenet"
    (listed / "images").mkdir(parents=True)
    for split in SPLITS:
        (listed / f"{split}.csv").write_text(f"filename,label\n{split}.jpg,tiger{split}\n")
    with pytest.raises(DataError, match=r"none of the 100 classes of Ravi .*, such as n01532829: it is another"):
        MiniImageNet().prepare()


def test_a_class_in_two_splits_is_refused(root: Path) -> None:
    for split in ("val", "test"):
        write_class_folders(root / "miniImagenet", {split: ["tiger"]})
    with pytest.raises(DataError, match=r"miniImagenet has the class tiger in both val/ and test/"):
        MiniImageNet(root=str(root)).prepare()


def test_a_split_or_a_class_without_anything_is_named(root: Path) -> None:
    for file in (root / "miniImagenet" / "val" / "n02091244").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"val/n02091244 has no image \(.jpg, .*\): fill"):
        MiniImageNet(root=str(root)).prepare()
    for folder in (root / "miniImagenet" / "val").iterdir():
        shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"miniimagenet, meta-validation classes: there are none in .*miniImagenet"):
        MiniImageNet(root=str(root)).prepare()


@pytest.mark.parametrize("content", [b"", b"<html>", b"truncated"])
def test_a_corrupt_image_is_named_and_left_out_on_request(root: Path, content: bytes) -> None:
    bad = root / "miniImagenet" / "test" / "n01981276" / "0003.jpg"
    if content == b"truncated":
        Image.effect_noise((60, 60), 50).save(bad)
        content = bad.read_bytes()[: bad.stat().st_size // 2]
    bad.write_bytes(content)
    data = MiniImageNet(image_size=8, root=str(root))
    with pytest.raises(
        DataError, match=r"cannot read the image .*test/n01981276/0003\.jpg: .*; it is damaged"
    ) as raised:
        data.prepare()
    assert "or leave out what cannot be read: `quickstudy data prepare miniimagenet`" in str(raised.value)
    assert not data.store.exists()
    index = read_index(data.prepare(skip=True))
    assert index["unreadable"] == [str(bad)]
    assert np.diff(index["offsets"]).tolist() == [5] * 6 + [4]
    assert classes(data, "test").of_class(1)[:, 1].float().mean((1, 2)).numpy() == pytest.approx(
        [0, 51, 102, 204], abs=3
    )


def test_room_on_the_disk_comes_first(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=35 * 3 * 1000**2 - 1))
    with pytest.raises(DataError, match=r"35 packed images of miniimagenet take 0\.10 GB, and 0\.10 GB are free at"):
        MiniImageNet(image_size=1000, root=str(root)).prepare()
    assert not cache.exists()
    MiniImageNet(image_size=999, root=str(root)).prepare()


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
    source = instantiate(read_twice(recipe)).dataset.split("train")
    assert isinstance(source, TransformedTasks)
    assert [type(transform).__name__ for transform in source.transforms] == [
        "RandomResizedCrop",
        "ColorJitter",
        "Normalise",
    ]
    assert source.tasks(TaskShape(3, 1, 2), 0, 2, seed=0).query_x.shape == (2, 6, 3, 16, 16)


# ------------------------------------------------------------------ other layouts


def write_lists(folder: Path, names: dict[str, list[str]], numbers: list[int]) -> None:
    for split, own in names.items():
        rows = [f"{name}{number:08d}.jpg,{name}" for name in own for number in numbers]
        (folder / f"{split}.csv").write_text("\n".join(["filename,label", *rows]) + "\n")


def greens(data: MiniImageNet, split: Split) -> list[list[int]]:
    """The green of each image, which is its number in 51sts, for every class."""
    own = classes(data, split)
    return [(own.of_class(c)[:, 1].float().mean((1, 2)) / 51).round().int().tolist() for c in range(len(own))]


@pytest.mark.parametrize("below", ["miniimagenet", "."])
def test_images_beside_their_lists(root: Path, tmp_path: Path, below: str) -> None:
    home = tmp_path / "listed" / below
    (home / "images").mkdir(parents=True)
    for path in root.rglob("*.jpg"):
        shutil.copy(path, home / "images" / f"{path.parent.name}{int(path.stem) + 1:08d}.jpg")
    write_lists(home, NAMES, [5, 1, 2])
    data = MiniImageNet(image_size=20, root=str(tmp_path / "listed"))
    assert str(data.location()).startswith(f"{home} (images/ with train.csv, val.csv and test.csv)")
    for split in SPLITS:
        assert classes(data, split).names == tuple(NAMES[split])
        assert greens(data, split) == [[4, 0, 1]] * len(NAMES[split])
    (home / "images" / "n0155899300000002.jpg").unlink()
    with pytest.raises(DataError, match=r"cannot read .*n0155899300000002.jpg: No such file"):
        MiniImageNet(image_size=10, root=str(tmp_path / "listed")).prepare()
    (home / "val.csv").write_text("file,label\na,b\n")
    with pytest.raises(DataError, match=r"val.csv needs the columns filename, label"):
        MiniImageNet(image_size=10, root=str(tmp_path / "listed")).prepare()
    write_lists(home, {"val": NAMES["test"]}, [1])
    with pytest.raises(DataError, match=r"another split than Ravi and Larochelle's: val/n01930112 belongs in test/"):
        MiniImageNet(image_size=10, root=str(tmp_path / "listed")).prepare()


def write_pickles(folder: Path, root: Path, protocol: int) -> None:
    for split, names in NAMES.items():
        files = sorted((root / "miniImagenet" / split).rglob("*.jpg"))
        order = np.random.default_rng(0).permutation(len(files))  # rows need not be in the order of classes
        images = np.stack([np.asarray(Image.open(files[i]).resize((84, 84))) for i in order])
        rows = {name: [k for k, i in enumerate(order) if files[i].parent.name == name] for name in names}
        content = pickle.dumps({"image_data": images, "class_dict": rows}, protocol)
        (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(content)


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_pickles_that_circulate(root: Path, tmp_path: Path, protocol: int) -> None:
    (tmp_path / "pickles").mkdir()
    write_pickles(tmp_path / "pickles", root, protocol)
    data = MiniImageNet(root=str(tmp_path / "pickles"))
    assert "(mini-imagenet-cache-{train,val,test}.pkl)" in str(data.location())
    for split in SPLITS:
        own, files = classes(data, split), classes(MiniImageNet(root=str(root)), split)
        assert own.names == files.names
        assert [sorted(one) for one in greens(data, split)] == [[0, 1, 2, 3, 4]] * len(own)
        for c in range(len(own)):
            difference = own.of_class(c).float().mean((0, 2, 3)) - files.of_class(c).float().mean((0, 2, 3))
            assert difference.abs().max() < 1  # red is red
    assert classes(MiniImageNet(image_size=8, root=str(tmp_path / "pickles")), "val").images.shape == (10, 3, 8, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"image_data": np.zeros((1, 84, 84, 3), np.uint8)}, "class_dict"),
        ({"image_data": np.zeros((1, 84, 84, 3), np.uint8), "class_dict": {"n1": [1]}}, "row 1 of 1"),
        ({"image_data": np.zeros((1, 84, 84)), "class_dict": {}}, r"float64 \(1, 84, 84\), not uint8"),
    ],
)
def test_other_pickles_are_refused(root: Path, tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "pickles").mkdir()
    write_pickles(tmp_path / "pickles", root, 4)
    (tmp_path / "pickles" / "mini-imagenet-cache-val.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=rf"cache-val.pkl is damaged, or not what its name says.*{message}"):
        MiniImageNet(root=str(tmp_path / "pickles")).prepare()


def test_the_pickles_cannot_run_code(root: Path, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "attacked",))

    (tmp_path / "pickles").mkdir()
    write_pickles(tmp_path / "pickles", root, 4)
    path = tmp_path / "pickles" / "mini-imagenet-cache-test.pkl"
    path.write_bytes(pickle.dumps(Touch()))
    with pytest.raises(DataError, match="it asks for"):
        MiniImageNet(root=str(tmp_path / "pickles")).prepare()
    assert not (tmp_path / "attacked").exists()
    pickle.loads(path.read_bytes())  # the attack is a real one
    assert (tmp_path / "attacked").exists()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """All classes of miniImageNet and one more, with six images each, as ILSVRC-2012 unpacks."""
    folder = tmp_path / "imagenet" / "train"
    write_class_folders(folder, {".": [*RAVI.split(), "n99999999"]}, images=6, side=8)
    for path in [*folder.rglob("*.jpg")]:  # numbers are not in order of text
        path.rename(path.with_name(f"{path.parent.name}_{(1, 3, 20, 111, 1000, 20000)[int(path.stem)]}.JPEG"))
    (tmp_path / "imagenet" / "val").mkdir()
    (tmp_path / "imagenet" / "test").mkdir()
    return folder


def test_a_tree_of_imagenet_with_the_lists(tree: Path, tmp_path: Path) -> None:
    names = {split: [name for name, own in RAVI.split().items() if own == split] for split in SPLITS}
    write_lists(tree.parent, names, [6, 2, 3])
    data = MiniImageNet(image_size=8, root=str(tmp_path))
    assert str(data.location()).startswith(f"{tree} (ILSVRC-2012's training images by class, those that train.csv")
    for split in SPLITS:
        assert classes(data, split).names == tuple(sorted(names[split]))
        numbers = [[round(green * 51 / 42.5) for green in own] for own in greens(data, split)]  # 6 images, not 5
        assert numbers == [[5, 1, 2]] * len(names[split])
    write_lists(tree.parent, names, [7])
    with pytest.raises(DataError, match=r"has 6 images, and .*imagenet lists number 7: the copy is not complete"):
        MiniImageNet(image_size=9, root=str(tmp_path)).prepare()
    write_lists(tree.parent, names, [0])
    with pytest.raises(DataError, match=r"which is not <WordNet id><number>\.jpg"):
        MiniImageNet(image_size=9, root=str(tmp_path)).prepare()


@pytest.mark.parametrize("by", ["place", "root", "the tree as root"])
def test_a_tree_of_imagenet_alone(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    monkeypatch.setenv("QUICKSTUDY_DATA", str(tmp_path))
    data = MiniImageNet(image_size=8, root={"root": str(tree.parent), "the tree as root": str(tree)}.get(by))
    assert "the first 600 of each (not the published ones" in str(data.location())
    assert sum(len(classes(data, split)) for split in SPLITS) == 100
    assert classes(data, "test").counts.tolist() == [6] * 20
    shutil.rmtree(tree / "n02110341")
    with pytest.raises(DataError, match=r"lacks 1 of the 100 classes of Ravi and Larochelle's .* as n02110341"):
        MiniImageNet(image_size=9, root=str(tree)).prepare()
