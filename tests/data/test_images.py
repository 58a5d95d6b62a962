import numpy as np
import pytest
import torch
from helpers import read_in_turn

from quickstudy.data import images as images_module
from quickstudy.data.base import generator
from quickstudy.data.images import BLOCK, Blocks, ImageClasses, draw_distinct
from quickstudy.errors import DataError
from quickstudy.task import Task, TaskShape

SHAPE = TaskShape(5, 3, 4)


def identities(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Return class and number of every image: ``[tasks, examples, 2]`` of the support and of the query set."""
    support, query = ((x[..., 0, 0] * 255).round().long() for x in (task.support_x, task.query_x))
    return support, query


def same(a: Task, b: Task) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


def chi_square(counts: np.ndarray) -> float:
    """Return the statistic, less its mean, in standard deviations."""
    expected = counts.mean()
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize(("size", "count"), [(5, 5), (7, 3), (20, 1), (4, 2)])
def test_draws_are_distinct_and_every_ordered_selection_is_equally_likely(size: int, count: int) -> None:
    drawn = draw_distinct(np.random.default_rng(0), np.full(60_000, size), count)
    assert drawn.min() >= 0
    assert drawn.max() < size
    assert all(len(set(row)) == count for row in drawn[:2000].tolist())
    selections = np.unique(drawn @ size ** np.arange(count), return_counts=True)[1]
    assert selections.size == np.prod(np.arange(size, size - count, -1))
    assert abs(chi_square(selections)) < 4


def test_rows_of_different_sizes_are_drawn_at_once() -> None:
    sizes = np.tile([3, 8, 100], 5000)
    drawn = draw_distinct(np.random.default_rng(1), sizes, 3)
    assert (drawn < sizes[:, None]).all()
    for size in (3, 8):
        assert abs(chi_square(np.bincount(drawn[sizes == size].reshape(-1), minlength=size))) < 4


def test_many_of_not_many_more_are_distinct_and_equally_likely() -> None:
    """Drawn as a shuffle: whole classes, and parts of larger ones, in any order."""
    sizes = np.tile([100, 150, 400], 500)
    drawn = draw_distinct(np.random.default_rng(2), sizes, 100)
    assert drawn.shape == (1500, 100)
    assert all(len(set(row)) == 100 for row in drawn.tolist())
    for size in (100, 150, 400):
        rows = drawn[sizes == size]
        assert rows.max() == size - 1
        first = np.bincount(rows[:, :20].reshape(-1), minlength=size)
        assert first.size == size
        assert abs(chi_square(first)) < 4


def test_a_task_has_the_shapes_and_the_label_blocks_of_its_way_and_shot(classes: ImageClasses) -> None:
    task = classes.tasks(SHAPE, 0, 6, seed=0)
    assert task.support_x.shape == (6, 15, 2, 3, 3)
    assert task.query_x.shape == (6, 20, 2, 3, 3)
    assert task.support_x.dtype == torch.float32
    assert task.support_y.dtype == torch.int64
    assert torch.equal(task.support_y, torch.arange(5).repeat_interleave(3).expand(6, -1))
    assert torch.equal(task.query_y, torch.arange(5).repeat_interleave(4).expand(6, -1))
    assert task.way == 5


def test_pixels_are_scaled_from_bytes_to_the_unit_interval() -> None:
    images = torch.full((4, 1, 2, 2), 255, dtype=torch.uint8)
    images[:2] = 0
    two = ImageClasses.from_offsets(images, np.array([0, 2, 4]), ["black", "white"], "two")
    task = two.tasks(TaskShape(2, 1, 1), 0, 50, seed=0)
    assert set(task.support_x.unique().tolist()) == {0.0, 1.0}


def test_examples_of_a_label_are_of_one_class_and_labels_of_different_classes(classes: ImageClasses) -> None:
    task = classes.tasks(SHAPE, 0, 300, seed=0)
    support, query = identities(task)
    of_label = support[..., 0].view(300, 5, 3)
    assert (of_label == of_label[..., :1]).all()
    assert torch.equal(query[..., 0].view(300, 5, 4)[..., 0], of_label[..., 0])
    assert all(len(set(row)) == 5 for row in of_label[..., 0].tolist())


def test_no_image_is_used_twice_in_a_task(classes: ImageClasses) -> None:
    support, query = identities(classes.tasks(TaskShape(5, 4, 5), 0, 300, seed=3))
    for images in torch.cat([support, query], 1).tolist():
        assert len({tuple(image) for image in images}) == 5 * 9


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 8), (BLOCK - 2, BLOCK + 3), (BLOCK, 2 * BLOCK), (700, 701)])
def test_a_task_does_not_depend_on_what_is_drawn_with_it_or_before(
    classes: ImageClasses, start: int, stop: int
) -> None:
    whole = classes.tasks(SHAPE, 0, 3 * BLOCK, seed=7)
    fresh = classes.select(range(12), "fresh")
    assert same(fresh.tasks(SHAPE, start, stop, seed=7), whole[start:stop])
    fresh.tasks(SHAPE, 9 * BLOCK, 9 * BLOCK + 1, seed=1)
    one_by_one = [fresh.tasks(SHAPE, i, i + 1, seed=7) for i in reversed(range(start, min(stop, start + 6)))]
    assert all(same(task[0], whole[i]) for i, task in zip(reversed(range(start, min(stop, start + 6))), one_by_one))


def test_the_stream_outlives_the_cache_of_blocks(classes: ImageClasses) -> None:
    first = classes.tasks(SHAPE, 0, 4, seed=0)
    for seed in range(1, 30):
        classes.tasks(SHAPE, 0, 1, seed=seed)
    assert same(first, classes.tasks(SHAPE, 0, 4, seed=0))


@pytest.mark.parametrize("seeds", [1, 9, 30])
def test_seeds_that_are_read_in_turn_draw_each_block_once(
    classes: ImageClasses, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(images_module, "generator", lambda *key: drawn.append(key) or generator(*key))
    read_in_turn(classes, SHAPE, seeds, BLOCK + 50)
    assert sorted(drawn) == [(seed, block) for seed in range(seeds) for block in range(2)]


def test_few_blocks_are_kept() -> None:
    blocks = Blocks()
    for start in range(0, 5 * BLOCK, BLOCK):
        for seed in range(100):
            blocks.rows(seed, start, start + 1, lambda block: torch.zeros(BLOCK))
    assert len(blocks._last) == 64


def test_seeds_and_tasks_differ(classes: ImageClasses) -> None:
    tasks = [identities(classes.tasks(SHAPE, 0, BLOCK + 20, seed=seed))[0] for seed in range(3)]
    drawn = {tuple(task.flatten().tolist()) for seed in tasks for task in seed}
    assert len(drawn) == 3 * (BLOCK + 20)


def test_a_class_gets_every_label_equally_often(classes: ImageClasses) -> None:
    support, _ = identities(classes.tasks(TaskShape(4, 1, 1), 0, 8 * BLOCK, seed=0))
    counts = np.zeros((12, 4))
    for label in range(4):
        counts[:, label] = np.bincount(support[:, label, 0].numpy(), minlength=12)
    assert abs(chi_square(counts)) < 4


def test_too_few_classes(classes: ImageClasses) -> None:
    with pytest.raises(DataError, match=r"numbered: 12 classes cannot make 13-way tasks"):
        classes.tasks(TaskShape(13, 1, 1), 0, 1, seed=0)


def test_too_few_images_names_the_classes_and_the_need(classes: ImageClasses) -> None:
    with pytest.raises(
        DataError, match=r"need 11 images of every class, but 2 of 12 .* class0 \(9\), class1 \(10\); lower"
    ):
        classes.tasks(TaskShape(2, 1, 10), 0, 1, seed=0)


def test_regression_tasks_are_refused(classes: ImageClasses) -> None:
    with pytest.raises(DataError, match="give the tasks a way"):
        classes.tasks(TaskShape(None, 1, 1), 0, 1, seed=0)


def test_all_images_of_all_classes_can_be_used() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    two = ImageClasses.from_offsets(images, np.array([0, 3, 6]), ["a", "b"], "two")
    task = two.tasks(TaskShape(2, 1, 2), 0, 10, seed=0)
    used = torch.cat([task.support_x, task.query_x], 1).flatten(1).mul(255).round().long()
    assert (used.sort(1).values == torch.arange(6)).all()


def test_select_shares_the_images_and_keeps_the_order(classes: ImageClasses) -> None:
    some = classes.select([7, 2], "some")
    assert some.names == ("class7", "class2")
    assert some.images is classes.images
    assert torch.equal(some.of_class(0), classes.of_class(7))


def test_rotated_has_each_class_at_four_angles() -> None:
    images = torch.arange(5 * 4, dtype=torch.uint8).view(5, 1, 2, 2)
    some = ImageClasses.from_offsets(images, np.array([0, 1, 3, 5]), ["a", "b", "c"], "some").select([2, 0], "two")
    four = some.rotated()
    assert len(four) == 8
    assert four.names[:3] == ("c/rot000", "a/rot000", "c/rot090")
    assert len(four.images) == 4 * 3  # those of class b are not copied
    for turns in range(4):
        for c in range(2):
            assert torch.equal(four.of_class(2 * turns + c), torch.rot90(some.of_class(c), turns, (2, 3)))


def test_moving_keeps_the_stream(classes: ImageClasses) -> None:
    assert same(classes.to("cpu").tasks(SHAPE, 0, 3, seed=0), classes.tasks(SHAPE, 0, 3, seed=0))
