import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_class_folders
from PIL import Image

from quickstudy.data import arrays
from quickstudy.data.base import SPLITS, Split
from quickstudy.data.images import ImageClasses
from quickstudy.data.tieredimagenet import REN, TieredImageNet
from quickstudy.errors import DataError

COUNTS = {"train": 3, "val": 2, "test": 2}


def classes(data: TieredImageNet, split: Split) -> ImageClasses:
    source = data.split(split)
    assert isinstance(source, ImageClasses)
    return source


def test_the_split_is_that_of_ren_et_al() -> None:
    splits = list(REN.split().values())
    assert {split: splits.count(split) for split in SPLITS} == {"train": 351, "val": 97, "test": 160}


def image(label: int, number: int) -> np.ndarray:
    """Red is the class, green the number, blue neither."""
    return np.full((84, 84, 3), (30 * label, 20 * number, 200), np.uint8)


def png(pixels: np.ndarray) -> np.ndarray:
    """A file as OpenCV's ``imencode`` returns it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return np.frombuffer(file.getvalue(), np.uint8)[:, None]


def write_release(folder: Path, kind: str, *, words: bool, each: int = 4) -> None:
    folder.mkdir(parents=True)
    for split, count in COUNTS.items():
        labels = np.arange(count).repeat(each)
        images = [image(label, number) for label in range(count) for number in range(each)]
        named = {"label_specific_str": [f"{split} {c}" for c in range(count)], "label_general": labels}
        content = {"label_specific": labels, **named} if words else {"labels": [int(label) + 7 for label in labels]}
        (folder / f"{split}_labels.pkl").write_bytes(pickle.dumps(content, 2))
        if kind == "png":
            (folder / f"{split}_images_png.pkl").write_bytes(pickle.dumps([png(one) for one in images], 2))
        else:  # blue first
            save = np.savez if kind == "npz" else np.savez_compressed
            save(folder / f"{split}_images.npz", images=np.stack(images)[..., ::-1])


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("kind", ["npz", "compressed npz", "png"])
def test_the_released_files(tmp_path: Path, kind: str, words: bool) -> None:
    write_release(tmp_path / "tiered-imagenet", kind, words=words)
    data = TieredImageNet(root=str(tmp_path))
    assert "({train,val,test}_images.npz or _images_png.pkl, with" in str(data.location())
    for split, count in COUNTS.items():
        own = classes(data, split)
        names = [f"{c:03d} {split} {c}" if words else f"{split} {c + 7:03d}" for c in range(count)]
        assert own.names == tuple(names)
        expected = np.stack([image(c, number) for c in range(count) for number in range(4)]).transpose(0, 3, 1, 2)
        assert torch.equal(own.images, torch.from_numpy(expected))


def test_large_arrays_are_mapped(tmp_path: Path) -> None:
    for order in "CF":
        array = np.asarray(np.arange(24).reshape(2, 3, 4), order=order)
        np.savez(tmp_path / "x.npz", other=np.zeros(3), images=array)
        mapped = arrays.mapped_array(tmp_path / "x.npz", "images")
        assert isinstance(mapped, np.memmap)
        np.testing.assert_array_equal(mapped, array)


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    write_release(tmp_path / "a", "npz", words=True)
    for damage, message in (
        (lambda: np.savez(tmp_path / "a" / "val_images.npz", other=np.zeros(3)), "val_images.npz is damaged.*images"),
        (
            lambda: np.savez(tmp_path / "a" / "val_images.npz", images=np.array([{}])),
            "is damaged.*objects",
        ),
        (lambda: np.savez(tmp_path / "a" / "val_images.npz", images=np.zeros((8, 9, 9, 3))), "float64.*not uint8"),
        (
            lambda: np.savez(tmp_path / "a" / "val_images.npz", images=np.zeros((7, 9, 9, 3), np.uint8)),
            "7 images, and 8 labels",
        ),
        (lambda: (tmp_path / "a" / "val_images.npz").write_bytes(b"no zip"), "val_images.npz is damaged"),
        (lambda: (tmp_path / "a" / "val_labels.pkl").write_bytes(pickle.dumps({"x": 1})), "neither label_specific"),
    ):
        damage()
        with pytest.raises(DataError, match=message):
            TieredImageNet(root=str(tmp_path / "a")).prepare()
        if message.endswith("damaged"):
            np.savez(tmp_path / "a" / "val_images.npz", images=np.zeros((8, 9, 9, 3), np.uint8))


def test_a_corrupt_image_is_left_out_on_request(tmp_path: Path) -> None:
    write_release(tmp_path / "a", "png", words=True)
    path = tmp_path / "a" / "val_images_png.pkl"
    images = pickle.loads(path.read_bytes())
    images[3] = images[3][:50]
    path.write_bytes(pickle.dumps(images))
    data = TieredImageNet(image_size=8, root=str(tmp_path / "a"))
    with pytest.raises(DataError, match=r"cannot read the image 3 of .*val_images_png.pkl"):
        data.prepare()
    data.prepare(skip=True)
    assert classes(data, "val").counts.tolist() == [3, 4]


def test_class_folders_and_their_split(tmp_path: Path) -> None:
    names = {split: [name for name, own in REN.split().items() if own == split][:2] for split in SPLITS}
    write_class_folders(tmp_path / "tieredImageNet", names, side=8)
    data = TieredImageNet(image_size=8, root=str(tmp_path))
    assert {split: classes(data, split).names for split in SPLITS} == {split: tuple(n) for split, n in names.items()}
    write_class_folders(tmp_path / "wrong", names | {"val": names["train"]}, side=8)
    with pytest.raises(DataError, match=r"another split than Ren et al\.'s"):
        TieredImageNet(image_size=8, root=str(tmp_path / "wrong")).prepare()


def test_a_tree_of_imagenet(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "train", {".": [*REN.split()]}, images=2, side=8)
    data = TieredImageNet(image_size=8, root=str(tmp_path))
    assert "(ILSVRC-2012's training images by class)" in str(data.location())
    assert [len(classes(data, split)) for split in SPLITS] == [351, 97, 160]


def test_missing_data_says_what_to_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTUDY_DATA", str(tmp_path / "mine"))
    with pytest.raises(DataError) as raised:
        TieredImageNet.get()
    for words in ("mine/tieredimagenet\n", "forbid mirrors", "ILSVRC2012_img_train.tar", "data prepare tieredimagenet"):
        assert words in str(raised.value)
