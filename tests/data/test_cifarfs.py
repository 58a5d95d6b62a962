import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quickstudy.data.base import SPLITS
from quickstudy.data.cifarfs import CIFARFS, FC100
from quickstudy.data.decode import decode_image
from quickstudy.data.images import ImageClasses
from quickstudy.data.splitting import published_split
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
    assert str(data.location()).startswith(f"{archive} (train/, val/ and test/ with a folder")
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
        CIFARFS().prepare()
    for words in ("mine/cifar-fs\n", "quickstudy data get cifar-fs", "$QUICKSTUDY_DATA/cifar-fs.zip", "CIFAR-100"):
        assert words in str(raised.value)


def official(each: int = 2) -> bytes:
    """The archive of CIFAR-100 with few images: red is the class, green the number, blue how far right and below."""
    names = sorted(published_split("cifar-fs"))
    assert names == sorted(published_split("fc100"))
    contents: dict[str, object] = {"meta": {"fine_label_names": names, "coarse_label_names": ["a"]}}
    for first, part in ((0, "train"), (each, "test")):
        labels = [label for label in range(100) for _ in range(each)]
        data = np.zeros((len(labels), 3, 32, 32), np.uint8)
        data[:, 0] = np.array(labels)[:, None, None]
        data[:, 1] = (np.arange(len(labels)) % each + first)[:, None, None]
        data[:, 2] = np.arange(32)[:, None] + 4 * np.arange(32)
        order = np.random.default_rng(0).permutation(len(labels))
        contents[part] = {
            "data": data.reshape(-1, 3072)[order],
            "fine_labels": [labels[i] for i in order],
            "filenames": ["x.png"] * len(labels),
        }
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        members = {name: pickle.dumps(content, 2) for name, content in contents.items()}
        for name, content in {**members, "file.txt~": np.random.default_rng(0).bytes(50_000)}.items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize(("kind", "counts"), [(CIFARFS, (64, 16, 20)), (FC100, (60, 20, 20))])
def test_the_official_archive_is_downloaded_and_split(
    server: Any, monkeypatch: pytest.MonkeyPatch, cache: Path, kind: type[CIFARFS], counts: tuple[int, ...]
) -> None:
    content = official()
    monkeypatch.setattr(CIFARFS, "remotes", (server.remote("cifar-100-python.tar.gz", content),))
    server.break_after = [len(content) // 2]
    for _ in range(2):
        kind.get()
    assert [path for path, _ in server.asked] == ["/gone", *["/cifar-100-python.tar.gz"] * 2]
    FC100.get()
    CIFARFS.get()  # of the same file
    assert len(server.asked) == 3
    assert "cifar-100/cifar-100-python.tar.gz (cifar-100-python.tar.gz, or what" in str(kind().location())
    names = sorted(published_split("cifar-fs"))
    for split, count in zip(SPLITS, counts):
        source = kind().split(split)
        assert isinstance(source, ImageClasses)
        assert len(source) == count
        assert {published_split(kind.name)[name] for name in source.names} == {split}
        for c, name in enumerate(source.names):
            images = source.of_class(c)
            assert (images[:, 0] == names.index(name)).all()
            assert sorted(images[:2, 1, 0, 0].tolist()) + sorted(images[2:, 1, 0, 0].tolist()) == [0, 1, 2, 3]
        assert source.images[0, 2, :2, :2].tolist() == [[0, 4], [1, 5]]


def test_fc100_is_what_cifar_fs_has_split_anew(make_zip: Callable[..., Path]) -> None:
    names = sorted(published_split("cifar-fs"))
    files = {f"{published_split('cifar-fs')[name]}/{name}/0.webp": encoded(c, 0) for c, name in enumerate(names)}
    root = str(make_zip(files, "own/cifar-fs.zip").parent)
    for split, count in zip(SPLITS, (60, 20, 20)):
        source = FC100(root=root).split(split)
        assert isinstance(source, ImageClasses)
        assert source.names == tuple(name for name in names if published_split("fc100")[name] == split)
        assert len(source) == count
        assert source.images[:, 0, 0, 0].tolist() == [names.index(name) for name in source.names]
    make_zip({name: content for name, content in files.items() if "worm" not in name}, "own/cifar-fs.zip")
    with pytest.raises(DataError, match=r"lacks 1 of the 100 classes of Oreshkin et al\.'s split, such as worm"):
        FC100(root=root, image_size=8).prepare()


def test_the_folder_that_the_archive_unpacks_to(tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(official(1))) as archive:
        archive.extractall(tmp_path / "own", filter="data")
    for root in (tmp_path / "own", tmp_path / "own" / "cifar-100-python"):
        assert len(FC100(root=str(root)).split("train")) == 60
    (tmp_path / "own" / "cifar-100-python" / "test").unlink()
    with pytest.raises(DataError, match="fc100: in none of these places"):
        FC100(root=str(tmp_path / "own"), image_size=8).prepare()


@pytest.mark.parametrize("content", [{}, {"data": np.zeros((2, 7), np.uint8), "fine_labels": [0, 1]}, []])
def test_other_pickles_are_no_cifar(tmp_path: Path, content: object) -> None:
    with tarfile.open(fileobj=io.BytesIO(official(1))) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "cifar-100-python" / "test").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=r"cifar-100-python/test is damaged, or not what its name says"):
        CIFARFS(root=str(tmp_path)).prepare()


def test_the_pickles_of_the_archive_cannot_run_code(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "attacked",))

    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test", "meta"):
        (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps(Touch()))
    with pytest.raises(DataError, match="it asks for"):
        CIFARFS(root=str(tmp_path)).prepare()
    assert not (tmp_path / "attacked").exists()


def test_the_real_one_is_complete(own_data: str) -> None:
    path, layout = CIFARFS(root=own_data).source()
    files = layout.files(path)
    assert [len(files[split]) for split in SPLITS] == [64, 16, 20]
    assert {len(images) for split in SPLITS for images in files[split].values()} == {600}
    known = published_split("cifar-fs")
    assert all(known[name] == split for split in SPLITS for name in files[split])
    image = files["test"]["worm"][599]
    assert decode_image(image.read_bytes(), str(image), mode="RGB").size == (32, 32)


def test_published_images_are_packed_as_they_lie(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    for split, names in NAMES.items():
        for name in names:
            (tmp_path / "cifar-fs" / split / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / "cifar-fs" / split / name / "0.png", exif=exif)
    source = CIFARFS(root=str(tmp_path / "cifar-fs")).split("val")
    assert isinstance(source, ImageClasses)
    assert (source.images == torch.from_numpy(pixels).movedim(2, 0)).all()
