import json
from pathlib import Path

import pytest

from quickstudy.data.base import SPLITS
from quickstudy.data.splitting import draw_split, kept_split, published_split, split_of_each
from quickstudy.errors import DataError, FileError

NAMES = [f"class {number}" for number in range(20)]


@pytest.mark.parametrize(
    ("title", "counts"), [("tieredimagenet", (351, 97, 160)), ("fc100", (60, 20, 20)), ("cifar-fs", (64, 16, 20))]
)
def test_published_splits_are_disjoint_and_complete(title: str, counts: tuple[int, ...]) -> None:
    splits = [*published_split(title).values()]
    assert tuple(splits.count(split) for split in SPLITS) == counts


def test_a_draw_depends_on_the_set_of_classes_and_the_seed_alone() -> None:
    drawn = draw_split(NAMES, 0)
    assert draw_split([*reversed(NAMES), NAMES[3]], 0) == drawn
    assert [[*drawn.values()].count(split) for split in SPLITS] == [12, 4, 4]
    assert len({json.dumps(draw_split(NAMES, seed), sort_keys=True) for seed in range(20)}) == 20
    pairs = {pair for seed in range(200) for pair in draw_split(NAMES, seed).items()}
    assert len(pairs) == len(NAMES) * len(SPLITS)


@pytest.mark.parametrize("count", range(3, 12))
def test_every_split_has_a_class(count: int) -> None:
    assert set(draw_split(NAMES[:count], 0).values()) == set(SPLITS)


def test_too_few_classes() -> None:
    with pytest.raises(DataError, match="2 classes cannot be split"):
        draw_split(["a", "b", "a"], 0)


def test_a_kept_split_is_never_drawn_again(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    drawn = kept_split(path, NAMES, 0)
    assert drawn == draw_split(NAMES, 0)
    text = path.read_text()
    assert kept_split(path, NAMES, 1) == drawn
    for names, message in (
        ([*NAMES, "new", "newer"], r"2 classes are in none of the splits: 'new', 'newer'; edit the splits, or remove"),
        (NAMES[1:], "1 classes are not there: 'class 0'"),
    ):
        with pytest.raises(DataError, match=message):
            kept_split(path, names, 0)
    assert path.read_text() == text


def test_a_file_that_keeps_no_splits(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    for text, message in (("{", "it is not JSON"), ('{"train": ["a"]}', "splits are"), ('["a"]', "splits are")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            kept_split(path, NAMES, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        kept_split(tmp_path / "file" / "splits.json", NAMES, 0)


def test_a_class_is_in_one_split() -> None:
    with pytest.raises(DataError, match="mine: the class 'a' is in both train and test"):
        split_of_each({"train": ["a"], "val": ["b"], "test": ["a"]}, ["a", "b"], "mine")
