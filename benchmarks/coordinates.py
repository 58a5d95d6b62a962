"""Steps of the coordinate-wise LSTM: PyTorch's cells, our operation, and our operation compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jsonargparse import auto_cli
from measure import interleave
from report import load, machine, publish
from torch import Tensor, nn

from quickstudy.nn import CellState, CoordinateLSTM

INPUTS, HIDDEN, STEPS = 2, (5, 5, 1), 9
COORDINATES = (455, 1365, 2240)
"""Of a layer of 91 units and five examples, of three seeds of it, of the Omniglot network's hidden layers."""


@dataclass
class Row:
    """One number of coordinates: microseconds a step, forth and back, of each contender, and two ratios."""

    coordinates: int
    cells_us: float
    ours_us: float
    compiled_us: float
    ours_of_cells: float
    compiled_of_cells: float


def cells(lstm: CoordinateLSTM, x: Tensor) -> Callable[[], Tensor]:
    """Return the sum of the outputs by ``torch.nn.LSTMCell``, a row a coordinate, with the weights of ``lstm``."""
    stack = [nn.LSTMCell(own.weight_ih.shape[1], own.hidden) for own in lstm.cells]
    for theirs, own in zip(stack, lstm.cells):
        theirs.load_state_dict(own.state_dict())

    def run() -> Tensor:
        state: list[tuple[Tensor, Tensor] | None] = [None] * len(stack)
        total = x.new_zeros(())
        for step in x.mT:
            below = step
            for number, cell in enumerate(stack):
                state[number] = below, _ = cell(below, state[number])
            total = total + below.sum()
        return total

    return run


def ours(lstm: CoordinateLSTM, x: Tensor) -> Callable[[], Tensor]:
    """Return the sum of the outputs by our operation."""

    def run() -> Tensor:
        rule, total = lstm.unroll(), x.new_zeros(())
        state: list[CellState] | None = None
        for step in x:
            out, state = rule(step, state)
            total = total + out.sum()
        return total

    return run


def compare(coordinates: int, rounds: int, seconds: float) -> Row:
    """Time the contenders on as many steps as OP-LSTM takes on sine waves, after comparing what they compute."""
    torch.manual_seed(0)
    plain, fast = (CoordinateLSTM(INPUTS, HIDDEN, compiled) for compiled in (False, True))
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(STEPS, INPUTS, coordinates, requires_grad=True)
    runs = {"cells": cells(plain, x), "ours": ours(plain, x), "compiled": ours(fast, x)}
    slopes = {name: torch.autograd.grad(run(), x)[0] for name, run in runs.items()}
    for slope in slopes.values():
        torch.testing.assert_close(slope, slopes["cells"], rtol=1e-3, atol=1e-5)
    times = interleave({name: lambda run=run: run().backward() for name, run in runs.items()}, rounds, seconds)
    each = {name: 1e6 * own.median / STEPS for name, own in times.items()}
    return Row(coordinates, *each.values(), each["cells"] / each["ours"], each["cells"] / each["compiled"])


def main(
    threads: int = 1, rounds: int = 6, seconds: float = 0.5, out: Path | None = None, markdown: Path | None = None
) -> None:
    """Time a step of the coordinate-wise LSTM, forth and back.

    Args:
        threads: of PyTorch.
        rounds: how often each contender has its turn.
        seconds: how long a turn lasts.
        out: CSV file to write.
        markdown: Markdown file to write.
    """
    torch.set_num_threads(threads)
    facts = {**machine(), "load average before": load()}
    rows = [compare(count, rounds, seconds) for count in COORDINATES]
    title = f"A step of the coordinate-wise LSTM {INPUTS}-{'-'.join(map(str, HIDDEN))}, forth and back"
    header = ["coordinates", "torch.nn.LSTMCell, µs", "ours, µs", "compiled, µs", "ours / cells", "compiled / cells"]
    lines = [
        [
            f"{row.coordinates:,}",
            *(f"{us:.0f}" for us in (row.cells_us, row.ours_us, row.compiled_us)),
            *(f"{ratio:.2f}" for ratio in (row.ours_of_cells, row.compiled_of_cells)),
        ]
        for row in rows
    ]
    publish(title, header, lines, [asdict(row) for row in rows], facts, out, markdown)


if __name__ == "__main__":
    auto_cli(main)
