"""The step of a :class:`~quickstudy.nn.CoordinateLSTM` as compiled code, on request.

A small LSTM on thousands of coordinates is some forty operations of little arithmetic each, and a processor spends
most of its time on starting them and on carrying their results to memory and back. As one loop over the coordinates
(``coordinates.c``) it takes a fraction of that. All it needs is a C compiler on the machine: the loop is compiled in
seconds when it is first asked for, for the sizes asked for, and kept in the cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from quickstudy.errors import RecipeError
from quickstudy.files import cache_folder, write_file

REAL = {torch.float32: "float", torch.float64: "double"}
FLAGS = (
    *("-O3", "-march=native", "-shared", "-fPIC", "-std=c11"),
    # What lets a compiler vectorise sums, short of promising that there is no NaN or infinity.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
)


@cache
def library(sizes: tuple[int, ...], dtype: torch.dtype) -> ctypes.CDLL:
    """Return the compiled step, ``step`` and ``step_backward``, of a stack of cells.

    Args:
        sizes: inputs of the first cell, then the hidden size of each.
        dtype: float32 or float64.

    Raises:
        RecipeError: there is no C compiler, or it fails.
    """
    named = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    compiler = shlex.split(named or "")  # CC may hold options too
    if not compiler:
        raise RecipeError(
            "compiled: true needs a C compiler on the PATH (cc, gcc or clang), and there is none; "
            "install one, name it in CC, or leave compiled out"
        )
    cells = list(enumerate(pairwise(sizes)))
    calls = [f"M({number},{below},{hidden})" for number, (below, hidden) in cells]
    definitions = {
        "REAL": REAL[dtype],
        "UP(M)": " ".join(calls),
        "DOWN(M)": " ".join(reversed(calls)),
        "ROOM": 4 * max(sizes[1:]),
        "TALL": max(below + hidden for below, hidden in pairwise(sizes)) + 1,
    }
    source = resources.files("quickstudy.nn") / "coordinates.c"
    command = [*compiler, *FLAGS, *(f"-D{name}={value}" for name, value in definitions.items())]
    made_for = "\n".join([source.read_text(), *command, *_machine()])
    kept = cache_folder() / "compiled" / f"{hashlib.sha256(made_for.encode()).hexdigest()[:16]}.so"
    if not kept.exists():
        with resources.as_file(source) as file, tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "step.so"
            try:
                done = subprocess.run([*command, str(file), "-o", str(out), "-lm"], capture_output=True, text=True)
                failure = done.stderr.strip()[-400:] if done.returncode else None
            except OSError as error:
                failure = error.strerror
            if failure is not None:
                raise RecipeError(
                    f"compiled: true, but {named} cannot compile coordinates.c: {failure}; "
                    "name another compiler in CC, or leave compiled out"
                )
            write_file(kept, lambda file: file.write(out.read_bytes()))
    made = ctypes.CDLL(str(kept))
    for function in (made.step, made.step_backward):
        function.argtypes = [*[ctypes.c_long] * 4, ctypes.c_void_p]
        function.restype = None
    return made


def _machine() -> list[str]:
    """Return what code for this very processor depends on, for a cache folder may be common to several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return [platform.machine(), *sorted({line for line in lines if line.startswith(("flags", "Features"))})]


def kept_rows(weights: Sequence[Tensor], stateful: bool) -> list[int]:
    """Return how many rows of what ``lstm.forward_step`` keeps are of which cell: inputs, gates, tanhs."""
    gates = [weight.shape[-2] for weight in weights]
    return [*(weight.shape[-1] for weight in weights), *gates, *(rows // (4 if stateful else 3) for rows in gates)]


def step(x: Tensor, weights: list[Tensor], hs: list[Tensor], cs: list[Tensor]) -> list[Tensor]:
    """Do what ``lstm.forward_step`` does."""
    *front, _, count = x.shape
    kept = kept_rows(weights, bool(hs))
    hidden = kept[2 * len(weights) :]
    rows = [*hidden, *hidden, *kept]
    made = x.new_empty(*front, sum(rows), count)
    call = _Call(x, weights, bool(hs))
    call.give(x, *weights)
    call.give(*(hs or call.nothing), *(cs or call.nothing))
    call.give_rows(made, rows)
    call("step")
    return list(made.split([*hidden, *hidden, sum(kept)], -2))


def step_backward(
    weights: list[Tensor], cs: list[Tensor], kept: Tensor, of_h: list[Tensor | None], of_c: list[Tensor | None]
) -> list[Tensor]:
    """Do what ``lstm.backward_step`` does."""
    *front, _, count = kept.shape
    call = _Call(kept, weights, bool(cs))
    states = [*call.hidden, *call.hidden] if cs else []
    made = kept.new_empty(*front, call.below + sum(states), count)
    of_weights = [torch.zeros(*front, *weight.shape[-2:], dtype=weight.dtype) for weight in weights]
    call.give_rows(made, [call.below])
    call.give(*weights, *(cs or call.nothing))
    call.give_rows(kept, kept_rows(weights, bool(cs)))
    call.give(*of_h, *of_c, *of_weights)
    if cs:
        call.give_rows(made, states, start=call.below)
    else:
        call.give(*call.nothing, *call.nothing)
    call("step_backward")
    of_x, *of_states = made.split([call.below, *states], -2)
    return [of_x, *of_weights, *of_states]


class _Call:
    """The arguments of a compiled function: where its arrays lie, and how far it is from one matrix to the next."""

    def __init__(self, like: Tensor, weights: Sequence[Tensor], stateful: bool) -> None:
        self.first = not stateful
        self.like = like
        self.hidden = [weight.shape[-2] // (4 if stateful else 3) for weight in weights]
        self.below = weights[0].shape[-1] - 1 - (self.hidden[0] if stateful else 0)
        self.nothing = [None] * len(weights)
        self.places: list[int] = []
        self.copies: list[Tensor] = []  # they live until the call is over

    def give(self, *tensors: Tensor | None) -> None:
        """Add arrays, ``None`` for one that is not there."""
        for tensor in tensors:
            if tensor is None:
                self.places += (0, 0)
            else:
                self.places += self._place(tensor)

    def give_rows(self, tensor: Tensor, rows: Sequence[int], start: int = 0) -> None:
        """Add the arrays of so many rows each that lie in ``tensor`` one after the other, from a row on."""
        place, step = self._place(tensor)
        row = tensor.shape[-1] * tensor.element_size()
        place += start * row
        for count in rows:
            self.places += (place, step)
            place += count * row

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        step = _step(tensor)
        if step is None:
            tensor = tensor.contiguous()
            self.copies.append(tensor)
            step = tensor.shape[-2] * tensor.shape[-1]
        return tensor.data_ptr(), step

    def __call__(self, name: str) -> None:
        function = getattr(library((self.below, *self.hidden), self.like.dtype), name)
        places = (ctypes.c_long * len(self.places))(*self.places)
        shape = self.like.shape
        function(self.first, len(self.hidden), shape[:-2].numel(), shape[-1], places)


def _step(tensor: Tensor) -> int | None:
    """Return how far it is from one of its matrices to the next; ``None`` if they do not lie evenly in memory."""
    shape, stride = tensor.shape, tensor.stride()
    if stride[-1] != 1 or stride[-2] != shape[-1]:
        return None
    if len(shape) < 4:
        return stride[0] if len(shape) == 3 else 0
    step, matrices = 0, 1
    for size, own in zip(shape[-3::-1], stride[-3::-1]):
        if matrices > 1 and size > 1 and own != matrices * step:
            return None
        if matrices == 1:
            step = own
        matrices *= size
    return step
