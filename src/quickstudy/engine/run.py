"""The folder of a run: everything a training leaves behind, and how to read it back."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Self

from quickstudy.engine.checkpoint import load_state, load_weights, save_state, save_weights
from quickstudy.errors import RecipeError, TrainingError
from quickstudy.files import csv_text, write_text
from quickstudy.task import Task


@dataclass(frozen=True)
class Run:
    """The folder of one training of a recipe, with one or several seeds.

    ======================== =====================================================================
    ``recipe.yaml``          every setting, defaults written out
    ``run.json``             the seeds, how they were grouped, shape of an input, way, side of pictures before
                             transforms (null: others), machine, versions, command, commit
    ``metrics.csv|.jsonl``   one row a validation and seed
    ``state-<seeds>.pt``     all that is needed to continue (``--resume``)
    ``best-<seed>.safetensors``, ``last-<seed>.safetensors``  weights
    ``validations/``         weights at every validation, if the recipe says ``validation.keep``
    ``curves.png``           training loss and validation score
    ``test.jsonl``           what ``quickstudy test`` measured
    ======================== =====================================================================
    """

    folder: Path

    COMMAND: ClassVar[str] = "train"
    """The command that makes such a folder."""
    INFO: ClassVar[str] = "run.json"
    """The file that tells such a folder from others, with the seeds and what :func:`environment` returns."""
    FILES: ClassVar[tuple[str, ...]] = (
        *("run.json", "recipe.yaml", "metrics.csv", "metrics.jsonl", "test.jsonl", "curves.png", "task.png"),
        *("state-*.pt", "best-*.safetensors", "last-*.safetensors", "validations", "tensorboard"),
    )
    """Patterns of all that it may hold."""

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open the folder of an existing run.

        Raises:
            RecipeError: there is none there.
        """
        run = cls(Path(folder))
        if not run.exists():
            near = sorted(str(path.parent) for path in Path("runs").glob(f"**/{cls.INFO}"))
            raise RecipeError(
                f"{folder} is not the folder of a run (it has no recipe.yaml and {cls.INFO})"
                + (f"; there are {', '.join(near[:10])}" if near else f"; `quickstudy {cls.COMMAND} RECIPE` makes one")
            )
        return run

    def exists(self) -> bool:
        """Tell whether the folder is that of a run."""
        return all((self.folder / name).is_file() for name in ("recipe.yaml", self.INFO))

    def begun(self, *, resume: bool, overwrite: bool) -> bool:
        """Tell whether to continue what the folder holds, and not to begin anew.

        Raises:
            RecipeError: it holds other things, or a training that is to be neither continued nor replaced.
        """
        exists = self.exists()
        if not exists and self.folder.is_dir() and set(self.folder.iterdir()) - self.own_files():
            raise RecipeError(f"{self.folder} holds other things than a run; choose another folder with --out")
        if exists and not (resume or overwrite):
            raise RecipeError(
                f"{self.folder} holds a training already: continue it with --resume, replace it with --overwrite, "
                "or choose another folder with --out"
            )
        return exists and not overwrite

    def own_files(self) -> set[Path]:
        """Return what runs have left in the folder, fragments of a write that was killed included."""
        patterns = [*self.FILES, *(f".{pattern}-*" for pattern in self.FILES)]
        return {path for pattern in patterns for path in self.folder.glob(pattern)}

    def clear(self) -> None:
        """Remove what runs have left in the folder, and nothing else; first the states, which are of no use alone."""
        for path in sorted(self.own_files(), key=lambda path: path.suffix != ".pt"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    @property
    def recipe_text(self) -> str:
        """The YAML of all settings."""
        return (self.folder / "recipe.yaml").read_text(encoding="utf-8")

    @property
    def name(self) -> str:
        """The name of the recipe."""
        return self.info["recipe"]

    @property
    def info(self) -> dict[str, Any]:
        """What :attr:`INFO` holds."""
        return _parsed(self.folder / self.INFO, (self.folder / self.INFO).read_text(encoding="utf-8"))

    @property
    def example(self) -> Task | None:
        """A task of random inputs of the shape that was trained on, ``None`` in regression: to build a method without
        the data; ``None`` also for runs of a version that did not keep the shape."""
        info = self.info
        shape, way = info.get("input_shape"), info.get("way")
        return None if shape is None or way is None else Task.of_noise(way, shape)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the run, whole or not at all."""
        write_text(self.folder / name, text)

    def write_info(self, info: dict[str, Any]) -> None:
        """Write :attr:`INFO`."""
        self.write_text(self.INFO, json.dumps(info, indent=2) + "\n")

    def state_path(self, seeds: list[int]) -> Path:
        """The checkpoint of a group of seeds that train together."""
        return self.folder / f"state-{'-'.join(map(str, seeds))}.pt"

    def save_state(self, seeds: list[int], state: dict[str, Any]) -> None:
        """Save the checkpoint of a group of seeds."""
        save_state(self.state_path(seeds), state)

    def load_state(self, seeds: list[int]) -> dict[str, Any] | None:
        """Load the checkpoint of a group of seeds, if there is one."""
        path = self.state_path(seeds)
        return load_state(path) if path.exists() else None

    @staticmethod
    def validation(updates: int) -> str:
        """Name the weights that were kept of the validation after so many updates."""
        return f"validations/{updates}"

    def validations(self) -> list[int]:
        """Return the updates after which weights of all seeds were kept at a :meth:`validation`, in order."""
        folder = self.folder / "validations"
        kept = [
            {int(path.stem.split("-")[0]) for path in folder.glob(f"*-{seed}.safetensors")}
            for seed in self.info["seeds"]
        ]
        return sorted(set.intersection(*kept)) if kept else []

    def save_weights(self, kind: str, seed: int, tensors: dict[str, Any]) -> None:
        """Save weights of a seed: the ``best``, the ``last``, or those of a :meth:`validation`."""
        save_weights(self.folder / f"{kind}-{seed}.safetensors", tensors)

    def load_weights(self, kind: str, seed: int) -> dict[str, Any]:
        """Load weights of a seed: the ``best``, the ``last``, or those of a :meth:`validation`."""
        path = self.folder / f"{kind}-{seed}.safetensors"
        if not path.exists():
            raise TrainingError(
                f"{self.folder} has no {kind} weights of seed {seed} yet; continue it with "
                f"`quickstudy {self.COMMAND} {self.folder} --resume`"
            )
        return load_weights(path)

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write the history of a training as CSV and as JSON lines."""
        self.write_text("metrics.csv", csv_text(rows))
        self.write_text("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    @property
    def finished(self) -> bool:
        """Whether every seed has trained for all updates of the recipe."""
        from quickstudy.engine.recipe import parse_recipe

        planned = parse_recipe(self.recipe_text).train.updates
        last = {row["seed"]: row["update"] for row in self.metrics()}
        return all(last.get(seed, 0) >= planned for seed in self.info["seeds"])

    def metrics(self) -> list[dict[str, Any]]:
        """Return the history of the training."""
        path = self.folder / "metrics.jsonl"
        return [_parsed(path, line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TrainingError(f"{path} is damaged ({error}); train again with --overwrite") from error


def environment(device: str) -> dict[str, Any]:
    """Return what a result depends on besides its recipe: versions, machine, device, commit, command."""
    import torch

    versions = {name: metadata.version(name) for name in ("quickstudy", "torch", "numpy")}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"system": platform.platform(), "processor": _processor(), "threads": torch.get_num_threads()},
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "commit": _commit(),
        "command": " ".join(sys.argv[1:]),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the source tree the library runs from, if it is one."""
    try:
        here = Path(__file__)

        def git(*arguments: str) -> str:
            command = ["git", *arguments]
            return subprocess.run(command, cwd=here.parent, capture_output=True, text=True, timeout=5).stdout.strip()

        if not git("ls-files", here.name):  # installed somewhere inside of another project
            return None
        return git("describe", "--always", "--dirty") or None
    except (OSError, subprocess.TimeoutExpired):
        return None
