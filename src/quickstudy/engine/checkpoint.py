"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from quickstudy.errors import TrainingError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in its place.

    Whatever happens meanwhile, ``path`` holds either what it held before or all that is new.

    Raises:
        TrainingError: the file cannot be written, because the disk is full or for another reason of the system.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        before = "what it held before is unharmed" if path.exists() else "nothing was left there"
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
        raise TrainingError(f"cannot write {path}: {cause}; {before}. Make room, or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Save a training state: tensors, numbers, strings, lists and dicts.

    Raises:
        TrainingError: it cannot be written.
    """
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_state(path: Path) -> dict[str, Any]:
    """Load a training state; no code in the file is run.

    Raises:
        TrainingError: the file is damaged or of another kind.
    """
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise TrainingError(
            f"cannot read the checkpoint {path}: {str(error).splitlines()[0]}; remove it to train from the start"
        ) from error


def save_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Save named tensors in the safetensors format.

    Raises:
        TrainingError: they cannot be written.
    """
    blob = save_tensors({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    write_atomically(path, lambda temporary: temporary.write_bytes(blob))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load named tensors.

    Raises:
        TrainingError: the file is missing or damaged.
    """
    try:
        return load_tensors(path.read_bytes())
    except Exception as error:
        raise TrainingError(f"cannot read the weights {path}: {error}") from error
