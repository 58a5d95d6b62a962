"""Folders, lists, arrays and PyTorch datasets of a user's own."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import read_twice, write_class_folders
from PIL import Image
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, TensorDataset

from quickstudy.data import (
    ArrayFile,
    Arrays,
    Dataset,
    ImageClasses,
    ImageFolder,
    ImageList,
    RandomFlip,
    TransformedTasks,
)
from quickstudy.data.base import SPLITS
from quickstudy.data.reader import reader_of
from quickstudy.data.splitting import draw_split
from quickstudy.engine.recipe import instantiate, parse_recipe
from quickstudy.errors import DataError
from quickstudy.task import TaskShape

NAMES = [f"animal{number:02d}" for number in range(10)]
GIVEN = {"train": NAMES[:5], "val": NAMES[5:7], "test": NAMES[7:]}


def names_of(data: Dataset) -> dict[str, set[str]]:
    found = {}
    for split in SPLITS:
        source = data.split(split)
        assert isinstance(source, ImageClasses)
        found[split] = set(source.names)
    return found


def reds(data: Dataset) -> dict[str, int]:
    """The red of each class, which is its number in tenths of 255."""
    found = {}
    for split in SPLITS:
        source = data.split(split)
        assert isinstance(source, ImageClasses)
        for c, name in enumerate(source.names):
            found[name] = round(source.of_class(c)[:, 0].float().mean().item() / 25.5) - 1
    return found


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return write_class_folders(tmp_path / "own" / "pets", {".": NAMES}, images=5, side=(20, 16))


def drawn(seed: int = 0) -> dict[str, set[str]]:
    split_of = draw_split(NAMES, seed)
    return {split: {name for name in NAMES if split_of[name] == split} for split in SPLITS}


def zipped(folder: Path, path: Path) -> Path:
    return Path(shutil.make_archive(str(path), "zip", folder.parent, folder.name))


def listed(pets: Path, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["label", "path", "more"])
        for image in pets.rglob("*.jpg"):
            rows.writerow([image.parent.name, f"../own/pets/{image.parent.name}/{image.name}", ""])
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "list"])
def test_a_drawn_split_is_kept_beside_the_images(pets: Path, tmp_path: Path, kind: str) -> None:
    root = {
        "folder": lambda: pets,
        "zip": lambda: zipped(pets, tmp_path / "other" / "pets"),
        "list": lambda: listed(pets, tmp_path / "other" / "pets.csv"),
    }[kind]()
    data = ImageFolder(str(root), image_size=8)
    assert data.name == "pets"
    assert "packed at first use" in str(data.location())
    assert names_of(data) == drawn()
    assert reds(data) == {name: number for number, name in enumerate(NAMES)}
    assert str(data.location()).startswith("packed in")
    kept = root.parent / f"{root.name}.splits.json"
    assert {split: set(names) for split, names in json.loads(kept.read_text()).items()} == drawn()
    assert names_of(ImageFolder(str(root), seed=1, image_size=8)) == drawn()  # it is not drawn again
    kept.unlink()
    assert names_of(ImageFolder(str(root), seed=1, image_size=8)) == drawn(1) != drawn()


def test_what_comes_or_goes_is_noticed(pets: Path) -> None:
    first = ImageFolder(str(pets), image_size=8)
    names_of(first)
    assert ImageFolder(str(pets), image_size=8).store == first.store
    Image.new("RGB", (9, 9), (255, 255, 255)).save(pets / NAMES[0] / "0000.jpg")
    changed = ImageFolder(str(pets), image_size=8)
    assert changed.store != first.store
    assert reds(changed)[NAMES[0]] != 0
    write_class_folders(pets, {".": ["newcomer"]}, side=8)
    with pytest.raises(DataError, match=r"pets.splits.json: 1 classes are in none of the splits: 'newcomer'; edit"):
        ImageFolder(str(pets), image_size=8).split("train")
    shutil.rmtree(pets / "newcomer")
    shutil.rmtree(pets / NAMES[3])
    with pytest.raises(DataError, match=f"are not there: '{NAMES[3]}'"):
        ImageFolder(str(pets), image_size=8).prepare()


@pytest.mark.parametrize("by", ["lists", "file"])
def test_a_split_that_is_given(pets: Path, tmp_path: Path, by: str) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(GIVEN))
    data = ImageFolder(str(pets), splits=GIVEN if by == "lists" else str(tmp_path / "mine.json"), image_size=8)
    assert names_of(data) == {split: set(names) for split, names in GIVEN.items()}
    assert not list(pets.parent.glob("*.json"))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_classes_that_lie_split(tmp_path: Path, kind: str) -> None:
    folder = write_class_folders(tmp_path / "own" / "mine", GIVEN, side=8)
    root = folder if kind == "folder" else zipped(folder, tmp_path / "mine")
    data = ImageFolder(str(root), image_size=8)
    assert names_of(data) == {split: set(names) for split, names in GIVEN.items()}
    assert not list(tmp_path.rglob("*.splits.json"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no "),
        (lambda path: path.mkdir(), "has no images in folders of classes"),
        (lambda path: (path / "train" / "a").mkdir(parents=True), "has no image"),
        (
            lambda path: write_class_folders(path, {"train": ["a"], "test": ["b"]}),
            "has train and test, and needs",
        ),
        (lambda path: write_class_folders(path, {".": ["a", "b"]}), "2 classes cannot be split"),
        (
            lambda path: write_class_folders(path, {split: ["a"] for split in SPLITS}),
            "the class a in both train/",
        ),
    ],
)
def test_what_cannot_serve(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "mine")
    data = ImageFolder(str(tmp_path / "mine"), image_size=8)
    assert data.location() is None
    with pytest.raises(DataError, match=message):
        data.prepare()


def test_an_image_that_cannot_be_read_is_named(pets: Path) -> None:
    (pets / NAMES[2] / "0001.jpg").write_bytes(b"none")
    data = ImageFolder(str(pets), image_size=8)
    with pytest.raises(DataError, match=rf"cannot read the image .*{NAMES[2]}/0001.jpg: .* replace or remove it$"):
        data.split("train")
    (pets / NAMES[2] / "0001.jpg").unlink()
    assert sum(map(len, names_of(ImageFolder(str(pets), image_size=8)).values())) == 10


@pytest.mark.parametrize("kind", ["folder", "zip", "list"])
def test_photographs_are_packed_as_they_are_read_for_a_prediction(tmp_path: Path, kind: str) -> None:
    root, exif = tmp_path / "pets", Image.Exif()
    for number, name in enumerate(NAMES):
        exif[0x0112] = number % 8 + 1  # how to turn it to see it upright
        (root / name).mkdir(parents=True)
        pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name / "0.png", exif=exif)
    paths = sorted(root.rglob("*.png"))
    data = {
        "folder": lambda: ImageFolder(str(root), image_size=8, resize="crop"),
        "zip": lambda: ImageFolder(str(zipped(root, tmp_path / "other")), image_size=8, resize="crop"),
        "list": lambda: ImageList([(str(path), path.parent.name) for path in paths], image_size=8, resize="crop"),
    }[kind]()
    found = {}
    for split in SPLITS:
        source = data.split(split)
        assert isinstance(source, ImageClasses)
        found |= {name: source.of_class(c)[0].numpy() for c, name in enumerate(source.names)}
    reader = reader_of((3, 8, 8), data)
    assert reader is not None
    for path in paths:
        assert np.array_equal(found[path.parent.name], reader.pixels(path))


def test_a_store_of_before_photographs_were_turned_is_not_taken(pets: Path) -> None:
    assert "-v2-" in ImageFolder(str(pets), image_size=8).store.name


def test_greys_of_16_bits_are_packed_scaled(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        (tmp_path / "pets" / name).mkdir(parents=True)
        greys = np.full((9, 9), 2570 * (number + 1), np.uint16)
        Image.fromarray(greys).save(tmp_path / "pets" / name / "0.png")
    data = ImageFolder(str(tmp_path / "pets"), image_size=8)
    for split in SPLITS:
        source = data.split(split)
        assert isinstance(source, ImageClasses)
        for c, name in enumerate(source.names):
            assert (source.of_class(c) == 10 * (NAMES.index(name) + 1)).all()


def test_a_list_of_files(pets: Path) -> None:
    pairs = [(str(path), path.parent.name) for path in sorted(pets.rglob("*.jpg"))]
    data = ImageList(pairs, name="pets", image_size=8, resize="crop")
    assert names_of(data) == drawn()
    assert reds(data) == {name: number for number, name in enumerate(NAMES)}
    assert "50 listed images" not in str(data.location())  # packed
    assert names_of(ImageList(pairs, GIVEN, image_size=8)) == {split: set(names) for split, names in GIVEN.items()}
    with pytest.raises(DataError, match="No such file or directory; add or remove it"):
        ImageList([*pairs, ("none.jpg", NAMES[0])], image_size=8).prepare()
    assert ImageList(zip(*zip(*pairs)), image_size=8).images == pairs  # type: ignore[arg-type]
    assert names_of(ImageList(np.array(pairs), image_size=8)) == drawn()  # type: ignore[arg-type]
    with pytest.raises(DataError, match="a list of images is one of pairs"):
        ImageList([path for path, _ in pairs])  # type: ignore[misc]
    assert not list(pets.parent.glob("*.json"))


def test_a_recipe_of_a_folder(pets: Path) -> None:
    recipe = f"""
    dataset:
      class_path: quickstudy.data.ImageFolder
      init_args:
        root: {pets}
        image_size: 12
        splits: {json.dumps(GIVEN)}
        train_transforms:
          - class_path: quickstudy.data.RandomTurn
    method:
      class_path: quickstudy.methods.ProtoNet
      init_args: {{backbone: {{class_path: quickstudy.nn.Conv4}}}}
    train: {{task: {{way: 3, shot: 1, queries: 2}}}}
    """
    source = instantiate(read_twice(recipe)).dataset.split("train")
    assert isinstance(source, TransformedTasks)
    assert source.tasks(TaskShape(3, 1, 2), 0, 2, seed=0).query_x.shape == (2, 6, 3, 12, 12)


# ------------------------------------------------------------------ arrays

RNG = np.random.default_rng(0)
Y = np.repeat(np.arange(6), 7)


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (RNG.integers(0, 256, (42, 8, 9), dtype=np.uint8), (1, 8, 9)),
        (RNG.integers(0, 256, (42, 8, 9, 3), dtype=np.uint8), (3, 8, 9)),
        (RNG.integers(0, 256, (42, 3, 8, 9), dtype=np.uint8), (3, 8, 9)),
        (torch.from_numpy(RNG.integers(0, 256, (42, 1, 8, 9), dtype=np.uint8)), (1, 8, 9)),
        (RNG.normal(size=(42, 5)), (5,)),
        (RNG.integers(0, 9, (42, 4, 2)), (4, 2)),
        ([[float(i), 1.0] for i in range(42)], (2,)),
    ],
)
@pytest.mark.parametrize("y", [Y, [f"c{label}" for label in Y], torch.from_numpy(Y), RNG.permutation(Y)])
def test_arrays_are_a_dataset(x: Any, shape: tuple[int, ...], y: Any) -> None:
    data = Arrays(x, y, seed=2)
    task = data.split("train").tasks(TaskShape(2, 1, 3), 0, 5, seed=0)
    assert task.query_x.shape == (5, 6, *shape)
    assert task.query_x.dtype == torch.float32
    labels = np.array([str(label) for label in (y.tolist() if hasattr(y, "tolist") else y)])
    whole = torch.as_tensor(np.asarray(x))
    for split, names in names_of(data).items():
        assert names == {name for name, own in draw_split(labels, 2).items() if own == split}
        source = data.split(split)
        assert isinstance(source, ImageClasses)
        for c, name in enumerate(source.names):
            own = whole[torch.from_numpy(labels == name)]
            expected = own.movedim(3, 1) if own.dim() == 4 and own.shape[3] == 3 else own
            assert torch.equal(source.of_class(c).flatten(1).double(), expected.flatten(1).double().float().double())
    assert data.location() == "in memory"
    images = isinstance(x, torch.Tensor | np.ndarray) and str(x.dtype).endswith("uint8")
    assert (task.query_x.max() <= 1) == images


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((3, 4)), [0, 1], "a class for each example; got 3 and 2"),
        (np.zeros(3), [0, 1, 2], r"\[n, ...\], at least one; got \[3\]"),
        (np.array([["a"], ["b"]]), [0, 1], "numbers of one shape"),
        ([np.zeros(3), np.zeros(4)], [0, 1], "numbers of one shape"),
        (np.zeros((2, 4)), np.eye(2), r"the classes are to be \[n\], numbers or names, one"),
        (np.zeros((2, 4)), [0, 1], "2 classes cannot be split"),
        (np.zeros((2, 9, 9, 4), np.uint8), [0, 1], r"1 or 3 channels; got \[2, 9, 9, 4\]: leave transparency out"),
    ],
)
def test_arrays_that_do_not_fit(x: Any, y: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Arrays(x, y)


def test_bytes_that_are_no_images_are_numbers() -> None:
    x = np.arange(42 * 5, dtype=np.uint8).reshape(42, 5)
    assert torch.equal(Arrays(x, Y).x, torch.from_numpy(x).float())


def test_arrays_may_be_transformed() -> None:
    data = Arrays(np.zeros((42, 8, 8, 3), np.uint8), Y, name="mine", train_transforms=[RandomFlip()])
    assert isinstance(data.split("train"), TransformedTasks)
    assert isinstance(data.split("val"), ImageClasses)
    assert data.split("val").title == "mine, meta-validation classes"


class Pictures(TorchDataset):
    def __init__(self, side: int = 8) -> None:
        self.side = side

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return Image.new("RGB", (8, self.side + index % 2), (index, 0, 0)), "abcd"[index % 4]


class EvenPictures(Pictures):
    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return Image.new("RGB", (8, 8), (index, 0, 0)), "abcd"[index % 4]


def test_any_torch_dataset_is_one() -> None:
    x = torch.rand(42, 3, 8, 8)
    data = Arrays.from_dataset(TensorDataset(x, torch.from_numpy(Y)), seed=1)
    assert names_of(data) == names_of(Arrays(x, Y, seed=1))
    source = data.split("val")
    assert isinstance(source, ImageClasses)
    assert torch.equal(source.images, Arrays(x, Y, seed=1).split("val").images)  # type: ignore[attr-defined]
    pictures = Arrays.from_dataset(EvenPictures(), splits={"train": ["a", "b"], "val": ["c"], "test": ["d"]}).split(
        "test"
    )
    assert isinstance(pictures, ImageClasses)

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
            return zip(x, Y)

    assert names_of(Arrays.from_dataset(Stream(), seed=1)) == names_of(data)
    with pytest.raises(DataError, match="are to be pairs, each an example and its class"):
        Arrays.from_dataset(TensorDataset(x))
    assert pictures.images[:, 0, 0, 0].tolist() == [3, 7, 11]
    with pytest.raises(DataError, match=r"of one shape; got \(8, 8, 3\), \(9, 8, 3\): resize or crop them"):
        Arrays.from_dataset(Pictures())
    assert len(Arrays.from_dataset(iter([(np.ones(2), c) for c in "abc" * 2])).y) == 6


def test_a_file_of_arrays_in_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    recipe = f"""
    dataset: {{class_path: quickstudy.data.ArrayFile, init_args: {{path: {path}}}}}
    method:
      class_path: quickstudy.methods.ProtoNet
      init_args: {{backbone: {{class_path: quickstudy.nn.Conv4}}}}
    train: {{task: {{way: 2, shot: 1, queries: 2}}}}
    """
    dataset = instantiate(parse_recipe(recipe)).dataset
    assert dataset.name == "mine"
    assert dataset.location() is None
    np.savez(path, x=np.zeros((42, 3, 8, 8), np.uint8), y=Y)
    assert dataset.location() == f"in {path}"
    first = names_of(dataset)
    assert names_of(ArrayFile(str(path), seed=5)) == first  # kept
    assert (tmp_path / "mine.npz.splits.json").exists()


@pytest.mark.parametrize(
    "content",
    [None, b"", b"no zip", b"PK\x03\x04 cut", {"x": np.zeros((2, 2))}, {"x": np.array([{}]), "y": np.zeros(1)}],
)
def test_a_file_without_arrays(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "mine.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises(DataError, match=r"cannot read .*mine.npz: .*; write it by numpy.savez"):
        ArrayFile(str(path)).split("train")
