import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from quickstudy.data.base import SPLITS, Split
from quickstudy.data.fonts import FAMILIES, font_folder
from quickstudy.data.glyphs import VERSION, Glyphs, characters
from quickstudy.data.homoglyphs import ALIKE, SCRIPTS, comparable, correlations, distinct, script
from quickstudy.data.images import ImageClasses
from quickstudy.task import TaskShape


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUICKSTUDY_CACHE", str(tmp_path_factory.mktemp("glyphs")))
        yield Glyphs().prepare()


@pytest.fixture
def glyphs(stored: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Split, ImageClasses]:
    monkeypatch.setenv("QUICKSTUDY_CACHE", str(stored.parent.parent))
    return {split: Glyphs().split(split) for split in SPLITS}


def test_over_a_thousand_classes_of_twenty_pictures(glyphs: dict[Split, ImageClasses]) -> None:
    assert {split: len(classes) for split, classes in glyphs.items()} == {"train": 1019, "val": 100, "test": 248}
    for classes in glyphs.values():
        assert (classes.counts == 20).all()
        assert classes.images.shape[1:] == (1, 28, 28)
        assert classes.tasks(TaskShape(20, 5, 15), 0, 1, seed=0).query_x.shape == (1, 300, 1, 28, 28)


def test_the_pictures_are_ink_on_paper(glyphs: dict[Split, ImageClasses]) -> None:
    images = glyphs["test"].images.float()
    assert (images.amax((1, 2, 3)) > 150).all()
    assert 20 < images.mean() < 70
    edge = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], -1)
    assert edge.mean() < 10


def test_no_two_pictures_are_the_same(glyphs: dict[Split, ImageClasses]) -> None:
    images = glyphs["train"].images
    assert len(torch.unique(images.flatten(1), dim=0)) == len(images)


def test_scripts_are_in_one_split_only() -> None:
    scripts = [set(characters()[split]) for split in SPLITS]
    assert sum(map(len, scripts)) == len(set.union(*scripts))
    for split in SPLITS:
        for word, own in characters()[split].items():
            assert word in SCRIPTS[split]
            assert {script(c) for c in own} == {word}
            assert all(unicodedata.category(c)[0] in "LN" for c in own)


def test_no_two_classes_look_alike() -> None:
    every = [c for split in SPLITS for own in characters()[split].values() for c in own]
    assert len(set(every)) == len(every)
    pictures = comparable([font_folder() / family[0] for family in FAMILIES], every)
    assert pictures[0].any((1, 2)).all(), "a character is blank or missing"
    for i in range(2):
        for j in range(2):
            alike = correlations(pictures[i], pictures[j])
            np.fill_diagonal(alike, 0)
            # A little more than the list was made with, for other versions of FreeType.
            assert alike.max() < ALIKE + 0.02


def test_look_alikes_are_found_across_scripts() -> None:
    latin, greek, cyrillic, other = "AOHX", "ΑΟΗΧ", "АОНХ", "БДЖЩ"
    pictures = comparable([font_folder() / "DejaVuSans.ttf"], latin + greek + cyrillic + other + " ")
    assert distinct(pictures) == [0, 1, 2, 3, 12, 13, 14, 15]


def test_drawing_again_gives_the_same_bytes(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few: dict[Split, dict[str, str]] = {"train": {"LATIN": "Z"}, "val": {"NKO": "ߘ"}, "test": {"GEORGIAN": "ქ"}}
    monkeypatch.setattr("quickstudy.data.glyphs.characters", lambda: few)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = {split: Glyphs().split(split) for split in SPLITS}
    finally:
        torch.set_num_threads(threads)
    monkeypatch.undo()
    monkeypatch.setenv("QUICKSTUDY_CACHE", str(stored.parent.parent))
    for split in SPLITS:
        whole = Glyphs().split(split)
        assert torch.equal(
            whole.of_class(whole.names.index(again[split].names[0])), again[split].images[again[split].starts[0] :][:20]
        )


def test_the_store_says_what_it_was_made_from(stored: Path) -> None:
    from quickstudy.data.store import read_index

    origin = read_index(stored)["origin"]
    assert origin["dataset"] == "glyphs"
    assert origin["version"] == VERSION
    assert origin["font"].startswith("Version 2.")


def test_nearest_pixels_are_well_above_chance_and_well_below_perfect(glyphs: dict[Split, ImageClasses]) -> None:
    task = glyphs["test"].tasks(TaskShape(5, 1, 5), 0, 400, seed=0)
    nearest = torch.cdist(task.query_x.flatten(2), task.support_x.flatten(2)).argmin(-1)
    assert 0.5 < (nearest == task.query_y).float().mean() < 0.75
