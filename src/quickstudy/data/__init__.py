"""Where tasks come from.

Names are imported when they are first used, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quickstudy.data.base import SPLITS, Dataset, Split, TaskSource
    from quickstudy.data.cifarfs import CIFARFS, FC100
    from quickstudy.data.cub import CUB
    from quickstudy.data.embeddings import Embeddings, write_embeddings
    from quickstudy.data.folders import ClassFolders
    from quickstudy.data.glyphs import Glyphs
    from quickstudy.data.images import ImageClasses
    from quickstudy.data.miniimagenet import MiniImageNet
    from quickstudy.data.omniglot import Omniglot
    from quickstudy.data.omniglot_runs import OmniglotRuns
    from quickstudy.data.own import ArrayFile, Arrays, ImageFolder, ImageList
    from quickstudy.data.registry import DATASETS, Entry, dataset_entry
    from quickstudy.data.sheet import contact_sheet
    from quickstudy.data.sine import Sine
    from quickstudy.data.store import open_store, write_store
    from quickstudy.data.tieredimagenet import TieredImageNet
    from quickstudy.data.transformed import TransformedTasks
    from quickstudy.data.transforms import (
        CenterCrop,
        ColorJitter,
        Convert,
        Normalise,
        RandomCrop,
        RandomFlip,
        RandomResizedCrop,
        RandomTurn,
        Transform,
    )

_HOMES = {
    "SPLITS": "base",
    "Dataset": "base",
    "Split": "base",
    "TaskSource": "base",
    "CIFARFS": "cifarfs",
    "FC100": "cifarfs",
    "CUB": "cub",
    "ClassFolders": "folders",
    "Embeddings": "embeddings",
    "write_embeddings": "embeddings",
    "Glyphs": "glyphs",
    "ImageClasses": "images",
    "MiniImageNet": "miniimagenet",
    "Omniglot": "omniglot",
    "OmniglotRuns": "omniglot_runs",
    "ArrayFile": "own",
    "Arrays": "own",
    "ImageFolder": "own",
    "ImageList": "own",
    "DATASETS": "registry",
    "Entry": "registry",
    "dataset_entry": "registry",
    "contact_sheet": "sheet",
    "Sine": "sine",
    "open_store": "store",
    "write_store": "store",
    "TieredImageNet": "tieredimagenet",
    "TransformedTasks": "transformed",
    "CenterCrop": "transforms",
    "ColorJitter": "transforms",
    "Convert": "transforms",
    "Normalise": "transforms",
    "RandomCrop": "transforms",
    "RandomFlip": "transforms",
    "RandomResizedCrop": "transforms",
    "RandomTurn": "transforms",
    "Transform": "transforms",
}

__all__ = [
    "CIFARFS",
    "CUB",
    "DATASETS",
    "FC100",
    "SPLITS",
    "ArrayFile",
    "Arrays",
    "CenterCrop",
    "ClassFolders",
    "ColorJitter",
    "Convert",
    "Dataset",
    "Embeddings",
    "Entry",
    "Glyphs",
    "ImageClasses",
    "ImageFolder",
    "ImageList",
    "MiniImageNet",
    "Normalise",
    "Omniglot",
    "OmniglotRuns",
    "RandomCrop",
    "RandomFlip",
    "RandomResizedCrop",
    "RandomTurn",
    "Sine",
    "Split",
    "TaskSource",
    "TieredImageNet",
    "Transform",
    "TransformedTasks",
    "contact_sheet",
    "dataset_entry",
    "open_store",
    "write_embeddings",
    "write_store",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
