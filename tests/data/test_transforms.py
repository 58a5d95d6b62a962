import colorsys
import math
import random
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from helpers import read_in_turn
from PIL import Image, ImageEnhance
from scipy.stats import ks_2samp
from torch import Tensor

from quickstudy.data import transformed as transformed_module
from quickstudy.data.base import generator
from quickstudy.data.images import BLOCK, ImageClasses
from quickstudy.data.sine import Sine
from quickstudy.data.transformed import STREAM, TransformedTasks, transformed
from quickstudy.data.transforms import (
    ADJUSTMENTS,
    CenterCrop,
    ColorJitter,
    Convert,
    Normalise,
    RandomCrop,
    RandomFlip,
    RandomResizedCrop,
    RandomTurn,
    Transform,
    brighten,
    contrast,
    crop_and_resize,
    saturate,
    turn_hue,
)
from quickstudy.errors import DataError
from quickstudy.task import Task, TaskShape

SHAPE = TaskShape(3, 2, 4)
ALL = [RandomResizedCrop(12), RandomFlip(), ColorJitter(), CenterCrop(10), Normalise()]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def photographs(count: int, height: int, width: int) -> Tensor:
    """Return images with smooth and with sharp parts, in whole grey levels, ``[count, 3, height, width]``."""
    smooth = torch.nn.functional.interpolate(noise(count, 3, 4, 4), (height, width), mode="bilinear")
    images = torch.where(noise(count, 1, height, width, seed=1) < 0.2, noise(count, 3, height, width, seed=2), smooth)
    return (images * 255).round() / 255


def picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def off_by(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, in grey levels."""
    return float((ours - theirs).abs().max() * 255)


# ---------------------------------------------------------------------- crops


BOXES = [(0, 0, 40, 52), (3, 5, 17, 17), (0, 1, 40, 51), (39, 51, 1, 1), (10, 0, 5, 52), (0, 20, 40, 3), (7, 9, 30, 20)]


@pytest.mark.parametrize("size", [1, 9, 17, 60])
def test_a_crop_is_resized_as_pillow_does(size: int) -> None:
    images = photographs(len(BOXES), 40, 52)
    ours = crop_and_resize(images, torch.tensor(BOXES), size)
    for image, (top, left, high, wide), result in zip(images, BOXES, ours, strict=True):
        box = (left, top, left + wide, top + high)
        for channel, values in zip(image, result, strict=True):  # in floats: to the last digits
            exact = Image.fromarray(channel.numpy(), "F").resize((size, size), Image.Resampling.BILINEAR, box)
            torch.testing.assert_close(values, torch.from_numpy(np.array(exact)), atol=5e-6, rtol=0)
        rounded = picture(image).resize((size, size), Image.Resampling.BILINEAR, box)
        assert off_by(result, pixels(rounded)) <= 1.05  # Pillow rounds twice: rows, and columns


def test_a_crop_of_the_whole_at_its_own_size_changes_nothing() -> None:
    images = photographs(3, 20, 20)
    crop = RandomResizedCrop(20, area=(1, 1), ratio=(1, 1))
    assert torch.equal(crop(images, noise(3, crop.numbers)), images)


def reference_box(rng: random.Random, crop: RandomResizedCrop, height: int, width: int) -> tuple[int, int, int, int]:
    """Draw a box as torchvision's RandomResizedCrop does, try after try."""
    for _ in range(10):
        area = height * width * rng.uniform(*crop.area)
        ratio = math.exp(rng.uniform(math.log(crop.ratio[0]), math.log(crop.ratio[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            return rng.randint(0, height - high), rng.randint(0, width - wide), high, wide
    if width / height < crop.ratio[0]:
        wide, high = width, round(width / crop.ratio[0])
    elif width / height > crop.ratio[1]:
        wide, high = round(height * crop.ratio[1]), height
    else:
        wide, high = width, height
    return (height - high) // 2, (width - wide) // 2, high, wide


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference of two distribution functions (Kolmogorov and Smirnov)."""
    result: Any = ks_2samp(ours, theirs)
    return result.statistic


@pytest.mark.parametrize(
    ("height", "width", "crop"),
    [
        (84, 84, RandomResizedCrop()),
        (60, 100, RandomResizedCrop(area=(0.4, 1))),
        (50, 30, RandomResizedCrop(9, (0.5, 1))),
    ],
)
def test_boxes_are_distributed_as_those_of_torchvision(height: int, width: int, crop: RandomResizedCrop) -> None:
    count = 20_000
    rng = random.Random(0)
    boxes = crop.boxes(noise(count, crop.numbers), height, width).double().numpy()
    theirs = np.array([reference_box(rng, crop, height, width) for _ in range(count)])
    for which in range(4):
        assert apart(boxes[:, which], theirs[:, which]) < 0.02
    assert apart(boxes[:, 2] / boxes[:, 3], theirs[:, 2] / theirs[:, 3]) < 0.02


def test_boxes_are_whole_inside_and_of_an_allowed_area_and_aspect() -> None:
    crop = RandomResizedCrop(84)
    top, left, high, wide = crop.boxes(noise(20_000, crop.numbers), 500, 400).double().unbind(1)
    for numbers in (top, left, high, wide):
        assert torch.equal(numbers, numbers.round())
    assert min(top.min(), left.min()) == 0
    assert (top + high).max() == 500
    assert (left + wide).max() == 400
    area, ratio = high * wide / (500 * 400), wide / high
    assert 0.079 < area.min() < 0.085
    assert 0.98 < area.max() <= 1
    assert 0.744 < ratio.min() < 0.755
    assert 1.325 < ratio.max() < 1.345


@pytest.mark.parametrize(("height", "width", "box"), [(20, 100, (0, 36, 20, 27)), (100, 20, (36, 0, 27, 20))])
def test_where_no_box_fits_the_central_one_is_taken(height: int, width: int, box: tuple[int, ...]) -> None:
    crop = RandomResizedCrop(8, area=(0.6, 1))
    assert torch.equal(crop.boxes(noise(50, crop.numbers), height, width), torch.tensor([box] * 50).float())


def test_the_largest_numbers_stay_inside() -> None:
    crop = RandomResizedCrop(4, area=(0.01, 1))
    unit = noise(500, crop.numbers)
    unit[:, -2:] = 1 - 2**-24
    for side in range(1, 100, 7):
        top, left, high, wide = crop.boxes(unit, side, side).unbind(1)
        assert (top + high).max() <= side
        assert (left + wide).max() <= side


def test_the_central_square_is_kept() -> None:
    images = noise(2, 3, 9, 12)
    assert torch.equal(CenterCrop(5)(images, noise(2, 0)), images[..., 2:7, 4:9])  # 3.5 rounds to the even number
    assert torch.equal(CenterCrop(9)(images, noise(2, 0)), images[..., 2:11])  # 1.5 does, too
    with pytest.raises(DataError, match=r"cannot keep 10×10 pixels of images of 12×9; lower its size"):
        CenterCrop(10)(images, noise(2, 0))


def test_random_crops_of_the_padded_image_are_anywhere() -> None:
    images = noise(500, 3, 5, 6) + 1  # nothing is zero but the padding
    crops = RandomCrop(4, 2)(images, noise(500, 2, seed=3))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    corners = [(top, left) for top in range(6) for left in range(7)]
    each = torch.stack([padded[:, :, top : top + 4, left : left + 4] for top, left in corners], 1)
    found = (crops[:, None] == each).flatten(2).all(2)  # [500, corners]
    assert (found.sum(1) == 1).all()
    assert found.any(0).all()
    assert torch.equal(RandomCrop(5, 0)(images[..., :5], noise(500, 2)), images[..., :5])
    with pytest.raises(DataError, match="RandomCrop: cannot cut 32×32 pixels out of 14×13, padding included"):
        RandomCrop()(images, noise(500, 2))


# ---------------------------------------------------------------------- flips and colours


def test_flips_mirror_some_of_the_images() -> None:
    images = noise(1000, 3, 4, 5)
    flipped = RandomFlip(0.3)(images, noise(1000, 1, seed=3))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert ((flipped == images).flatten(1).all(1) ^ mirrored).all()
    assert 0.25 < mirrored.float().mean() < 0.35


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.6, 1.0, 1.4, 2.0])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(brighten, ImageEnhance.Brightness), (contrast, ImageEnhance.Contrast), (saturate, ImageEnhance.Color)],
)
def test_brightness_contrast_and_saturation_are_those_of_pillow(ours, theirs, factor: float) -> None:
    images = photographs(6, 20, 20)
    changed = ours(images, torch.full((6, 1, 1, 1), factor))
    for image, result in zip(images, changed, strict=True):
        # Pillow rounds the grey values before it blends, and cuts off the digits behind the point afterwards.
        assert off_by(result, pixels(theirs(picture(image)).enhance(factor))) <= 1.55


@pytest.mark.parametrize("turn", [-0.5, -0.2, -0.01, 0.1, 1 / 3, 0.5])
def test_the_hue_turns_by_the_definition_of_hsv(turn: float) -> None:
    images = photographs(4, 12, 12)
    images[0] = images[0, :1]  # grey
    images[1, :, 0] = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]]).repeat(1, 3)  # pure colours
    turned = turn_hue(images, torch.full((4, 1, 1, 1), turn))
    for old, new in zip(images.permute(0, 2, 3, 1).reshape(-1, 3), turned.permute(0, 2, 3, 1).reshape(-1, 3)):
        hue, saturation, value = colorsys.rgb_to_hsv(*old.tolist())
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        assert new.tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("turn", [-30, 20, 51])
def test_the_hue_turns_as_in_pillow(turn: int) -> None:
    images = photographs(4, 20, 20)
    turned = turn_hue(images, torch.full((4, 1, 1, 1), turn / 255))
    for image, result in zip(images, turned, strict=True):
        hsv = np.array(picture(image).convert("HSV"))
        hsv[..., 0] = (hsv[..., 0].astype(int) + turn) % 255
        difference = (result - pixels(Image.fromarray(hsv, "HSV").convert("RGB"))).abs() * 255
        # Pillow keeps hue and saturation as bytes: a step of hue is up to six grey levels.
        assert difference.mean() < 1.5
        assert difference.max() <= 8


def test_jitter_takes_each_order_and_each_amount_from_its_own_number() -> None:
    images = photographs(24, 10, 10)
    unit = noise(24, 5, seed=4)
    unit[:, 4] = (torch.arange(24) + 0.5) / 24
    jitter = ColorJitter(0.4, 0.5, 1.5, 0.2)
    results = jitter(images, unit)
    bounds = ((0.6, 1.4), (0.5, 1.5), (0.0, 2.5), (-0.2, 0.2))
    for image, numbers, order, result in zip(images, unit, permutations(range(4)), results, strict=True):
        expected = image[None]
        for which in order:
            low, high = bounds[which]
            expected = ADJUSTMENTS[which](expected, (low + (high - low) * numbers[which]).view(1, 1, 1, 1))
        torch.testing.assert_close(result, expected[0])
    assert results.min() >= 0
    assert results.max() <= 1


@pytest.mark.parametrize("which", range(4))
def test_an_amount_of_zero_leaves_a_quality_out(which: int) -> None:
    images, unit = photographs(30, 8, 8), noise(30, 5)
    amounts = [0.0] * 4
    assert torch.equal(ColorJitter(*amounts)(images, unit), images)
    amounts[which] = 0.3
    low = -0.3 if which == 3 else 0.7
    expected = ADJUSTMENTS[which](images, (low + 0.6 * unit[:, which]).view(-1, 1, 1, 1))
    torch.testing.assert_close(ColorJitter(*amounts)(images, unit), expected)


@pytest.mark.parametrize("adjust", ADJUSTMENTS[:3])
def test_a_factor_of_one_changes_nothing(adjust) -> None:
    images = photographs(5, 8, 8)
    assert torch.equal(adjust(images, torch.ones(5, 1, 1, 1)), images)


def test_normalising_gives_each_channel_its_mean_and_deviation() -> None:
    images = noise(2, 3, 4, 4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(Normalise()(images, noise(2, 0)), expected)
    assert torch.equal(Normalise([0], [1])(images, noise(2, 0)), images)


@pytest.mark.parametrize("size", [9, 20, 31])
def test_images_are_converted_as_by_pillow(size: int) -> None:
    images = photographs(3, 20, 20)
    coloured, uncoloured = (Convert(channels, size)(images, noise(3, 0)) for channels in (3, 1))
    for image, colour, brightness in zip(images, coloured, uncoloured):
        resized = picture(image).resize((size, size), Image.Resampling.BILINEAR)
        assert off_by(colour, pixels(resized)) <= 1.05
        assert off_by(brightness[0], torch.from_numpy(np.array(resized.convert("L"))) / 255) <= 2.05
    again = Convert(3, size)(uncoloured, noise(3, 0))
    assert torch.equal(again, uncoloured.expand(-1, 3, -1, -1))


def test_what_is_right_already_is_not_converted() -> None:
    images = photographs(3, 20, 20)
    assert torch.equal(Convert(3, 20)(images, noise(3, 0)), images)


@pytest.mark.parametrize("transform", [*ALL, Convert(1, 12)], ids=lambda transform: type(transform).__name__)
def test_an_image_depends_on_its_own_numbers_alone_and_the_given_ones_stay(transform: Transform) -> None:
    images, unit = photographs(20, 16, 16), noise(20, transform.numbers)
    before = images.clone()
    together = transform(images, unit)
    assert torch.equal(images, before)
    alone = torch.cat([transform(images[i : i + 1], unit[i : i + 1]) for i in range(20)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomResizedCrop(0), "RandomResizedCrop: size is at least 1 pixel; got 0"),
        (lambda: RandomResizedCrop(area=(0, 1)), r"RandomResizedCrop: area is .* got \(0, 1\)"),
        (lambda: RandomResizedCrop(ratio=(2, 1)), r"RandomResizedCrop: ratio is .* got \(2, 1\)"),
        (lambda: CenterCrop(0), "CenterCrop: size is at least 1"),
        (lambda: RandomCrop(0), "RandomCrop: size is at least 1 pixel; got 0"),
        (lambda: RandomCrop(4, -1), "RandomCrop: padding is 0 pixels or more; got -1"),
        (lambda: RandomFlip(1.5), "RandomFlip: probability is 0 to 1; got 1.5"),
        (lambda: ColorJitter(hue=0.6), "ColorJitter: .* hue is 0 to 0.5; got 0.4, 0.4, 0.4 and 0.6"),
        (lambda: Normalise(std=(1, 1, 0)), "Normalise: needs as many means as standard deviations"),
        (lambda: Normalise()(noise(2, 1, 4, 4), noise(2, 0)), "Normalise: 3 means for images of 1 channels"),
        (lambda: Convert(2, 28), "Convert: images have 1 channel .* not 2"),
        (lambda: Convert(1, 0), "Convert: size is at least 1"),
        (lambda: Convert(1, 4)(noise(2, 2, 4, 4), noise(2, 0)), "Convert: cannot make images of 2 channels grey"),
        (lambda: ColorJitter()(noise(2, 1, 4, 4), noise(2, 5)), "ColorJitter: it is for RGB images, .* 1 channels"),
    ],
)
def test_what_does_not_fit_is_named(make, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


# ---------------------------------------------------------------------- tasks


@pytest.fixture
def photos() -> ImageClasses:
    images = (photographs(60, 16, 16) * 255).to(torch.uint8)
    return ImageClasses.from_offsets(images, np.arange(0, 61, 10), [f"class{c}" for c in range(6)], "photos")


def same(a: Task, b: Task) -> bool:
    return all(torch.allclose(x, y, rtol=0, atol=1e-5) for x, y in zip(a.tensors, b.tensors, strict=True))


def test_without_transforms_the_source_itself_is_returned(photos: ImageClasses) -> None:
    assert transformed(photos, []) is photos


def test_images_are_transformed_and_nothing_else(photos: ImageClasses) -> None:
    plain, task = photos.tasks(SHAPE, 0, 5, seed=0), transformed(photos, ALL).tasks(SHAPE, 0, 5, seed=0)
    assert task.support_x.shape == (5, 6, 3, 10, 10)
    assert task.query_x.shape == (5, 12, 3, 10, 10)
    assert torch.equal(task.support_y, plain.support_y)
    assert torch.equal(task.query_y, plain.query_y)
    assert task.way == plain.way
    flipped = transformed(photos, [RandomFlip(1)]).tasks(SHAPE, 0, 5, seed=0)
    assert torch.equal(flipped.support_x, plain.support_x.flip(-1))
    assert torch.equal(flipped.query_x, plain.query_x.flip(-1))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 8), (BLOCK - 2, BLOCK + 3), (2 * BLOCK + 5, 2 * BLOCK + 6)])
def test_a_task_does_not_depend_on_what_is_drawn_with_it_or_before(photos: ImageClasses, start: int, stop: int) -> None:
    source = transformed(photos, ALL)
    first = source.tasks(SHAPE, start, stop, seed=7)
    source.tasks(SHAPE, 0, 2 * BLOCK + 9, seed=8)
    for seed in range(10):  # so that the cached draws are dropped
        source.tasks(SHAPE, 0, 1, seed=seed)
    assert same(source.tasks(SHAPE, start, stop, seed=7), first)
    for i in range(start, stop):
        assert same(source.tasks(SHAPE, i, i + 1, seed=7)[0], first[i - start])


class Numbers(Transform):
    """Images that are their own random numbers."""

    numbers = 3

    def __call__(self, images: Tensor, unit: Tensor) -> Tensor:
        return unit[:, :, None, None].clone()


def test_every_image_of_every_task_of_every_seed_has_numbers_of_its_own(photos: ImageClasses) -> None:
    source = transformed(photos, [Numbers()])
    tasks = [source.tasks(SHAPE, 0, BLOCK + 20, seed=seed) for seed in range(3)]
    drawn = torch.cat([torch.cat([task.support_x, task.query_x], 1).flatten() for task in tasks])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert drawn.mean() == pytest.approx(0.5, abs=0.01)
    rows = drawn.view(-1, 3)
    assert len(torch.unique(rows, dim=0)) == len(rows) == 3 * (BLOCK + 20) * 18


@pytest.mark.parametrize("seeds", [1, 9, 30])
def test_seeds_that_are_read_in_turn_draw_each_block_once(
    photos: ImageClasses, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(transformed_module, "generator", lambda *key: drawn.append(key) or generator(*key))
    source = transformed(photos, [Numbers()])
    read_in_turn(source, SHAPE, seeds, BLOCK + 50)
    assert sorted(drawn) == [(seed, STREAM, block) for seed in range(seeds) for block in range(2)]


def test_transforms_share_out_the_numbers_in_turn(photos: ImageClasses) -> None:
    class Second(Numbers):
        numbers = 2

        def __call__(self, images: Tensor, unit: Tensor) -> Tensor:
            return torch.cat([images, unit[:, :, None, None]], 1)

    one = transformed(photos, [Numbers(), Second()]).tasks(SHAPE, 0, 2, seed=0).support_x.squeeze()
    assert one.shape == (2, 6, 5)
    assert len(torch.unique(one.flatten())) == 60


def test_the_stream_is_out_of_reach_of_the_blocks_of_images() -> None:
    # NumPy gives (seed, n, 0) the same generator as (seed, n), which draws the images of block n.
    assert STREAM * BLOCK > 10**11


def test_moving_moves_the_source(photos: ImageClasses) -> None:
    source = transformed(photos, ALL)
    moved = source.to("meta")
    assert isinstance(moved, TransformedTasks)
    assert isinstance(moved.source, ImageClasses)
    assert moved.source.images.device.type == "meta"
    assert same(source.to("cpu").tasks(SHAPE, 0, 3, seed=0), source.tasks(SHAPE, 0, 3, seed=0))


def test_only_images_are_transformed() -> None:
    with pytest.raises(DataError, match=r"transforms are for images .* have the shape \[1\]: leave the transforms out"):
        transformed(Sine().split("train"), [RandomFlip()]).tasks(TaskShape(None, 2, 2), 0, 1, seed=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_tasks_are_transformed_where_the_images_are(photos: ImageClasses) -> None:
    source = transformed(photos, ALL)
    task = source.to("cuda").tasks(SHAPE, 0, 4, seed=0)
    assert task.support_x.device.type == task.query_x.device.type == "cuda"
    assert same(task.map(lambda tensor: tensor.cpu()), source.tasks(SHAPE, 0, 4, seed=0))


# ---------------------------------------------------------------------- by class


@pytest.fixture
def corners() -> ImageClasses:
    """Five classes of eight images, each with its upper left corner bright."""
    images = torch.zeros(40, 1, 2, 2, dtype=torch.uint8)
    images[:, :, 0, 0] = 255
    return ImageClasses.from_offsets(images, np.arange(0, 41, 8), list("abcde"), "corners")


def bright(images: Tensor) -> Tensor:
    """Return which corner of each image is bright, ``[tasks, 3, each]``."""
    return images.flatten(2).argmax(2).unflatten(1, (3, -1))


def test_all_images_of_a_class_in_a_task_are_turned_alike(corners: ImageClasses) -> None:
    task = transformed(corners, [RandomTurn()]).tasks(SHAPE, 0, 400, seed=1)
    turns = bright(task.support_x)[:, :, 0]
    for images in (task.support_x, task.query_x):
        assert (bright(images) == turns[:, :, None]).all()
    counts = torch.zeros(4, 4, 4)
    counts.index_put_(tuple(turns.unbind(1)), torch.ones(400), accumulate=True)
    assert (counts > 0).all()  # classes by themselves
    assert (counts.sum((1, 2)) - 100).abs().max() < 35


def test_turns_by_class_leave_other_transforms_by_image(corners: ImageClasses) -> None:
    both = transformed(corners, [RandomTurn(), RandomFlip()])
    task, part = both.tasks(SHAPE, 0, 60, seed=0), both.tasks(SHAPE, 57, 60, seed=0)
    assert torch.equal(task.query_x[57:], part.query_x)
    apart = (bright(task.query_x) != bright(task.query_x)[:, :, :1]).any(2).float().mean()
    assert 0.7 < apart < 1  # of four images, all are flipped or none once in eight times


def test_only_squares_are_turned_and_the_middle_of_the_draw_leaves_them() -> None:
    images = photographs(3, 8, 8)
    assert torch.equal(RandomTurn()(images, torch.full((3, 1), 0.5)), images)
    with pytest.raises(DataError, match="RandomTurn: it is for square images, and these are of 9×8"):
        RandomTurn()(photographs(3, 8, 9), torch.zeros(3, 1))
