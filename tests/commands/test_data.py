"""``quickstudy data``: a user's own copy, found, packed and remembered."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import GLYPHS, published_classes, quickstudy_process, write_class_folders
from PIL import Image

from quickstudy.__main__ import main
from quickstudy.data import ImageClasses, MiniImageNet
from quickstudy.data.omniglot_runs import RUNS, WAY

Command = Callable[..., tuple[int, str, str]]

NAMES = {
    "train": ["n01532829", "n01558993", "n01704323"],
    "val": ["n01855672", "n02091244"],
    "test": ["n01930112", "n01981276"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("QUICKSTUDY_DATA", raising=False)
    monkeypatch.setenv("QUICKSTUDY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Command:
    """The command in this process, in an empty folder."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        return main(arguments), *capsys.readouterr()

    return run


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Seven classes of miniImageNet, and one image that is damaged."""
    folder = write_class_folders(tmp_path / "elsewhere" / "mini", NAMES, images=5)
    (folder / "val" / "n01855672" / "0003.jpg").write_bytes(b"damaged")
    return folder


def test_a_copy_is_packed_and_remembered(copy: Path, command: Command) -> None:
    for _ in range(2):  # the second time there is nothing to do
        status, out, err = command("data", "prepare", "miniimagenet", "--from", str(copy), "--image_size", "12")
        assert (status, err) == (0, "")
        assert "miniimagenet: 34 images of 7 classes, packed in " in out
        bad = copy / "val" / "n01855672" / "0003.jpg"
        assert out.endswith(f"1 images cannot be read and were left out:\n  {bad}\n")
    first = command("data", "prepare", "miniimagenet", "--image_size", "9", "--resize", "crop")[1].splitlines()[0]
    laid_out = "train/, val/ and test/ with a folder of images for every class, such as train/n01532829"
    assert first == f"miniimagenet: {copy} ({laid_out}); packed at first use"
    for data in (MiniImageNet(image_size=12), MiniImageNet(image_size=9, resize="crop")):
        source = data.split("val")
        assert isinstance(source, ImageClasses)
        assert source.counts.tolist() == [4, 5]


def test_what_is_packed_is_not_replaced(copy: Path, tmp_path: Path, command: Command) -> None:
    prepare = ("data", "prepare", "miniimagenet", "--image_size=12", "--from")
    assert command(*prepare, str(copy))[0] == 0
    other = write_class_folders(tmp_path / "other", NAMES)
    status, _, err = command(*prepare, str(other))
    assert status == 1
    assert "miniimagenet is packed already, in " in err
    assert "remove that folder to pack it anew" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["miniimagenet", "--from", "nowhere"], "miniimagenet: in none of these places"),
        (["miniimagenet"], "ImageNet's terms forbid mirrors: get ILSVRC2012_img_train.tar"),
        (["sine"], "sine has no images to pack; to get it: made as it is used"),
        (["glyphs", "--from", "."], "glyphs is made here, not read from a copy: leave --from out"),
        (["omniglot", "--resize", "crop"], "omniglot has no resize to choose: leave --resize out"),
        (["omniglot", "--from", "."], "omniglot: images_background.zip, or a folder images_background/, is in none"),
        (["embeddings"], "embeddings has no images to pack"),
        (["miniimagenet", "--form", "x"], "did you mean '--from'"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], message: str, command: Command) -> None:
    status, out, err = command("data", "prepare", *arguments)
    assert (status, out) == (1, "")
    assert message in err
    assert "Traceback" not in err


def test_the_help_names_the_option_as_it_is_written(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["data", "prepare", "--help"])
    out = capsys.readouterr().out
    assert "--from " in out
    assert "--from_" not in out


def test_a_killed_packing_is_continued(tmp_path: Path, cache: Path) -> None:
    names = published_classes("miniimagenet-ravi", 60, 1, 1)
    copy = write_class_folders(tmp_path / "copy", names, images=8, side=(120, 100))
    arguments = ["data", "prepare", "miniimagenet", "--from", str(copy), "--image_size=60"]
    process = quickstudy_process(arguments, tmp_path)
    journal = cache / "stores" / ".miniimagenet-60-squash-v1.part" / "journal.jsonl"
    while process.poll() is None and (not journal.exists() or journal.read_text().count("\n") < 5):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not MiniImageNet(image_size=60).store.exists()
    done = journal.read_text().splitlines()
    assert 5 <= len(done) < 62
    before = os.stat(journal.with_name("images.npy")).st_ino
    out, err = quickstudy_process(arguments, tmp_path).communicate(timeout=60)
    assert "496 images of 62 classes" in out, err
    assert os.stat(MiniImageNet(image_size=60).store / "images.npy").st_ino == before
    source = MiniImageNet(image_size=60).split("train")
    assert isinstance(source, ImageClasses)
    for c in (0, 30, 59):
        reds = source.of_class(c)[:, 0].float().mean((1, 2))
        assert reds.numpy() == pytest.approx(255 * (c + 1) // 62, abs=3)


def test_a_run_is_tested_on_the_fixed_tasks(tmp_path: Path, command: Command) -> None:
    rng = np.random.default_rng(0)
    for run in (f"run{number:02d}" for number in range(1, RUNS + 1)):
        for folder, name in (("training", "class"), ("test", "item")):
            (tmp_path / "mine" / run / folder).mkdir(parents=True)
            for i in range(1, WAY + 1):
                image = Image.fromarray(rng.random((105, 105)) > 0.1)
                image.save(tmp_path / "mine" / run / folder / f"{name}{i:02d}.png")
        lines = (f"{run}/test/item{i:02d}.png {run}/training/class{i:02d}.png\n" for i in range(1, WAY + 1))
        (tmp_path / "mine" / run / "class_labels.txt").write_text("".join(lines))
    assert command("data", "prepare", "omniglot-runs", "--from", "mine")[0] == 0
    np.savez(tmp_path / "own.npz", x=rng.integers(0, 256, (600, 28, 28), dtype=np.uint8), y=np.arange(600) // 20)
    dataset = "{class_path: quickstudy.data.ArrayFile, init_args: {path: own.npz}}"
    (tmp_path / "mine.yaml").write_text(GLYPHS.replace("{class_path: quickstudy.data.Glyphs}", dataset))
    status, _, err = command("train", "mine.yaml", "--train.updates", "2")
    assert (status, err) == (0, "")
    status, out, err = command("test", "runs/mine", "--on", "omniglot-runs")
    assert (status, err) == (0, "")
    assert "20-way 1-shot on omniglot-runs (trained on own)" in out
    assert "(20 tasks, 1 queries a class" in out
    status, _, err = command("test", "runs/mine", "--on", "omniglot-runs", "--way", "5")
    assert status == 1
    assert "20 tasks, each 20-way 1-shot with one query a class, and no others" in err
