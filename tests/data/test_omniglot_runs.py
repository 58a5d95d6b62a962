import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quickstudy.__main__ import main
from quickstudy.data import omniglot_runs
from quickstudy.data.omniglot_runs import RUNS, WAY, OmniglotRuns
from quickstudy.errors import DataError
from quickstudy.task import TaskShape

SHAPE = TaskShape(WAY, 1, 1)


def drawing(run: int, label: int, drawn: int) -> bytes:
    """Three bars of black ink on white paper: the run, the class, and whether it is the support image or the query."""
    pixels = np.full((105, 105), True)
    for row, (height, length) in enumerate([(30, 5 * run), (60, 5 * label), (90, 5 + 20 * drawn)]):
        pixels[height + row : height + row + 3, :length] = False
    file = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def members() -> dict[str, bytes]:
    """Twenty runs; item ``i`` of run ``r`` is of class ``(7 i + r) % 20 + 1``."""
    files = {}
    for run in range(1, RUNS + 1):
        name, lines = f"run{run:02d}", []
        for i in range(1, WAY + 1):
            label = (7 * i + run) % WAY + 1
            files[f"{name}/training/class{i:02d}.png"] = drawing(run, i, 0)
            files[f"{name}/test/item{i:02d}.png"] = drawing(run, label, 1)
            lines.append(f"{name}/test/item{i:02d}.png {name}/training/class{label:02d}.png")
        files[f"{name}/class_labels.txt"] = "\n".join([*lines, ""]).encode()
    return files


def lengths(images: torch.Tensor) -> torch.Tensor:
    """The length of each bar, ``[..., 3]``, in fifths of pixels."""
    return ((images[..., 0, [30, 61, 92], :] > 0.5).sum(-1) / 5).round().int()


def assert_is_all_there(data: OmniglotRuns) -> None:
    source = data.split("test")
    task = source.tasks(SHAPE, 0, RUNS, seed=3)
    assert task.support_x.shape == task.query_x.shape == (RUNS, WAY, 1, 105, 105)
    for x, drawn in ((task.support_x, 1), (task.query_x, 5)):
        runs, labels, number = lengths(x).unbind(-1)
        assert (runs == torch.arange(1, RUNS + 1)[:, None]).all()
        assert (labels == torch.arange(1, WAY + 1)).all()
        assert (number == drawn).all()
    assert torch.equal(task.support_y, torch.arange(WAY).expand(RUNS, -1))
    assert torch.equal(task.query_y, task.support_y)
    part = source.tasks(SHAPE, 4, 6, seed=0)  # whatever the seed
    assert torch.equal(part.query_x, task.query_x[4:6])
    assert source.title == "omniglot-runs, meta-test tasks"


@pytest.mark.parametrize("above", ["", "all_runs/"])
@pytest.mark.parametrize("by", ["own", "own, in a folder", "root", "the archive as root"])
def test_the_archive_is_found_and_read(
    members: dict[str, bytes], make_zip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, above: str, by: str
) -> None:
    below = "omniglot/" if "folder" in by else ""
    archive = make_zip({above + name: content for name, content in members.items()}, f"own/{below}all_runs.zip")
    if "own" in by:
        monkeypatch.setenv("QUICKSTUDY_DATA", str(archive.parents[1 if below else 0]))
    root = {"root": str(archive.parent), "the archive as root": str(archive)}.get(by)
    data = OmniglotRuns(image_size=105, root=root)
    assert data.location() == f"{archive}; packed at first use"
    assert_is_all_there(data)
    assert "packed in" in str(data.location())


@pytest.mark.parametrize("below", ["all_runs", "."])
def test_folders_will_do(members: dict[str, bytes], tmp_path: Path, below: str) -> None:
    for name, content in members.items():
        path = tmp_path / "own" / below / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert_is_all_there(OmniglotRuns(image_size=105, root=str(tmp_path / "own")))


def test_it_is_downloaded(
    members: dict[str, bytes],
    make_zip: Callable[..., Path],
    server: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    content = make_zip(members).read_bytes()
    monkeypatch.setattr(omniglot_runs, "ARCHIVE", server.remote("all_runs.zip", content))
    server.break_after = [100_000]
    for _ in range(2):
        assert main(["data", "get", "omniglot-runs"]) == 0
        assert "omniglot-runs: packed in" in capsys.readouterr().out
    assert [path for path, _ in server.asked] == ["/gone", "/all_runs.zip", "/all_runs.zip"]
    assert_is_all_there(OmniglotRuns(image_size=105))


@pytest.mark.parametrize(
    ("shape", "start", "stop"),
    [(TaskShape(5, 1, 1), 0, 5), (TaskShape(20, 1, 15), 0, 20), (SHAPE, 0, 21), (TaskShape(20, 5, 1), 0, 1)],
)
def test_there_are_no_other_tasks(
    members: dict[str, bytes], make_zip: Callable[..., Path], shape: TaskShape, start: int, stop: int
) -> None:
    source = OmniglotRuns(root=str(make_zip(members, "all_runs.zip"))).split("test")
    with pytest.raises(
        DataError, match=r"20 tasks, each 20-way 1-shot with one query a class, and no others: .*--way 20"
    ):
        source.tasks(shape, start, stop, seed=0)


def test_they_are_to_test_on_alone() -> None:
    with pytest.raises(DataError, match="tasks to test on alone: train on omniglot"):
        OmniglotRuns().split("train")
    with pytest.raises(DataError, match="at least 1 pixel"):
        OmniglotRuns(image_size=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("run07/training/class03.png"), "run07 in .* is not complete"),
        (lambda files: files.pop("run07/class_labels.txt"), "cannot read run07/class_labels.txt"),
        (lambda files: files.update({"run07/class_labels.txt": b"run07/test/item01.png\n" * 20}), "run07 in .* is not"),
        (
            lambda files: files.update({"run07/test/item03.png": b"<html>"}),
            r"cannot read the image run07/test/item03\.png",
        ),
        (lambda files: [files.pop(name) for name in [*files] if name.startswith("run20")], "run20/class_labels.txt"),
    ],
)
def test_incomplete_data(
    members: dict[str, bytes], make_zip: Callable[..., Path], cache: Path, change: Callable, message: str
) -> None:
    change(members)
    with pytest.raises(DataError, match=message):
        OmniglotRuns(root=str(make_zip(members, "all_runs.zip"))).prepare()
    assert list((cache / "stores").iterdir()) == []


def test_missing_data_names_every_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTUDY_DATA", str(tmp_path / "mine"))
    with pytest.raises(DataError) as raised:
        OmniglotRuns().split("test")
    for way in ("quickstudy data get omniglot-runs", "set QUICKSTUDY_DATA", "`root`", "mine/omniglot\n"):
        assert way in str(raised.value)


def test_the_real_runs_pair_drawings_of_one_character(own_data: str) -> None:
    """A query is nearest to its own class, pixel by pixel, far more often than by chance."""
    try:
        source = OmniglotRuns(root=own_data).split("test")
    except DataError:
        try:
            source = OmniglotRuns(root=str(Path(own_data) / "omniglot")).split("test")
        except DataError as error:
            pytest.skip(str(error))
    task = source.tasks(SHAPE, 0, RUNS, seed=0)
    assert task.query_x.amax((2, 3, 4)).min() > 0.4
    nearest = torch.cdist(task.query_x.flatten(2), task.support_x.flatten(2)).argmin(-1)
    accuracy = (nearest == task.query_y).float().mean()
    assert 0.15 < accuracy < 0.6
