"""A trained method apart from the run that made it, and from its data: what prediction needs, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from jsonargparse import Namespace
from torch import nn

from quickstudy.data.base import Dataset
from quickstudy.data.reader import ArrayReader, PictureReader, Reader, reader_of, reader_of_size
from quickstudy.data.transforms import Transform
from quickstudy.engine.checkpoint import load_weights, restore, save_weights, tensors_of
from quickstudy.engine.pretrain import EmbedRecipe, Pretrained, nearest_centroid
from quickstudy.engine.recipe import dump_recipe, instantiate, parse_recipe, recipe_text
from quickstudy.engine.run import Run
from quickstudy.engine.testing import calibrate, trained_methods
from quickstudy.errors import RecipeError, TrainingError
from quickstudy.files import write_text
from quickstudy.methods import Method
from quickstudy.nn import FixedStatistics, adopt
from quickstudy.task import Task

FORMAT = 1
FILES = INFO, PARTS, WEIGHTS = "model.json", "model.yaml", "model.safetensors"


@dataclass
class Parts:
    """What prediction needs of a recipe.

    Args:
        method: the meta-learner, if there is one.
        backbone: if not, a network that was pre-trained as a classifier, to be used as
            :func:`~quickstudy.engine.pretrain.nearest_centroid`.
        temperature: of that.
        reader: what makes pictures its inputs, if it was trained on such.
        transforms: if not, of an :class:`~quickstudy.data.reader.ArrayReader`.
    """

    method: Method | None = None
    backbone: nn.Module | None = None
    temperature: float = 1.0
    reader: PictureReader | None = None
    transforms: list[Transform] = field(default_factory=list)


@dataclass(frozen=True)
class Trained:
    """A method that has learned to learn.

    In a folder it is

    ===================== ===================================================
    ``model.json``        the shape of its inputs, and the way it was made for
    ``model.yaml``        its parts, by class and arguments (:class:`Parts`)
    ``model.safetensors`` its weights and buffers
    ===================== ===================================================

    Attributes:
        method: in evaluation mode, if it is built.
        reader: what makes its inputs, of pictures if it was trained on such.
        parts: YAML of :class:`Parts`, or ``None`` if it was made in Python (then it cannot be saved).
    """

    method: Method
    reader: Reader = field(default_factory=ArrayReader)
    parts: str | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one input, or ``None`` if the method is not built."""
        return self.method.input_shape if self.method.built else None

    @classmethod
    def of(cls, method: Method) -> Self:
        """Return a method that was made in Python; pictures are brought to the size of its inputs, if it is built."""
        if not method.built:
            return cls(method)
        return cls(method, reader_of(method.input_shape))

    @classmethod
    def open(cls, folder: str | Path, seed: int | None = None) -> Self:
        """Open what was trained: the folder of a run, of ``quickstudy embed``, or of :meth:`save`.

        Args:
            folder: where it is.
            seed: of a run with several: whose weights; its first if ``None``.

        Raises:
            RecipeError: there is nothing of the kind, or it has no such seed.
            TrainingError: it has no weights yet, or they are damaged.
            DataError: the run's method needs to see its training data before a test, and it is not on this machine.
        """
        folder = Path(folder)
        if (folder / INFO).is_file():
            return cls._load(folder)
        pretrained = Pretrained(folder)
        if pretrained.exists():
            settings = parse_recipe(pretrained.recipe_text, kind=EmbedRecipe)
            temperature = pretrained.info.get("temperature", 1.0)
            method = nearest_centroid(pretrained.backbone(), temperature)
            method.build(Task.of_noise(2, pretrained.input_shape))
            reader = _reader(method, instantiate(settings, EmbedRecipe).dataset, pretrained)
            return cls._from(method, reader, settings, backbone=settings.backbone, temperature=temperature)
        run = Run.open(folder)
        seeds: list[int] = run.info["seeds"]
        if seed is not None and seed not in seeds:
            raise RecipeError(f"{folder} was trained with seeds {', '.join(map(str, seeds))}, not {seed}")
        chosen = seeds[0] if seed is None else seed
        (method,) = trained_methods(run, "best", seeds=[chosen])
        settings = parse_recipe(run.recipe_text)
        recipe = instantiate(settings)
        calibrate(method, recipe, chosen, "cpu")
        return cls._from(method, _reader(method, recipe.dataset, run), settings, method=settings.method)

    @classmethod
    def _from(cls, built: Method, reader: Reader, settings: Namespace, **part: Any) -> Self:
        """Return a built method, given the settings of its recipe, and the parts that it consists of."""
        transforms = settings.get("dataset.init_args.test_transforms") or []
        if isinstance(reader, PictureReader):
            part["reader"] = Namespace(vars(reader) | {"transforms": transforms})
        else:
            part["transforms"] = transforms
        return cls(built.eval(), reader, dump_recipe(Namespace(**part), Parts))

    @classmethod
    def _load(cls, folder: Path) -> Self:
        shape, way = read_info(folder / INFO, "input_shape", "way")
        text, weights = recipe_text(str(folder / PARTS)), load_weights(folder / WEIGHTS)
        parts = instantiate(parse_recipe(text, kind=Parts), Parts)
        method = parts.method
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
            example = Task.of_noise(way, shape)
            if parts.backbone is not None:
                adopt(parts.backbone, example.support_x)
                fixed = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
                method = nearest_centroid(FixedStatistics.restore(parts.backbone, fixed), parts.temperature)
            if method is None:
                raise TrainingError(f"{folder / PARTS} is damaged: it has neither a method nor a backbone")
            method.build(example)
        if weights:
            method.to(next(iter(weights.values())).dtype)  # all are of one type
        restore(method, weights)
        return cls(method.eval(), parts.reader or ArrayReader(parts.transforms), text)

    def save(self, folder: str | Path) -> None:
        """Write it into a folder, to be opened where its data is not.

        Raises:
            RecipeError: it was made in Python.
            FileError: a file cannot be written.
        """
        if self.parts is None:
            raise RecipeError(
                "a method that was made in Python has no recipe to save: train it by one (`quickstudy train`) and give "
                "the folder of the run"
            )
        folder = Path(folder)
        save_weights(folder / WEIGHTS, tensors_of(self.method))
        write_text(folder / PARTS, self.parts)
        write_info(folder / INFO, input_shape=[*self.method.input_shape], way=self.method.way)


def _reader(method: Method, dataset: Dataset, run: Run) -> Reader:
    """Return what makes inputs of the method of a run, which has kept the size of pictures unless it is old."""
    shape, info = method.input_shape, run.info
    if "picture_size" in info:
        return reader_of_size(info["picture_size"], shape, dataset)
    return reader_of(shape, dataset)


def write_info(path: Path, **values: Any) -> None:
    """Write values as JSON, to be read by :func:`read_info`.

    Raises:
        TypeError: JSON has no such values.
        FileError: the file cannot be written.
    """
    write_text(path, json.dumps({"format": FORMAT, **values}, indent=2, ensure_ascii=False) + "\n")


def read_info(path: Path, *names: str) -> list[Any]:
    """Return the values of these names that :func:`write_info` has written.

    Raises:
        TrainingError: the file is damaged, or of another version.
    """
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if info["format"] != FORMAT:
            raise ValueError(f"it has format {info['format']}, and this version of quickstudy reads {FORMAT}")
        return [info[name] for name in names]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} is damaged, or of another version: {error}") from error
