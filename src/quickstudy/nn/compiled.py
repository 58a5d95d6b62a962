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
        "TALL": max(sizes),
        "CELLS": len(cells),
        "TOP": sizes[-1],
    }
    source = resources.files("quickstudy.nn") / "coordinates.c"
    command = [*compiler, *FLAGS, *(f"-D{name}={value}" for name, value in definitions.items())]
    made_for = "\n".join([source.read_text(encoding="utf-8"), *command, *_machine()])
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
        function.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p]
        function.restype = None
    return made


def _machine() -> list[str]:
    """Return what code for this very processor depends on, for a cache folder may be common to several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return [platform.machine(), *sorted({line for line in lines if line.startswith(("flags", "Features"))})]


def step(sizes: Sequence[int], x: Tensor, weights: Tensor, state: Tensor | None) -> list[Tensor]:
    """Do what ``lstm.forward_step`` does, but keep the gates and the hyperbolic tangents alone."""
    *front, _, count = x.shape
    units = sum(sizes[1:])
    made = x.new_empty(*front, (6 if state is None else 7) * units, count)
    new, kept = made.narrow(-2, 0, 2 * units), made.narrow(-2, 2 * units, made.shape[-2] - 2 * units)
    _call("step", sizes, [x, weights.unsqueeze(-2), state, new, kept])
    return [made.narrow(-2, units - sizes[-1], sizes[-1]), new, kept]


def step_backward(
    sizes: Sequence[int],
    x: Tensor,
    weights: Tensor,
    state: Tensor | None,
    new: Tensor,
    kept: Tensor,
    of_out: Tensor | None,
    of_new: Tensor | None,
) -> list[Tensor]:
    """Do what ``lstm.backward_step`` does."""
    made = [x.new_empty(x.shape), weights.new_zeros(weights.shape)]  # contiguous, whatever x is
    if state is not None:
        made.append(state.new_empty(state.shape))
    of_x, of_weights, *of_state = made
    read = [x, weights.unsqueeze(-2), state, new, kept, of_out, of_new]
    _call("step_backward", sizes, [*read, of_x, of_weights.unsqueeze(-2), *(of_state or [None])])
    return made


def _call(name: str, sizes: Sequence[int], tensors: Sequence[Tensor | None]) -> None:
    """Call a compiled function with where its arrays ``[..., rows, C]`` lie, and how far it is from matrix to matrix.

    Args:
        name: of the function.
        sizes: of the stack.
        tensors: the arrays, of which the first is the input ``x``; ``None`` for one that is not there.
    """
    places: list[int] = []
    copies: list[Tensor] = []  # they live until the call is over
    for tensor in tensors:
        if tensor is None:
            places += (0, 0)
            continue
        step = _step(tensor)
        if step is None:
            tensor = tensor.contiguous()
            copies.append(tensor)
            step = tensor.shape[-2] * tensor.shape[-1]
        places += (tensor.data_ptr(), step)
    x = tensors[0]
    assert x is not None
    function = getattr(library(tuple(sizes), x.dtype), name)
    function(x.shape[:-2].numel(), x.shape[-1], (ctypes.c_long * len(places))(*places))


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
