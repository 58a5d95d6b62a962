import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quickstudy.data import omniglot
from quickstudy.data.omniglot import Half, Omniglot
from quickstudy.data.paths import remember_place
from quickstudy.errors import DataError
from quickstudy.task import TaskShape

ALPHABETS = ("Aa", "Bb", "Cc", "Dd", "Ee", "Ff", "Gg")
PAPER = np.full((105, 105), True)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(file, format="PNG")
    return file.getvalue()


def drawing(character: int, drawer: int) -> bytes:
    """A bar at a place of its own for each character and drawer, black on white."""
    pixels = PAPER.copy()
    pixels[10 * character : 10 * character + 10, 2 * drawer : 2 * drawer + 50] = False
    return png(pixels)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """Omniglot in small: seven background alphabets of two characters, one evaluation alphabet of three."""
    halves = (Half("images_background", 14, "?"), Half("images_evaluation", 3, "?"))
    monkeypatch.setattr(omniglot, "HALVES", halves)
    monkeypatch.setattr(omniglot, "BACKGROUND", halves[0])
    contents = (dict.fromkeys(ALPHABETS, 2), {"Zz": 3})
    return {
        half.name: {
            f"{half.name}/{alphabet}/character{c:02d}/{n:04d}_{d:02d}.png": drawing(c, d)
            for alphabet, count in content.items()
            for n, c in enumerate(range(1, count + 1))
            for d in range(1, 21)
        }
        for half, content in zip(halves, contents)
    }


@pytest.fixture
def root(small: dict[str, dict[str, bytes]], make_zip: Callable[..., Path]) -> Path:
    for name, files in small.items():
        make_zip(files, f"own/{name}.zip")
    return make_zip({}, "own/other.zip").parent


def test_background_split_keeps_the_last_five_alphabets_for_validation(root: Path) -> None:
    data = Omniglot("background", root=str(root))
    train, val, test = (data.split(s) for s in ("train", "val", "test"))
    assert train.names == ("Aa/character01", "Aa/character02", "Bb/character01", "Bb/character02")
    assert {name.split("/")[0] for name in val.names} == {"Cc", "Dd", "Ee", "Ff", "Gg"}
    assert test.names == ("Zz/character01", "Zz/character02", "Zz/character03")
    assert test.title == "omniglot (background split), meta-test classes"
    assert len(Omniglot("background", rotations=True, root=str(root)).split("test")) == 12


def test_images_are_inverted_and_shrunk(root: Path) -> None:
    images = Omniglot("background", root=str(root)).split("train").images
    assert images.shape == (17 * 20, 1, 28, 28)
    assert images.dtype == torch.uint8
    ink = Omniglot("background", root=str(root)).split("train").of_class(1)[0, 0]  # rows 20-29, columns 2-51
    assert ink.max() == 255
    assert ink[:4].max() == 0
    assert ink.float().sum() == pytest.approx(255 * 500 * (28 / 105) ** 2, rel=0.05)


def test_full_size_is_the_original(root: Path) -> None:
    image = Omniglot("background", image_size=105, root=str(root)).split("test").of_class(0)[4, 0]
    expected = torch.zeros(105, 105, dtype=torch.uint8)
    expected[10:20, 10:60] = 255
    assert torch.equal(image, expected)


def test_unzipped_folders_give_the_same(root: Path, small: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    for files in small.values():
        for name, content in {**files, "images_background/Aa/.DS_Store": b"x"}.items():
            (tmp_path / "folders" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "folders" / name).write_bytes(content)
    zipped = Omniglot("background", root=str(root)).split("val")
    folders = Omniglot("background", root=str(tmp_path / "folders")).split("val")
    assert zipped.names == folders.names
    assert torch.equal(zipped.images, folders.images)


@pytest.mark.parametrize("below", ["", "omniglot"])
def test_own_data_is_found_and_never_written_to(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    if below:
        (tmp_path / "data").mkdir()
        root = root.rename(tmp_path / "data" / below).parent
    monkeypatch.setenv("QUICKSTUDY_DATA", str(root))
    before = sorted(root.rglob("*"))
    assert len(Omniglot("background").split("test")) == 3
    assert sorted(root.rglob("*")) == before


def test_a_remembered_place_comes_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTUDY_DATA", "nowhere")
    assert Omniglot("background").location() is None
    remember_place("omniglot", root)
    assert len(Omniglot("background").split("test")) == 3


def test_packed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Omniglot("background", root=str(root)).split("test")
    monkeypatch.setattr(omniglot, "read_all", None)
    assert torch.equal(Omniglot("background", root=str(root)).split("test").images, first.images)


def test_missing_data_names_every_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTUDY_DATA", str(tmp_path / "mine"))
    with pytest.raises(DataError) as raised:
        Omniglot().split("train")
    for way in ("quickstudy data get omniglot", "set QUICKSTUDY_DATA", "`root`", "mine/omniglot", "cache/downloads"):
        assert way in str(raised.value)


def test_a_corrupt_image_is_named_and_nothing_is_left(
    small: dict[str, dict[str, bytes]], make_zip: Callable[..., Path], cache: Path
) -> None:
    bad = "images_background/Dd/character02/0001_07.png"
    small["images_background"][bad] = small["images_background"][bad][:60]
    paths = [make_zip(files, f"own/{name}.zip") for name, files in small.items()]
    with pytest.raises(DataError, match=rf"cannot read the image {bad} in .*images_background\.zip: .*damaged"):
        Omniglot(root=str(paths[0].parent)).prepare()
    assert list((cache / "stores").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.popitem(), r"has 19 images of Zz/character03, not 20; it is not complete"),
        (lambda files: [files.popitem() for _ in range(20)], r"has 2 characters of images_evaluation, not 3"),
        (lambda files: files.update({next(iter(files)): png(PAPER[:50])}), r"is 105×50 pixels, not 105×105"),
        (lambda files: files.update({next(iter(files)): b"<html>"}), r"no known image format"),
    ],
)
def test_incomplete_data(
    small: dict[str, dict[str, bytes]], make_zip: Callable[..., Path], change: Callable, message: str
) -> None:
    change(small["images_evaluation"])
    paths = [make_zip(files, f"own/{name}.zip") for name, files in small.items()]
    with pytest.raises(DataError, match=message):
        Omniglot(root=str(paths[0].parent)).prepare()


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match="'vinyals' and 'background', not 'lake'"):
        Omniglot("lake")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="1 to 105"):
        Omniglot(image_size=106)


@pytest.fixture(scope="module")
def real(own_data: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Omniglot]:
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("omniglot"))
        patch.setenv("QUICKSTUDY_CACHE", cache)
        patch.setenv("QUICKSTUDY_DATA", own_data)
        try:
            Omniglot().prepare()
        except DataError as error:
            pytest.skip(str(error))

    def make(monkeypatch: pytest.MonkeyPatch, **settings: object) -> Omniglot:
        monkeypatch.setenv("QUICKSTUDY_CACHE", cache)
        return Omniglot(**settings)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, (1028, 172, 423)),
        ({"rotations": True}, (4112, 688, 1692)),
        ({"split": "background"}, (813, 151, 659)),
    ],
)
def test_real_class_counts(
    real: Callable, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], counts: tuple[int, ...]
) -> None:
    splits = [real(monkeypatch, **settings).split(s) for s in ("train", "val", "test")]
    assert tuple(map(len, splits)) == counts
    assert len({name for split in splits for name in split.names}) == sum(counts)
    assert all((split.counts == 20).all() for split in splits)


def test_real_images_are_ink_on_paper(real: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    images = real(monkeypatch).split("test").images
    assert images.shape == (32_460, 1, 28, 28)
    corners = images[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.float().mean() < 2
    assert (images.amax((1, 2, 3)) > 100).all()
    assert 10 < images.float().mean() < 40
    task = real(monkeypatch).split("val").tasks(TaskShape(20, 5, 15), 0, 2, seed=0)
    assert task.support_x.shape == (2, 100, 1, 28, 28)
