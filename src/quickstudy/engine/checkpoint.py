"""Weights and training states on disk: whole or not there, and loaded without running code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from quickstudy.errors import TrainingError
from quickstudy.files import write_file

FORMAT = 1
"""Of training states; raised when what they hold changes."""


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Save a training state: tensors, numbers, strings, lists and dicts.

    Raises:
        FileError: it cannot be written.
    """
    write_file(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_state(path: Path) -> dict[str, Any]:
    """Load a training state; no code in the file is run.

    Raises:
        TrainingError: the file is damaged, of another kind, or of another version.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        found = state.pop("format", FORMAT)
    except Exception as error:
        raise TrainingError(
            f"cannot read the checkpoint {path}: {str(error).splitlines()[0]}; remove it to train from the start"
        ) from error
    if found != FORMAT:
        raise TrainingError(
            f"the checkpoint {path} has format {found}, and this version of quickstudy continues {FORMAT}: continue it "
            "with the version that wrote it, or remove it to train from the start"
        )
    return state


def save_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Save named tensors in the safetensors format.

    Raises:
        FileError: they cannot be written.
    """
    blob = save_tensors({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
    write_file(path, lambda file: file.write(blob))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load named tensors.

    Raises:
        TrainingError: the file is missing or damaged.
    """
    try:
        return load_tensors(path.read_bytes())
    except Exception as error:
        raise TrainingError(f"cannot read the weights {path}: {error}") from error


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name; what has several names, by the first."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@torch.no_grad()
def restore(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into the parameters and buffers of the same names, in the type that these have.

    Unlike ``load_state_dict`` it knows buffers that are not persistent, and weights that are used in two places.

    Raises:
        TrainingError: their names or shapes are not those of the module.
    """
    own = tensors_of(module)
    shapes, found = ({name: tuple(t.shape) for name, t in some.items()} for some in (own, tensors))
    wrong = [name for name in {**shapes, **found} if shapes.get(name) != found.get(name)]
    if wrong:
        raise TrainingError(
            f"the saved weights are not those of this {type(module).__name__}: {wrong[0]!r} has the shape "
            f"{found.get(wrong[0], 'of nothing')} there and {shapes.get(wrong[0], 'of nothing')} here; has its code "
            "changed since?"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
