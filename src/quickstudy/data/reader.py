"""A user's own pictures, brought to what a network was trained on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from quickstudy.data.base import Dataset, TaskSource
from quickstudy.data.decode import Resize, convert, decode_image, square
from quickstudy.data.images import unit_floats
from quickstudy.data.transformed import TransformedTasks, transformed
from quickstudy.data.transforms import Convert, Transform, transform_images
from quickstudy.errors import DataError, InputError

AnyPicture = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""A path, an image of Pillow, or pixels ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``: integers 0 to 255 or floats 0 to 1.

Of four channels the last is transparency, and ignored.
"""

File = TypeVar("File", str, Path)

MODES = {1: "L", 3: "RGB"}
"""Pillow's names of the colours of so many channels."""


@dataclass(frozen=True)
class PictureReader:
    """Makes of any picture what a dataset would have made of it: colours, size, range of values, test-time transforms.

    What becomes of a picture depends on it alone: a transform that is random gets the middle of what it may draw.

    Args:
        channels: 1 (grey) or 3 (red, green, blue).
        side: height and width, in pixels, before the transforms.
        resize: how a picture becomes a square.
        ink: these are characters, bright on dark: a picture whose border is bright is inverted.
        transforms: applied in turn.
    """

    channels: int
    side: int
    resize: Resize = "squash"
    ink: bool = False
    transforms: Sequence[Transform] = ()

    def __call__(self, pictures: Iterable[AnyPicture]) -> Tensor:
        """Return pictures as a network sees them, float32 ``[n, channels, height, width]``.

        Raises:
            DataError: a file cannot be read or is damaged, or the pictures do not suit a transform.
            InputError: one is no picture; the message says what it is.
        """
        pixels = torch.from_numpy(np.stack([self.pixels(picture) for picture in pictures]))
        return _transformed(self.transforms, unit_floats(pixels))

    def tasks(self, source: TaskSource) -> TaskSource:
        """Return the tasks of another dataset, with their images as a network sees them, made on the source's device.

        Characters stay bright on dark, and photographs as they are. A transform that is random draws for each image.
        """
        return TransformedTasks(source, (Convert(self.channels, self.side), *self.transforms))

    def pixels(self, picture: AnyPicture) -> np.ndarray:
        """Return a picture before the transforms, uint8 ``[channels, side, side]``.

        Raises:
            DataError, InputError: as of a call.
        """
        image = square(opened(picture, MODES[self.channels]), self.side, self.resize)
        pixels = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
        if self.ink:
            border = np.concatenate([pixels[:, [0, -1]].ravel(), pixels[:, :, [0, -1]].ravel()])
            if border.mean() > 127.5:
                return 255 - pixels
        return pixels


@dataclass(frozen=True)
class ArrayReader:
    """Takes arrays for what a dataset would have made of them, but for its test-time transforms.

    Args:
        transforms: applied in turn, as by a :class:`PictureReader`.
    """

    transforms: Sequence[Transform] = ()

    def __call__(self, arrays: np.ndarray | Tensor) -> Tensor:
        """Return arrays ``[n, ...]`` as a network sees them.

        Raises:
            DataError: they do not suit a transform.
        """
        return _transformed(self.transforms, torch.from_numpy(np.array(arrays)))

    def tasks(self, source: TaskSource) -> TaskSource:
        """Return the tasks of another dataset, transformed."""
        return transformed(source, self.transforms)


Reader = PictureReader | ArrayReader
"""What makes inputs of a network."""


def picture_size(shape: Sequence[int], dataset: Dataset | None = None) -> int | None:
    """Return the side of the pictures, before transforms, that a network was trained on; ``None``: on other things.

    Args:
        shape: of an input of the network; of square images ``(channels, side, side)``.
        dataset: what it was trained on, if that is known.
    """
    if len(shape) != 3 or shape[0] not in MODES or shape[1] != shape[2] or not getattr(dataset, "pictures", True):
        return None
    return getattr(dataset, "image_size", shape[1])


def reader_of(shape: Sequence[int], dataset: Dataset | None = None) -> Reader:
    """Return the reader for a network that was trained on a dataset.

    Args:
        shape, dataset: as of :func:`picture_size`.
    """
    return reader_of_size(picture_size(shape, dataset), shape, dataset)


def reader_of_size(size: int | None, shape: Sequence[int], dataset: Dataset | None) -> Reader:
    """Return the reader for a network of which it is known what :func:`picture_size` returns, ``size``."""
    transforms = getattr(dataset, "test_transforms", ())
    if size is None:
        return ArrayReader(transforms)
    return PictureReader(
        shape[0],
        size,
        getattr(dataset, "resize", "squash"),
        getattr(dataset, "ink", False),
        transforms,
    )


def _transformed(transforms: Sequence[Transform], images: Tensor) -> Tensor:
    """Transform images ``[n, C, H, W]``, each of them always in the same way."""
    if not transforms:
        return images
    numbers = sum(transform.numbers for transform in transforms)
    return transform_images(transforms, images, images.new_full((len(images), numbers), 0.5))


def readable(paths: Iterable[File]) -> tuple[list[File], list[str]]:
    """Return the image files that can be decoded, and of each of the others what is wrong with it."""
    good, wrong = [], []
    for path in paths:
        try:
            opened(path, "RGB")
        except DataError as error:
            wrong.append(str(error))
        else:
            good.append(path)
    return good, wrong


def opened(picture: AnyPicture, mode: str) -> Image.Image:
    """Return a picture as an upright image of Pillow, with the colours of one of its modes.

    Raises:
        DataError: a file cannot be read or is damaged, or an image has greys of an unknown range.
        InputError: it is no picture.
    """
    if isinstance(picture, str | os.PathLike):
        path = Path(picture)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the image {path}: {error.strerror}") from error
        return decode_image(content, str(path), mode=mode, upright=True)
    if isinstance(picture, Image.Image):
        return convert(picture, str(getattr(picture, "filename", "") or "in memory"), mode=mode, upright=True)
    return Image.fromarray(_bytes(picture)).convert(mode)


def _bytes(picture: np.ndarray | Tensor) -> np.ndarray:
    """Return the pixels of an array, uint8 ``[H, W]`` or ``[H, W, 3 or 4]``."""
    given = pixels = picture.numpy(force=True) if isinstance(picture, Tensor) else np.asarray(picture)
    if pixels.dtype.kind not in "buif" or not pixels.size:
        raise InputError(
            f"a picture is a path, an image of Pillow, or an array of pixels; got {type(picture).__name__}"
        )
    if pixels.ndim == 3 and pixels.shape[2] not in {1, 3, 4} and pixels.shape[0] in {1, 3, 4}:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] not in {3, 4}):
        raise InputError(
            f"an array of pixels is [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels; got {[*given.shape]}. "
            "Several have one more axis in front, a single one goes into a list, and flat rows want reshaping"
        )
    if pixels.dtype.kind in "bf":
        pixels = np.rint(pixels * 255.0)  # datasets hold bytes too
    if not (pixels.min() >= 0 and pixels.max() <= 255):
        raise InputError(
            "pixels are integers from 0 to 255 or floats from 0 to 1; "
            f"got {given.dtype} from {given.min():.4g} to {given.max():.4g}: scale them, or give uint8"
        )
    return np.ascontiguousarray(pixels, dtype=np.uint8)
