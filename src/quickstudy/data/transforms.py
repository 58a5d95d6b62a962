"""Transforms of whole batches of images, each image by its own random numbers, on the device where they are.

A transform draws nothing itself: it is given the uniform numbers that it needs for each image, so that what becomes of
an image depends on these alone. Distributions are those of torchvision's transforms of the same names.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from quickstudy.errors import DataError

TRIES = 10
"""Crops that are tried before the central one is taken."""

GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the grey value (ITU-R 601-2 luma, as in Pillow)."""


class Transform(ABC):
    """What may happen to an image between the dataset and the network."""

    numbers: int = 0
    """Uniform random numbers needed for each image."""

    by_class: bool = False
    """Whether all images of a class in a task are to be given the same numbers."""

    @abstractmethod
    def __call__(self, images: Tensor, unit: Tensor) -> Tensor:
        """Transform a batch; the given images stay as they are.

        Args:
            images: float ``[n, C, H, W]`` in [0, 1].
            unit: ``[n, numbers]`` in [0, 1), on the same device.

        Returns:
            float ``[n, C, H', W']``.

        Raises:
            DataError: the images do not suit the transform.
        """


def transform_images(transforms: Sequence[Transform], images: Tensor, unit: Tensor) -> Tensor:
    """Apply transforms in turn.

    Args:
        transforms: what is to be done.
        images: float ``[n, C, H, W]`` in [0, 1].
        unit: the numbers of all transforms for each image, ``[n, numbers]`` in [0, 1), on the same device.
    """
    for transform, share in zip(transforms, unit.split([own.numbers for own in transforms], dim=1), strict=True):
        images = transform(images, share)
    return images


class CenterCrop(Transform):
    """Keep the central square.

    Args:
        size: its height and width, in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = _at_least_one("CenterCrop", size)

    def __call__(self, images: Tensor, unit: Tensor) -> Tensor:
        """Return ``[n, C, size, size]``, a view of the images."""
        height, width = images.shape[-2:]
        if min(height, width) < self.size:
            raise DataError(
                f"CenterCrop: cannot keep {self.size}×{self.size} pixels of images of {width}×{height}; lower its "
                "size, or raise the dataset's image_size"
            )
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return images[..., top : top + self.size, left : left + self.size]


class Convert(Transform):
    """Bring images to the colours and the size of another dataset.

    Grey values are those of Pillow, and so is the filter that resizes (:func:`crop_and_resize`).

    Args:
        channels: 1 (grey) or 3 (red, green, blue).
        size: height and width of the result, in pixels, whatever the aspect.
    """

    def __init__(self, channels: int, size: int) -> None:
        if channels not in {1, 3}:
            raise DataError(f"Convert: images have 1 channel (grey) or 3 (red, green, blue), not {channels}")
        self.channels = channels
        self.size = _at_least_one("Convert", size)

    def __call__(self, images: Tensor, unit: Tensor) -> Tensor:
        """Return ``[n, channels, size, size]``, a view of the images where nothing has to change."""
        given, height, width = images.shape[1:]
        if given not in {1, 3}:
            raise DataError(
                f"Convert: cannot make images of {given} channels grey or coloured; they need 1 (grey) or 3 (red, "
                "green, blue)"
            )
        if given > self.channels:
            images = grey(images)
        if (height, width) != (self.size, self.size):
            whole = images.new_tensor([0, 0, height, width]).expand(len(images), 4)
            images = crop_and_resize(images, whole, self.size)
        return images.expand(-1, self.channels, -1, -1)


class Normalise(Transform):
    """Subtract a mean from every channel, and divide by a standard deviation; the defaults are ImageNet's.

    Args:
        mean: of each channel, or one for all.
        std: of each channel, or one for all; above zero.
    """

    def __init__(
        self,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise DataError(
                "Normalise: needs as many means as standard deviations, these above zero; "
                f"got mean {list(mean)}, std {list(std)}"
            )
        self.mean = tuple(mean)
        self.std = tuple(std)

    def __call__(self, images: Tensor, unit: Tensor) -> Tensor:
        """Return images of the same shape, no longer in [0, 1]."""
        channels = images.shape[1]
        if len(self.mean) not in {1, channels}:
            raise DataError(
                f"Normalise: {len(self.mean)} means for images of {channels} channels; give one for each, or one"
            )
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean).div_(std)


class RandomCrop(Transform):
    """Surround an image with zeros, and cut out a square anywhere (He et al., 2016, for CIFAR).

    Args:
        size: height and width of the square, in pixels.
        padding: pixels of zeros on each side.
    """

    numbers = 2

    def __init__(self, size: int = 32, padding: int = 4) -> None:
        self.size = _at_least_one("RandomCrop", size)
        if padding < 0:
            raise DataError(f"RandomCrop: padding is 0 pixels or more; got {padding}")
        self.padding = padding

    def __call__(self, images: Tensor, unit: Tensor) -> Tensor:
        """Return ``[n, C, size, size]``."""
        padded = F.pad(images, (self.padding,) * 4)
        height, width = padded.shape[-2:]
        if min(height, width) < self.size:
            raise DataError(
                f"RandomCrop: cannot cut {self.size}×{self.size} pixels out of {width}×{height}, padding included; "
                "lower its size, or raise the dataset's image_size"
            )
        rooms = unit.new_tensor([height, width]) - self.size + 1
        corners = (unit * rooms).long()  # [n, 2]
        square = torch.arange(self.size, device=images.device)
        rows, columns = (corner[:, None] + square for corner in corners.unbind(1))
        each = torch.arange(len(images), device=images.device)[:, None, None]
        return padded[each, :, rows[:, :, None], columns[:, None]].movedim(-1, 1)


class RandomFlip(Transform):
    """Mirror an image, left to right, or leave it.

    Args:
        probability: of mirroring.
    """

    numbers = 1

    def __init__(self, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise DataError(f"RandomFlip: probability is 0 to 1; got {probability}")
        self.probability = probability

    def __call__(self, images: Tensor, unit: Tensor) -> Tensor:
        """Return images of the same shape."""
        mirrored = unit[:, 0] < self.probability
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


class RandomTurn(Transform):
    """Turn all images of a class in a task by 0, 90, 180 or 270 degrees, which makes a class of its own of each.

    Where images are not of tasks, each is turned by itself.
    """

    numbers = 1
    by_class = True

    def __call__(self, images: Tensor, unit: Tensor) -> Tensor:
        """Return images of the same shape.

        Raises:
            DataError: they are not square.
        """
        height, width = images.shape[-2:]
        if height != width:
            raise DataError(f"RandomTurn: it is for square images, and these are of {width}×{height}; crop them before")
        turns = (4 * unit[:, 0] + 2).long() % 4  # what is drawn in the middle leaves an image as it is
        turned = torch.stack([torch.rot90(images, number, (2, 3)) for number in range(4)])
        return turned[turns, torch.arange(len(images), device=images.device)]


class RandomResizedCrop(Transform):
    """Cut out a random box, and resize it to a square (Szegedy et al., 2015).

    The box has a share of the image's area, uniform in ``area``, and an aspect, log-uniform in ``ratio``; both are
    drawn up to ten times, until it fits into the image, and the largest central box of an allowed aspect is taken if
    none does. It is resized as by Pillow's ``resize(..., BILINEAR, box=box)``: where the box is larger than the
    output, a new pixel averages over all that it covers, with triangular weights (at the border of the box it sees a
    little of what lies beyond; torchvision cuts the box out first). That is linear in the rows and in the columns, so
    it is two matrix products for the whole batch.

    Args:
        size: height and width of the result, in pixels.
        area: smallest and largest share of the image's area.
        ratio: smallest and largest width / height of the box.
    """

    numbers = 2 * TRIES + 2

    def __init__(
        self, size: int = 84, area: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
    ) -> None:
        if not 0 < area[0] <= area[1] <= 1:
            raise DataError(f"RandomResizedCrop: area is a smallest and a largest share, above 0 to 1; got {area}")
        if not 0 < ratio[0] <= ratio[1]:
            raise DataError(f"RandomResizedCrop: ratio is a smallest and a largest width / height; got {ratio}")
        self.size = _at_least_one("RandomResizedCrop", size)
        self.area = area
        self.ratio = ratio

    def __call__(self, images: Tensor, unit: Tensor) -> Tensor:
        """Return ``[n, C, size, size]``."""
        return crop_and_resize(images, self.boxes(unit, *images.shape[-2:]), self.size)

    def boxes(self, unit: Tensor, height: int, width: int) -> Tensor:
        """Return a box in an image of ``height`` and ``width`` for each row: top, left, height, width, ``[n, 4]``."""
        tried = unit[:, : 2 * TRIES].unflatten(1, (TRIES, 2))
        area = height * width * _between(self.area, tried[..., 0])
        ratio = _between((math.log(self.ratio[0]), math.log(self.ratio[1])), tried[..., 1]).exp()
        sizes = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], -1).round()  # [n, TRIES, 2]
        # The central box is the last candidate, and always fits. Whether the place of a box is drawn with each try or
        # once for the first that fits makes no difference to its distribution.
        central = sizes.new_tensor(self._central(height, width)).expand(len(unit), 1, 2)
        sizes = torch.cat([sizes, central], 1)
        full = sizes.new_tensor([height, width])
        first = ((sizes >= 1) & (sizes <= full)).all(-1).int().argmax(1)
        size = sizes[torch.arange(len(unit), device=unit.device), first]
        room = full - size
        anywhere = (unit[:, 2 * TRIES :] * (room + 1)).floor()
        corner = torch.where((first == TRIES)[:, None], (room / 2).floor(), anywhere)
        return torch.cat([corner, size], 1)

    def _central(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the largest box of an allowed aspect."""
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        if width < ratio * height:
            return max(round(width / ratio), 1), width
        return height, max(round(height * ratio), 1)


def crop_and_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Resize a box of each image to a square, as Pillow's ``resize((size, size), BILINEAR, box=box)`` does.

    Args:
        images: float ``[n, C, H, W]``.
        boxes: top, left, height and width of each box, in pixels, ``[n, 4]``.
        size: height and width of the result.

    Returns:
        float ``[n, C, size, size]``.
    """
    top, left, high, wide = boxes.to(images.dtype).unbind(1)
    rows = _triangles(top, high, size, images.shape[-2])
    columns = _triangles(left, wide, size, images.shape[-1])
    # Two products: with broadcasting `@` the matrices would be copied for every channel.
    return torch.einsum("ncsw,ntw->ncst", torch.einsum("nsh,nchw->ncsw", rows, images), columns)


def _triangles(start: Tensor, length: Tensor, size: int, pixels: int) -> Tensor:
    """Return the weight of each of ``pixels`` old pixels in each of ``size`` new ones, ``[n, size, pixels]``.

    New pixels share out the ``length [n]`` from ``start [n]`` on; each weighs what lies around its centre by a triangle
    that reaches to the centres of its neighbours, and at least to those of the next old pixels.
    """
    old, new = (torch.arange(n, dtype=start.dtype, device=start.device) + 0.5 for n in (pixels, size))
    step = (length / size)[:, None, None]
    centre = start[:, None, None] + new[:, None] * step
    weights = (1 - (old - centre).abs() / step.clamp_min(1)).clamp_min(0)
    return weights / weights.sum(-1, keepdim=True)


class ColorJitter(Transform):
    """Change brightness, contrast, saturation and hue of colour images by random amounts, in random order.

    Factors of brightness, contrast and saturation are uniform in [max(0, 1 - amount), 1 + amount]; the hue is turned by
    a part of the colour circle uniform in [-hue, hue]. An amount of 0 leaves that quality exactly as it is.

    Args:
        brightness: amount, 0 or more: all values times the factor.
        contrast: amount, 0 or more: away from, or towards, the mean grey value of the image.
        saturation: amount, 0 or more: away from, or towards, the grey value of each pixel.
        hue: amount, 0 to 0.5.
    """

    numbers = 5

    def __init__(
        self, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.2
    ) -> None:
        if min(brightness, contrast, saturation) < 0 or not 0 <= hue <= 0.5:
            raise DataError(
                "ColorJitter: brightness, contrast and saturation are 0 or more, hue is 0 to 0.5; got "
                f"{brightness}, {contrast}, {saturation} and {hue}"
            )
        factors = ((max(0.0, 1 - amount), 1 + amount) for amount in (brightness, contrast, saturation))
        self.bounds = (*factors, (-hue, hue))

    def __call__(self, images: Tensor, unit: Tensor) -> Tensor:
        """Return images of the same shape, in [0, 1].

        Raises:
            DataError: they do not have three channels.
        """
        if images.shape[1] != 3:
            raise DataError(
                f"ColorJitter: it is for RGB images, and these have {images.shape[1]} channels; leave it out"
            )
        orders = torch.tensor(list(permutations(range(len(ADJUSTMENTS)))), device=images.device)
        order = orders[(unit[:, 4] * len(orders)).long()]  # [n, 4]: what is done to each image first, second, ...
        images = images.clone()
        for turn in order.unbind(1):
            for which, (adjust, bounds) in enumerate(zip(ADJUSTMENTS, self.bounds, strict=True)):
                if bounds[0] < bounds[1]:
                    chosen = (turn == which).nonzero().squeeze(1)
                    amount = _between(bounds, unit[chosen, which])
                    images[chosen] = adjust(images[chosen], amount.view(-1, 1, 1, 1))
        return images


def brighten(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply images ``[n, 3, H, W]`` by factors ``[n, 1, 1, 1]``, within [0, 1]."""
    return (images * factor).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend images ``[n, 3, H, W]`` with their mean grey value: factor 0 is all grey, 1 the image, more is beyond."""
    return torch.lerp(grey(images).mean((1, 2, 3), keepdim=True), images, factor).clamp_(0, 1)


def saturate(images: Tensor, factor: Tensor) -> Tensor:
    """Blend images ``[n, 3, H, W]`` with their grey values: factor 0 is grey, 1 the image, more is beyond."""
    return torch.lerp(grey(images), images, factor).clamp_(0, 1)


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of images ``[n, 3, H, W]`` by parts ``[n, 1, 1, 1]`` of the colour circle, at the same HSV value
    and saturation.
    """
    red, green, blue = images.unbind(1)
    high, low = images.amax(1), images.amin(1)
    chroma = high - low
    span = torch.where(chroma > 0, chroma, 1)  # grey has no hue: any will do
    hue = torch.where(
        red == high,
        (green - blue) / span,
        torch.where(green == high, (blue - red) / span + 2, (red - green) / span + 4),
    )  # in sixths of the circle
    hue = hue + 6 * turn[:, 0]
    # Each channel is at its height over a third of the circle, falls and rises over a sixth on either side, and is at
    # its lowest over the third that is left.
    places = torch.stack([hue + 5, hue + 3, hue + 1], 1).remainder_(6)
    return high[:, None] - chroma[:, None] * torch.minimum(places, 4 - places).clamp_(0, 1)


def grey(images: Tensor) -> Tensor:
    """Return the grey values of RGB images, ``[n, 1, H, W]``."""
    return (images * images.new_tensor(GREY).view(-1, 1, 1)).sum(1, keepdim=True)


ADJUSTMENTS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (brighten, contrast, saturate, turn_hue)


def _between(bounds: tuple[float, float], unit: Tensor) -> Tensor:
    """Return numbers uniform between two bounds from such in [0, 1)."""
    return bounds[0] + (bounds[1] - bounds[0]) * unit


def _at_least_one(title: str, size: int) -> int:
    if size < 1:
        raise DataError(f"{title}: size is at least 1 pixel; got {size}")
    return size
