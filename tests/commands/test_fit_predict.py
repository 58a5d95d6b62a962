"""``quickstudy fit`` and ``quickstudy predict`` as a user types them, with ten image files of two classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import write_demo_and_photos
from PIL import Image

from quickstudy import FewShotClassifier
from quickstudy.__main__ import main

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_demo_and_photos(folder)
    return folder


@pytest.fixture
def in_home(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_commands(in_home: Path, command: Command, capsys: pytest.CaptureFixture) -> None:
    broken = in_home / "photos" / "whale" / "9999.jpg"
    broken.write_bytes(b"not an image")
    (in_home / "photos" / "rocket" / "holidays").mkdir()
    (in_home / "photos" / "rocket" / "IMG_1.heic").write_bytes(b"of a telephone")
    (in_home / "photos" / "whale.png").touch()
    Image.open(in_home / "photos/whale/0000.jpg").save(in_home / "photos/whale/0000.gif")
    status, out, err = command("fit", "--images", "photos")
    assert status == 0, err
    assert out.splitlines() == ["classifier   rocket (5), whale (6)", "next: quickstudy predict classifier IMAGE ..."]
    assert err.count("left out") == 4
    assert "left out: photos/whale.png is in no folder of a class" in err
    assert "photos/whale/9999.jpg" in err
    assert "left out: photos/rocket/IMG_1.heic is not an image file (.jpg" in err
    assert "left out: photos/rocket/holidays" in err

    images = [f"photos/{name}/000{number}.jpg" for name in ("rocket", "whale") for number in range(2)]
    status, out, err = command("predict", "classifier/", *images)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == images
    assert main(["predict", "classifier", "--format", "json", images[3], str(broken), images[0]]) == 1
    printed = capsys.readouterr()
    assert "9999.jpg" in printed.err
    rows = json.loads(printed.out)
    assert [row["image"] for row in rows] == [images[3], images[0]]
    found = FewShotClassifier.load("classifier").predict_proba([images[3], images[0]])
    for row, line, probabilities in zip(rows, (lines[3], lines[0]), found.tolist(), strict=True):
        assert row["probabilities"] == pytest.approx(dict(zip(("rocket", "whale"), probabilities)))
        assert row["class"] == max(row["probabilities"], key=row["probabilities"].__getitem__) == line.split()[1]
        assert f"{row['class']} {100 * max(probabilities):.1f} %" in line


def test_models_are_runs_or_classifiers(in_home: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", "runs/demo", "--images", "photos", "--out", "first", "--seed", "0"]) == 0
    assert main(["fit", "first", "--images", "photos", "--out", "second"]) == 0
    capsys.readouterr()
    image = "photos/whale/0001.jpg"
    outputs = []
    for folder in ("first", "second"):
        assert main(["predict", folder, image]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert main(["fit", "--images", "photos", "--out", "first"]) == 1
    assert "holds a classifier already" in capsys.readouterr().err
    assert main(["fit", "--images", "photos", "--out", "first", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "name your images: --images FOLDER"),
        (["fit", "--images", "nowhere"], "cannot read nowhere"),
        (["fit", "--images", "photos/whale"], "photos/whale has 0 folders of images, and there are to be at least two"),
        (["fit", "--images", "one"], "one has 1 folders of images"),
        (["fit", "--images", "bad"], "bad/whale has no image that can be read"),
        (["fit", "runs/demon", "--images", "photos"], "runs/demon is not the folder of a run"),
        (["fit", "--images", "photos", "--seed", "5"], "trained with seeds 0, not 5"),
        (["fit", "--images", "photos", "--out", "photos"], "holds other things than a classifier"),
        (["fit", "--imagse", "photos"], "did you mean '--images'"),
        (["predict", "photos", "one/whale/0000.jpg"], "photos is not a saved classifier"),
        (["predict", "classifier"], "the following arguments are required: images"),
        (["predict", "classifier", "a.jpg", "--format", "xml"], "--format takes one of 'table', 'json', not 'xml'"),
    ],
)
def test_mistakes_get_one_message_and_a_status(
    arguments: list[str], message: str, in_home: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree("photos/whale", "one/whale")
    shutil.copytree("photos", "bad")
    for file in Path("bad/whale").iterdir():
        file.write_bytes(b"not an image")
    assert main(arguments) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("quickstudy: ")
    assert message in err
    assert not Path("classifier").exists()


def test_without_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--images", "photos"]) == 1
    assert "there is no runs/demo here: `quickstudy demo` makes it" in capsys.readouterr().err


def test_an_image_alone_that_cannot_be_read(in_home: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", "--images", "photos"]) == 0
    capsys.readouterr()
    assert main(["predict", "classifier", "gone.jpg", "--format=json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == []
    assert "cannot read the image gone.jpg" in printed.err
