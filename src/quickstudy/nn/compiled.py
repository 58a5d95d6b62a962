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


class _Array(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("step", ctypes.c_long))


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
        function.argtypes = [*[ctypes.c_long] * 4, ctypes.POINTER(_Array)]
        function.restype = None
    return made


def _machine() -> list[str]:
    """Return what code for this very processor depends on, for a cache folder may be common to several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return [platform.machine(), *sorted({line for line in lines if line.startswith(("flags", "Features"))})]


def step(x: Tensor, weights: list[Tensor], hs: list[Tensor], cs: list[Tensor]) -> list[Tensor]:
    """Do what ``lstm.forward_step`` does."""
    *front, _, count = x.shape
    hidden = [weight.shape[-2] // (4 if hs else 3) for weight in weights]
    tall, gates = [weight.shape[-1] for weight in weights], [weight.shape[-2] for weight in weights]
    rows = [*hidden, *hidden, *tall, *gates, *hidden]
    outputs = x.new_empty(*front, sum(rows), count).split(rows, -2)
    _call("step", x, weights, [x, *weights, *_or_none(hs, weights), *_or_none(cs, weights), *outputs])
    return list(outputs)


def step_backward(
    weights: list[Tensor],
    cs: list[Tensor],
    inputs: list[Tensor],
    gates: list[Tensor],
    tanhs: list[Tensor],
    of_h: list[Tensor | None],
    of_c: list[Tensor | None],
) -> list[Tensor]:
    """Do what ``lstm.backward_step`` does."""
    *front, _, count = gates[0].shape
    hidden = [tanh.shape[-2] for tanh in tanhs]
    states = [*hidden, *hidden] if cs else []
    rows = [weights[0].shape[-1] - 1 - (hidden[0] if cs else 0), *states]
    of_x, *of_states = gates[0].new_empty(*front, sum(rows), count).split(rows, -2)
    of_weights = [torch.zeros(*front, *weight.shape[-2:], dtype=weight.dtype) for weight in weights]
    of_old = of_states or [None] * 2 * len(weights)
    given = [*weights, *_or_none(cs, weights), *inputs, *gates, *tanhs, *of_h, *of_c]
    _call("step_backward", gates[0], weights, [of_x, *given, *of_weights, *of_old])
    return [of_x, *of_weights, *of_states]


def _or_none(states: Sequence[Tensor], weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return states or [None] * len(weights)


def _call(name: str, like: Tensor, weights: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> None:
    first = tensors[1 + len(weights)] is None  # no state yet
    hidden = [weight.shape[-2] // (3 if first else 4) for weight in weights]
    below = weights[0].shape[-1] - 1 - (0 if first else hidden[0])
    arrays, copies = (_Array * len(tensors))(), []  # copies live until the call is over
    for array, tensor in zip(arrays, tensors):
        if tensor is None:
            continue
        step = _step(tensor)
        if step is None:
            tensor = tensor.contiguous()
            copies.append(tensor)
            step = tensor.shape[-2] * tensor.shape[-1]
        array.data, array.step = tensor.data_ptr(), step
    function = getattr(library((below, *hidden), like.dtype), name)
    function(first, len(weights), like.shape[:-2].numel(), like.shape[-1], arrays)


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
