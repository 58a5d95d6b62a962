"""LSTMs from matrix products: they are batched over tasks and differentiated like any other code.

``torch.nn.LSTM`` has no rule for ``vmap``. These are its equals, with the same parameters, equations and
initialisation, and leave out what a caller knows to be zero or common to all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quickstudy.nn import compiled
from quickstudy.nn.compiled import library


class CellState(NamedTuple):
    """Hidden state and cell state of one cell; ``None`` is a state of zeros."""

    h: Tensor | None = None
    c: Tensor | None = None


class LSTMCell(nn.Module):
    r"""One LSTM cell (Hochreiter & Schmidhuber, 1997; with forget gates, Gers et al., 2000).

    .. math::
        (i, f, g, o) = W_{ih} x + b_{ih} + W_{hh} h + b_{hh}, \qquad
        c' = \sigma(f) \odot c + \sigma(i) \odot \tanh(g), \qquad
        h' = \sigma(o) \odot \tanh(c')

    Parameters are named, shaped and drawn as those of ``torch.nn.LSTMCell``.

    Args:
        inputs: size of ``x``.
        hidden: size of ``h`` and ``c``.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden, inputs))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias_ih = nn.Parameter(torch.empty(4 * hidden))
        self.bias_hh = nn.Parameter(torch.empty(4 * hidden))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def inward(self, x: Tensor, fresh: bool = False) -> Tensor:
        """Return what the input ``[M, inputs]`` adds to the gates, ``[M, 4 * hidden]``.

        Args:
            x: the input.
            fresh: the cell state will be zero: leave the forget gate out, ``[M, 3 * hidden]``.
        """
        weight, bias = self._needed(self.weight_ih, fresh), self._needed(self.bias_ih + self.bias_hh, fresh)
        return F.linear(x, weight, bias)

    def forward(self, gates: Tensor, state: CellState) -> CellState:
        """Do one step.

        Args:
            gates: of :meth:`inward`, ``[M, 4 * hidden]``, or ``[M, 3 * hidden]`` if ``state.c`` is ``None``.
            state: ``h`` and ``c``, each ``[M, hidden]``, or ``[1, hidden]`` where all rows have the same.
        """
        fresh = gates.shape[-1] == 3 * self.hidden
        if state.h is not None:
            gates = gates + F.linear(state.h, self._needed(self.weight_hh, fresh))
        parts = gates.split(self.hidden, dim=-1)
        c = torch.sigmoid(parts[0]) * torch.tanh(parts[-2])
        if state.c is not None:
            c = torch.sigmoid(parts[1]) * state.c + c
        return CellState(torch.sigmoid(parts[-1]) * torch.tanh(c), c)

    def _needed(self, rows: Tensor, fresh: bool) -> Tensor:
        if not fresh:
            return rows
        i, _, g, o = rows.split(self.hidden)
        return torch.cat([i, g, o])


class LSTM(nn.Module):
    """A stack of :class:`LSTMCell`, each reading the hidden state of the one below.

    Args:
        inputs: size of the input.
        hidden: size of each cell, from the input up.
    """

    cells: Sequence[LSTMCell]

    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.cells = _stack(inputs, hidden)

    def forward(self, gates: Tensor, state: Sequence[CellState]) -> list[CellState]:
        """Do one step; return the state of every cell, whose last ``h`` is the output.

        Args:
            gates: of the first cell's :meth:`LSTMCell.inward`.
            state: of every cell.
        """
        new: list[CellState] = []
        below: Tensor | None = None
        for cell, own in zip(self.cells, state):
            new.append(cell(gates if below is None else cell.inward(below, fresh=own.c is None), own))
            below = new[-1].h
        return new

    def start(self) -> list[CellState]:
        """Return the state before the first step: zeros."""
        return [CellState() for _ in self.cells]


class BidirectionalLSTM(nn.Module):
    """Two :class:`LSTMCell` that read a sequence, one from its first element on, one from its last back.

    Args:
        inputs: size of an element.
        hidden: size of each cell.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.onward = LSTMCell(inputs, hidden)
        self.backward = LSTMCell(inputs, hidden)

    def forward(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each cell has in its hidden state at every element of ``[L, inputs]``, twice ``[L, hidden]``."""
        return _read(self.onward, sequence), _read(self.backward, sequence.flip(0)).flip(0)


def _read(cell: LSTMCell, sequence: Tensor) -> Tensor:
    state, hidden = CellState(), []
    for gates in cell.inward(sequence).split(1):
        state = cell(gates, state)
        hidden.append(state.h)
    return torch.cat(hidden)


def _stack(inputs: int, hidden: Sequence[int]) -> Any:
    """Return the cells of a stack; a list of modules has no type of its elements."""
    return nn.ModuleList(LSTMCell(below, size) for below, size in zip([inputs, *hidden], hidden))


Step = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""From inputs ``[inputs, C]`` and the state (``None``: zeros) to the output ``[hidden[-1], C]`` and the new state.

A state has ``h`` of all cells one after the other, then ``c`` of all, ``[2 * sum(hidden), C]``.
"""


class CoordinateLSTM(nn.Module):
    """A small LSTM that every one of very many coordinates has for itself, with common weights.

    The coordinates lie along the last axis, so that each gate is one contiguous block of them, and what the cell
    computes of each is done for thousands at once; with the coordinates first, as ``torch.nn.LSTM`` has them, a gate
    of five units would be a stride of twenty, which no processor does at speed.

    It computes in the precision of its weights, whatever that of its inputs, and it can be differentiated once.

    Args:
        inputs: inputs of each coordinate.
        hidden: size of each cell of the stack.
        compiled: do the steps in compiled code, on a CPU (:mod:`quickstudy.nn.compiled`).

    Raises:
        RecipeError: compiled code is asked for, and there is no C compiler.
    """

    cells: Sequence[LSTMCell]

    def __init__(self, inputs: int, hidden: Sequence[int], compiled: bool = False) -> None:
        super().__init__()
        self.sizes = (inputs, *hidden)
        self.compiled = compiled
        if compiled:
            library(self.sizes, torch.float32)
        self.cells = _stack(inputs, hidden)

    def unroll(self) -> Step:
        """Return the function of one step, to be called for all steps of a task: the weights are gathered once."""
        weights = torch.cat([_gathered(cell) for cell in self.cells])

        def step(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
            out, new, _ = _Step.apply(self.compiled, self.sizes, x.to(weights.dtype), weights, state)
            return out, new

        return step


def _gathered(cell: LSTMCell) -> Tensor:
    """Return all weights of a cell, row after row of one matrix ``[4 * hidden, inputs + 1 + hidden]``.

    Its columns are the input, the bias and the hidden state, its rows the gates f, i, o, g: then those that a first
    step, from a state of zeros, has no need of are the first rows and the last columns.
    """
    bias = (cell.bias_ih + cell.bias_hh)[:, None]
    i, f, g, o = torch.cat([cell.weight_ih, bias, cell.weight_hh], 1).split(cell.hidden)
    return torch.cat([f, i, o, g]).flatten()


def _matrices(sizes: Sequence[int], weights: Tensor, first: bool) -> list[Tensor]:
    """Return of every cell the matrix in ``weights [..., N]``; of a first step, the part that it needs."""
    shapes = [(4 * hidden, below + 1 + hidden) for below, hidden in pairwise(sizes)]
    parts = weights.split([rows * columns for rows, columns in shapes], -1)
    whole = [part.unflatten(-1, shape) for part, shape in zip(parts, shapes)]
    return [m[..., size:, :-size] for m, size in zip(whole, sizes[1:])] if first else whole


def _cells(sizes: Sequence[int], state: Tensor | None) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return ``h`` and ``c`` of every cell, each ``[..., hidden, C]``; ``None`` each if there is no state."""
    count = len(sizes) - 1
    parts = [None] * 2 * count if state is None else state.split([*sizes[1:], *sizes[1:]], -2)
    return parts[:count], parts[count:]


def forward_step(sizes: Sequence[int], x: Tensor, weights: Tensor, state: Tensor | None) -> list[Tensor]:
    """Do one step of a stack of cells for all coordinates at once.

    Args:
        sizes: inputs of the first cell, then the hidden size of each.
        x: inputs, ``[..., inputs, C]``.
        weights: of all cells, from :func:`_gathered`, ``[..., N]`` with the same axes in front.
        state: ``[..., 2 * sum(hidden), C]``; ``None`` for zeros.

    Returns:
        The output, the new state, and what the derivative needs, row after row in one tensor: of all cells the
        inputs of the product, then the gates, then the hyperbolic tangent of ``c``.
    """
    inputs, gates, tanhs, new_hs, new_cs = [], [], [], [], []
    one = x.new_ones(x[..., :1, :].shape)
    for weight, h, c in zip(_matrices(sizes, weights, state is None), *_cells(sizes, state)):
        inward = torch.cat([x, one] if h is None else [x, one, h], -2)
        gate = torch.matmul(weight, inward)
        size = sizes[len(gates) + 1]
        sigmoids, g = gate.split([gate.shape[-2] - size, size], -2)
        sigmoids.sigmoid_()
        g.tanh_()
        *f, i, o = sigmoids.split(size, -2)
        c = i * g if c is None else (f[0] * c).addcmul_(i, g)
        tanh = torch.tanh(c)
        x = o * tanh
        inputs.append(inward)
        gates.append(gate)
        tanhs.append(tanh)
        new_hs.append(x)
        new_cs.append(c)
    return [x, torch.cat([*new_hs, *new_cs], -2), torch.cat([*inputs, *gates, *tanhs], -2)]


def backward_step(
    sizes: Sequence[int],
    x: Tensor,
    weights: Tensor,
    state: Tensor | None,
    new: Tensor,
    kept: Tensor,
    of_out: Tensor | None,
    of_new: Tensor | None,
) -> list[Tensor]:
    """Return the slopes of the inputs of :func:`forward_step` (x, weights and, if there is one, state).

    Args:
        sizes, x, weights, state: as given to it.
        new, kept: the last tensors that it returned.
        of_out, of_new: slopes of the output and of the new state; ``None`` if they are zero, but not both.
    """
    first, count = state is None, len(sizes) - 1
    matrices, (_, cs), (of_h, of_c) = _matrices(sizes, weights, first), _cells(sizes, state), _cells(sizes, of_new)
    rows = [m.shape[-1] for m in matrices], [m.shape[-2] for m in matrices], sizes[1:]
    parts = kept.split([size for group in rows for size in group], -2)
    of_weights, of_hs, of_cs, from_above = [], [], [], of_out
    for number in reversed(range(count)):
        inward, gate, tanh = parts[number::count]
        size = tanh.shape[-2]
        sigmoids, g = gate.split([gate.shape[-2] - size, size], -2)
        *f, i, o = sigmoids.split(size, -2)
        slopes = torch.empty_like(gate)
        of_sigmoids, of_g = slopes.split([gate.shape[-2] - size, size], -2)
        *of_f, of_i, of_o = of_sigmoids.split(size, -2)
        slope, of_cell = of_h[number], of_c[number]
        if from_above is not None:
            slope = from_above if slope is None else slope + from_above
        torch.mul(slope, tanh, out=of_o)
        from_h = slope * o
        aten.tanh_backward.grad_input(from_h, tanh, grad_input=from_h)
        of_cell = from_h if of_cell is None else from_h.add_(of_cell)
        torch.mul(of_cell, g, out=of_i)
        if not first:
            torch.mul(of_cell, cs[number], out=of_f[0])
        aten.sigmoid_backward.grad_input(of_sigmoids, sigmoids, grad_input=of_sigmoids)
        torch.mul(of_cell, i, out=of_g)
        aten.tanh_backward.grad_input(of_g, g, grad_input=of_g)
        of_weight = torch.matmul(slopes, inward.mT)
        of_inward = torch.matmul(matrices[number].mT, slopes)
        from_above = of_inward.narrow(-2, 0, sizes[number])
        if first:
            of_weight = F.pad(of_weight, (0, size, size, 0))
        else:
            of_hs.insert(0, of_inward.narrow(-2, sizes[number] + 1, size))
            of_cs.insert(0, of_cell * f[0])
        of_weights.insert(0, of_weight.flatten(-2))
    assert from_above is not None
    of_state = [] if first else [torch.cat([*of_hs, *of_cs], -2)]
    return [from_above, torch.cat(of_weights, -1), *of_state]


aten = torch.ops.aten
_library = torch.library.Library("quickstudy", "DEF")
_library.define("lstm_step(bool compiled, int[] sizes, Tensor x, Tensor weights, Tensor? state) -> Tensor[]")
_library.define(
    "lstm_step_backward(bool compiled, int[] sizes, Tensor x, Tensor weights, Tensor? state, Tensor new, Tensor kept,"
    " Tensor? of_out, Tensor? of_new) -> Tensor[]"
)


def _usable(asked: bool, tensor: Tensor) -> bool:
    return asked and tensor.device.type == "cpu" and tensor.dtype in compiled.REAL


def _full_precision(tensor: Tensor) -> AbstractContextManager:
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _step_as_asked(asked: bool, sizes: Sequence[int], x: Tensor, *rest: Any) -> list[Tensor]:
    if _usable(asked, x):
        return compiled.step(sizes, x, *rest)
    with _full_precision(x):
        return forward_step(sizes, x, *rest)


def _derivative_as_asked(asked: bool, sizes: Sequence[int], x: Tensor, *rest: Any) -> list[Tensor]:
    if _usable(asked, x):
        return compiled.step_backward(sizes, x, *rest)
    with _full_precision(x):
        return backward_step(sizes, x, *rest)


IMPLEMENTATIONS: dict[Any, Callable[..., list[Tensor]]] = {
    torch.ops.quickstudy.lstm_step.default: _step_as_asked,
    torch.ops.quickstudy.lstm_step_backward.default: _derivative_as_asked,
}
"""What the operations of this module do; a program may call it without PyTorch's dispatcher in between."""
for _operation, _function in IMPLEMENTATIONS.items():
    _library.impl(_operation, _function, "CompositeExplicitAutograd")


class _Step(torch.autograd.Function):
    """One step of a stack of cells as one operation, with its derivative as another.

    Left to automatic differentiation it is seventy operations on little data, most of whose time goes into starting
    them.
    """

    @staticmethod
    def forward(
        compiled: bool, sizes: tuple[int, ...], x: Tensor, weights: Tensor, state: Tensor | None
    ) -> tuple[Tensor, ...]:
        return tuple(torch.ops.quickstudy.lstm_step(compiled, sizes, x, weights, state))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        compiled, sizes, *tensors = inputs
        _, new, kept = output
        ctx.how = compiled, sizes
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, new, kept)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in ctx.saved_tensors):
            raise RuntimeError("CoordinateLSTM can be differentiated once, and not again (create_graph=True)")
        of_out, of_new, _ = slopes
        if of_out is None and of_new is None:
            return (None,) * 5
        of_x, of_weights, *of_state = torch.ops.quickstudy.lstm_step_backward(
            *ctx.how, *ctx.saved_tensors, of_out, of_new
        )
        return None, None, of_x, of_weights, *(of_state or [None])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], int]:
        compiled, sizes, *tensors = arguments
        own = [
            tensor
            if tensor is None
            else tensor.expand(info.batch_size, *tensor.shape)
            if dim is None
            else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims[2:])
        ]
        return _Step.apply(compiled, sizes, *own), 0
