"""A picture becomes what the dataset would have made of it, in whatever form it comes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import published_classes, write_class_folders
from PIL import Image

from quickstudy.data import CIFARFS, Arrays, CenterCrop, Glyphs, Normalise, Omniglot, RandomCrop
from quickstudy.data.archive import GIB, Member, open_files
from quickstudy.data.omniglot import read_ink
from quickstudy.data.reader import AnyPicture, ArrayReader, PictureReader, picture_size, readable, reader_of
from quickstudy.errors import DataError, InputError
from quickstudy.task import TaskShape


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_files_are_read_as_the_dataset_reads_them(tmp_path: Path, resize: str) -> None:
    root = write_class_folders(tmp_path / "cifar-fs", published_classes("cifar-fs", 2, 2, 2), side=(40, 30))
    transforms = [CenterCrop(12), Normalise([0.5], [0.2])]
    dataset = CIFARFS(image_size=16, resize=resize, test_transforms=transforms, root=str(root))  # type: ignore[arg-type]
    task = dataset.split("test").tasks(TaskShape(2, 3, 1), 0, 1, seed=0)[0]
    reader = reader_of(task.support_x.shape[1:], dataset)
    assert reader is not None
    found = reader(sorted((root / "test").glob("*/*.jpg")))
    assert found.shape == (8, 3, 12, 12)
    own = torch.cat([task.support_x, task.query_x])
    assert (own[:, None] == found[None]).flatten(2).all(-1).any(1).all()


def test_ink_on_paper_as_in_omniglot(own_data: str, tmp_path: Path) -> None:
    source = open_files(Path(own_data) / "omniglot" / "images_evaluation.zip", limit=GIB)
    names = [name for name in sorted(source.names) if name.endswith(".png")][::1000]
    assert len(names) > 10
    reader = reader_of((1, 28, 28), Omniglot())
    assert reader is not None
    for name in names:
        (tmp_path / "picture.png").write_bytes(source.read(name))
        assert np.array_equal(reader.pixels(tmp_path / "picture.png"), read_ink(Member(source, name), 28))


def test_ink_is_bright_whatever_it_was() -> None:
    page = np.full((28, 28), 230, np.uint8)
    page[10:18, 10:12] = 20
    reader = reader_of((1, 28, 28), Glyphs())
    assert reader is not None
    dark_on_bright, bright_on_dark = reader([page, 255 - page])
    assert torch.equal(dark_on_bright, bright_on_dark)
    assert dark_on_bright[0, 14, 11] > 0.9
    photograph = reader_of((1, 28, 28))
    assert photograph is not None
    assert torch.allclose(photograph([page])[0, 0], torch.from_numpy(page) / 255)


@pytest.mark.parametrize(("channels", "side"), [(1, 6), (3, 5), (3, 8)])
def test_tasks_of_another_dataset_are_read_as_its_pictures_are(channels: int, side: int) -> None:
    x = np.random.default_rng(0).integers(0, 256, (24, 6, 6, 3)).astype(np.uint8)
    source = Arrays(x, np.arange(24) // 4, {"train": ["0", "1"], "val": ["2", "3"], "test": ["4", "5"]}).split("test")
    reader = PictureReader(channels, side, transforms=[CenterCrop(4), Normalise([0.5], [0.2])])
    task = reader.tasks(source).tasks(TaskShape(2, 3, 1), 0, 1, seed=0)[0]
    found, pictures = torch.cat([task.support_x, task.query_x]), reader(x[16:])
    assert found.shape == pictures.shape == (8, channels, 4, 4)
    off = (found[:, None] - pictures[None]).flatten(2).abs().amax(-1)
    assert off.amin(1).max() < 2.1 / 255 / 0.2  # pictures are rounded to grey levels before the transforms
    assert sorted(off.argmin(1).tolist()) == list(range(8))


def colour() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [6, 4, 9])
def test_every_form_of_a_picture_gives_the_same(channels: int, side: int, tmp_path: Path) -> None:
    pixels = colour()
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    reader = PictureReader(channels, side)
    first, *others = reader(
        [
            tmp_path / "picture.png",
            str(tmp_path / "picture.png"),
            Image.fromarray(pixels),
            pixels,
            pixels.astype(np.int64),
            pixels / 255,
            (pixels / 255).astype(np.float32),
            pixels.transpose(2, 0, 1),
            torch.from_numpy(pixels).movedim(2, 0) / 255,
            np.dstack([pixels, np.full((6, 6), 9, np.uint8)]),
        ]
    )
    assert first.shape == (channels, side, side)
    assert all(torch.equal(first, other) for other in others)


def test_grey_arrays() -> None:
    pixels = colour()[..., 0]
    forms = [pixels, pixels[None], pixels[..., None], pixels / 255, Image.fromarray(pixels), pixels.tolist()]
    first, *others = PictureReader(3, 6)(forms)
    assert torch.allclose(first, (torch.from_numpy(pixels) / 255).expand(3, 6, 6))
    assert all(torch.equal(first, other) for other in others)
    mask = pixels > 100
    assert torch.equal(PictureReader(1, 6)([mask])[0, 0], torch.from_numpy(mask).float())


def test_photographs_that_lie_on_their_side_are_turned(tmp_path: Path) -> None:
    picture = Image.fromarray(colour())
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    picture.save(tmp_path / "turned.png", exif=exif)
    found = PictureReader(3, 6)([tmp_path / "turned.png", picture.rotate(-90, expand=True)])
    assert torch.equal(*found)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_greys_of_16_bits_are_scaled(suffix: str, channels: int, tmp_path: Path) -> None:
    greys = np.random.default_rng(0).integers(0, 256, (6, 6)).astype(np.uint16)
    off = np.random.default_rng(1).integers(-128, 129, (6, 6))  # less than half a grey of 8 bits
    fine = np.clip(257 * greys.astype(int) + off, 0, 65535).astype(np.uint16)
    path = tmp_path / f"fine.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(fine).save(path)
    Image.fromarray(fine).save(tmp_path / f"turned.{suffix}", exif=exif)
    big = Image.frombytes("I;16B", (6, 6), fine.astype(">u2").tobytes())
    with Image.open(path) as opened:
        forms = [path, opened, Image.fromarray(fine), big, Image.fromarray(fine.astype(np.int32))]
        found = PictureReader(channels, 6)(forms)
    assert torch.allclose(found, (torch.from_numpy(greys.astype(np.float32)) / 255).expand(5, channels, 6, 6))
    turned = PictureReader(channels, 6)([tmp_path / f"turned.{suffix}"])[0]
    assert torch.equal(turned, torch.rot90(found[0], -1, (1, 2)))


@pytest.mark.parametrize(
    ("greys", "expected"),
    [
        (np.array([[0, 7], [200, 255]], np.int32), [[0, 7], [200, 255]]),
        (np.array([[0, 7], [200, 256]], np.int32), [[0, 0], [1, 1]]),
        (np.array([[0, 7], [200, 255]], np.uint16), [[0, 0], [1, 1]]),
        (np.array([[0, 7], [200, 255]], np.float32), [[0, 7], [200, 255]]),
        (np.array([[0, 0.2], [0.5, 1]], np.float32), [[0, 51], [128, 255]]),
    ],
)
def test_the_range_of_greys_says_what_white_is(greys: np.ndarray, expected: list[list[int]]) -> None:
    assert PictureReader(1, 2).pixels(Image.fromarray(greys))[0].tolist() == expected


@pytest.mark.parametrize(
    ("greys", "message"),
    [
        (np.array([[0, 65536]], np.int32), "mode I and greys from 0 to 65536, where 0 to 255 or 0 to 65535 is"),
        (np.array([[-1, 7]], np.int32), "mode I and greys from -1 to 7"),
        (np.array([[0, 255.5]], np.float32), "mode F and greys from 0 to 255.5, where 0 to 1 or 0 to 255 is expected"),
        (np.array([[-0.5, 0.5]], np.float32), "mode F and greys from -0.5 to 0.5"),
        (np.array([[0, np.nan]], np.float32), "mode F and greys from nan to nan"),
    ],
)
def test_greys_of_an_unknown_range_are_refused(greys: np.ndarray, message: str, tmp_path: Path) -> None:
    picture = Image.fromarray(greys)
    with pytest.raises(DataError, match=f"the image in memory has the {message}.*: scale them"):
        PictureReader(3, 6)([picture])
    picture.save(tmp_path / "odd.tiff")
    with pytest.raises(DataError, match=f"the image .*odd.tiff has the {message}.*: scale them"):
        PictureReader(3, 6)([tmp_path / "odd.tiff"])
    assert readable([tmp_path / "odd.tiff"])[0] == []


def test_a_picture_whose_exif_is_damaged_is_taken_as_it_lies(tmp_path: Path) -> None:
    Image.fromarray(colour()).save(tmp_path / "picture.png", exif=b"Exif\0\0none")
    assert torch.equal(*PictureReader(3, 6)([tmp_path / "picture.png", colour()]))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_paper(mode: str, tmp_path: Path) -> None:
    ink = np.zeros((8, 8, 4), np.uint8)  # black on black, as drawing programs export it
    ink[:, :4, 3] = 255
    picture = Image.fromarray(ink).convert(mode)
    picture.save(tmp_path / "drawn.png")
    reader = reader_of((3, 8, 8))
    assert reader is not None
    for form in (picture, tmp_path / "drawn.png"):
        found = reader([form])[0]
        assert (found[..., :4] == 0).all()
        assert (found[..., 4:] == 1).all()


def test_a_random_transform_does_not_make_a_prediction_random() -> None:
    reader = PictureReader(3, 6, transforms=[RandomCrop(4, padding=0)])
    assert torch.equal(reader([colour()]), reader([colour()]))


@pytest.mark.parametrize("shape", [(3,), (5, 4), (3, 6, 8), (12, 6, 6)])
def test_what_is_no_square_image_is_read_as_an_array(shape: tuple[int, ...]) -> None:
    assert picture_size(shape) is None
    assert reader_of(shape) == ArrayReader()


def test_what_was_no_picture_is_read_as_an_array() -> None:
    x, y = np.random.default_rng(0).normal(size=(60, 1, 8, 8)), np.arange(60) // 6
    for numbers in (x, x.clip(0, 1), (x > 0).astype(np.int64), np.zeros((60, 1, 8, 9), np.uint8)):
        assert picture_size((1, 8, 8), Arrays(numbers, y)) is None
    assert picture_size((1, 8, 8), Arrays(np.zeros((60, 1, 9, 9), np.uint8), y)) == 9


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros(6), r"got \[6\].*flat rows want reshaping"),
        (np.zeros((2, 6, 6)), r"1, 3 or 4 channels; got \[2, 6, 6\]"),
        (np.zeros((0, 6)), "an array of pixels; got ndarray"),
        (np.array([["a"]]), "an array of pixels; got ndarray"),
        (np.full((6, 6), 256), "got int64 from 256 to 256"),
        (np.full((6, 6), -1), "got int64 from -1 to -1"),
        (np.full((6, 6), 200.0), "floats from 0 to 1; got float64 from 200 to 200"),
        (np.full((6, 6), np.nan), "got float64 from nan to nan"),
        ({}, "got dict"),
    ],
)
def test_what_is_no_picture(picture: AnyPicture, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PictureReader(3, 6)([picture])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    good, broken, gone = (tmp_path / name for name in ("good.png", "broken.png", "gone.png"))
    Image.fromarray(colour()).save(good)
    broken.write_bytes(good.read_bytes()[:60])
    found, reasons = readable([broken, good, gone])
    assert found == [good]
    assert [str(path) in reason for path, reason in zip((broken, gone), reasons, strict=True)] == [True, True]
    with pytest.raises(DataError, match=r"broken\.png"):
        PictureReader(3, 6)([good, broken])
