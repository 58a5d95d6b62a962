"""LSTMs from matrix products: they are batched over tasks and differentiated like any other code.

``torch.nn.LSTM`` has no rule for ``vmap``. These are its equals, with the same parameters, equations and
initialisation, and leave out what a caller knows to be zero or common to all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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


Step = Callable[[Tensor, list[CellState] | None], tuple[Tensor, list[CellState]]]
"""From inputs ``[inputs, C]`` and the state (``None``: zeros) to the output ``[hidden[-1], C]`` and the new state."""


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
        self.compiled = compiled
        if compiled:
            library((inputs, *hidden), torch.float32)
        self.cells = _stack(inputs, hidden)

    def unroll(self) -> Step:
        """Return the function of one step, to be called for all steps of a task: the weights are gathered once."""
        first = [_gathered(cell, first=True) for cell in self.cells]
        later = [_gathered(cell, first=False) for cell in self.cells]

        def step(x: Tensor, state: list[CellState] | None) -> tuple[Tensor, list[CellState]]:
            x = x.to(first[0].dtype)
            if state is None:
                out = _Step.apply(self.compiled, len(first), x, *first)
            else:
                states = [*(own.h for own in state), *(own.c for own in state)]
                out = _Step.apply(self.compiled, len(later), x, *later, *states)
            new = [CellState(h, c) for h, c in zip(out[: len(first)], out[len(first) :])]
            return out[len(first) - 1], new

        return step


def _gathered(cell: LSTMCell, first: bool) -> Tensor:
    """Return all weights of a cell as one matrix, the gates in the order that :func:`forward_step` wants.

    ``[4 * hidden, inputs + hidden + 1]``; for the first step, from a state of zeros, without the forget gate and
    without the hidden state: ``[3 * hidden, inputs + 1]``.
    """
    bias = (cell.bias_ih + cell.bias_hh)[:, None]
    weight = torch.cat([cell.weight_ih, bias] if first else [cell.weight_ih, cell.weight_hh, bias], 1)
    i, f, g, o = weight.split(cell.hidden)
    return torch.cat([i, o, g] if first else [i, f, o, g])


def forward_step(x: Tensor, weights: list[Tensor], hs: list[Tensor], cs: list[Tensor]) -> list[Tensor]:
    """Do one step of a stack of cells for all coordinates at once.

    Args:
        x: inputs, ``[..., inputs, C]``.
        weights: of every cell, from :func:`_gathered`, with the same axes in front.
        hs, cs: state of every cell, ``[..., hidden, C]``; empty for a state of zeros.

    Returns:
        The new ``h`` of all cells, the new ``c`` of all, and what the derivative needs, row after row in one tensor:
        of all cells the inputs of the product, then the gates, then the hyperbolic tangent of ``c``.
    """
    hidden, cell, inputs, gates, tanhs = [], [], [], [], []
    one = x.new_ones(x[..., :1, :].shape)
    for number, weight in enumerate(weights):
        inward = torch.cat([x, hs[number], one] if hs else [x, one], -2)
        gate = torch.matmul(weight, inward)
        size = weight.shape[-2] // (4 if hs else 3)
        sigmoids, g = gate.split([gate.shape[-2] - size, size], -2)
        sigmoids.sigmoid_()
        g.tanh_()
        i, *f, o = sigmoids.split(size, -2)
        if hs:
            c = f[0] * cs[number]
            c.addcmul_(i, g)
        else:
            c = i * g
        tanh = torch.tanh(c)
        x = o * tanh
        hidden.append(x)
        cell.append(c)
        inputs.append(inward)
        gates.append(gate)
        tanhs.append(tanh)
    return [*hidden, *cell, torch.cat([*inputs, *gates, *tanhs], -2)]


def backward_step(
    weights: list[Tensor], cs: list[Tensor], kept: Tensor, of_h: list[Tensor | None], of_c: list[Tensor | None]
) -> list[Tensor]:
    """Return the slopes of the inputs of :func:`forward_step` (x, weights, hs, cs).

    Args:
        weights, cs: as given to it.
        kept: the last tensor that it returned.
        of_h, of_c: slopes of the new ``h`` and ``c`` of every cell; ``None`` if they are zero.
    """
    inputs, gates, tanhs = _groups(kept.split(compiled.kept_rows(weights, bool(cs)), -2), len(weights), 3)
    of_weights, of_hs, of_cs = [*weights], [*cs], [*cs]  # each is put in its place below
    from_above: Tensor | None = None
    for number in reversed(range(len(weights))):
        gate, tanh = gates[number], tanhs[number]
        size = tanh.shape[-2]
        sizes = [gate.shape[-2] - size, size]
        sigmoids, g = gate.split(sizes, -2)
        i, *f, o = sigmoids.split(size, -2)
        slopes = torch.empty_like(gate)
        of_sigmoids, of_g = slopes.split(sizes, -2)
        of_i, *of_f, of_o = of_sigmoids.split(size, -2)
        slope, of_cell = of_h[number], of_c[number]
        if from_above is not None:
            slope = from_above if slope is None else slope + from_above
        if slope is None:
            of_o.zero_()
            of_cell = torch.zeros_like(tanh) if of_cell is None else of_cell.clone()
        else:
            torch.mul(slope, tanh, out=of_o)
            from_h = slope * o
            aten.tanh_backward.grad_input(from_h, tanh, grad_input=from_h)
            of_cell = from_h if of_cell is None else from_h.add_(of_cell)
        torch.mul(of_cell, g, out=of_i)
        if cs:
            torch.mul(of_cell, cs[number], out=of_f[0])
        aten.sigmoid_backward.grad_input(of_sigmoids, sigmoids, grad_input=of_sigmoids)
        torch.mul(of_cell, i, out=of_g)
        aten.tanh_backward.grad_input(of_g, g, grad_input=of_g)
        of_weights[number] = torch.matmul(slopes, inputs[number].mT)
        of_inputs = torch.matmul(weights[number].mT, slopes)
        below = of_inputs.shape[-2] - 1 - (size if cs else 0)
        if cs:
            of_hs[number] = of_inputs.narrow(-2, below, size)
            of_cs[number] = of_cell.mul_(f[0])
        from_above = of_inputs.narrow(-2, 0, below)
    assert from_above is not None
    return [from_above, *of_weights, *of_hs, *of_cs]


aten = torch.ops.aten
_library = torch.library.Library("quickstudy", "DEF")
_library.define("lstm_step(bool compiled, Tensor x, Tensor[] weights, Tensor[] hs, Tensor[] cs) -> Tensor[]")
_library.define(
    "lstm_step_backward(bool compiled, Tensor[] weights, Tensor[] cs, Tensor kept, Tensor?[] of_h, Tensor?[] of_c)"
    " -> Tensor[]"
)


def _usable(asked: bool, tensor: Tensor) -> bool:
    return asked and tensor.device.type == "cpu" and tensor.dtype in compiled.REAL


def _full_precision(tensor: Tensor) -> AbstractContextManager:
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _step_as_asked(asked: bool, x: Tensor, *rest: list[Tensor]) -> list[Tensor]:
    if _usable(asked, x):
        return compiled.step(x, *rest)
    with _full_precision(x):
        return forward_step(x, *rest)


def _derivative_as_asked(asked: bool, weights: list[Tensor], *rest: Any) -> list[Tensor]:
    if _usable(asked, weights[0]):
        return compiled.step_backward(weights, *rest)
    with _full_precision(weights[0]):
        return backward_step(weights, *rest)


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
    def forward(compiled: bool, count: int, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.quickstudy.lstm_step(compiled, x, *_groups(tensors, count, 3)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        compiled, count, _, *tensors = inputs
        ctx.how = compiled, count
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[-1], *tensors[:count], *tensors[2 * count :])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and any(t.requires_grad for t in ctx.saved_tensors):
            raise RuntimeError("CoordinateLSTM can be differentiated once, and not again (create_graph=True)")
        compiled, count = ctx.how
        kept, *tensors = ctx.saved_tensors
        weights, cs = _groups(tensors, count, 2)
        of_h, of_c = _groups(slopes, count, 2)
        return None, None, *torch.ops.quickstudy.lstm_step_backward(compiled, weights, cs, kept, of_h, of_c)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], int]:
        compiled, count, *tensors = arguments
        own = [
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims[2:])
        ]
        return _Step.apply(compiled, count, *own), 0


def _groups(tensors: Sequence[Any], count: int, groups: int) -> list[list[Any]]:
    """Cut a sequence into groups of one tensor a cell; the last ones may be empty."""
    return [list(tensors[start : start + count]) for start in range(0, groups * count, count)]
