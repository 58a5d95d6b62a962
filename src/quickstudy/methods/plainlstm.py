"""The plain LSTM: a network that reads the support set and then knows the task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quickstudy.errors import RecipeError
from quickstudy.methods.base import Method, Norm
from quickstudy.nn import LSTM, CellState, Statistics
from quickstudy.task import Support

Reads = Literal[
    "target",
    "previous-target",
    "previous-target-prediction",
    "previous-target-error",
    "previous-target-prediction-error",
]
"""What stands beside an example in the sequential reading: its own target, or of the example before it the target,
and the prediction, or the squared error, or both."""


class Memory(NamedTuple):
    """The state of one task: the hidden state of each cell ``[1, hidden]``, and the statistics of queries."""

    hidden: list[Tensor]
    statistics: Statistics | None


class PlainLSTM(Method):
    r"""A stacked LSTM whose hidden state is what it has learned of the task (Hochreiter et al., 2001; Santoro et
    al., 2016; in this form Huisman et al., 2023).

    ``reading="batch"`` reads all support examples side by side, in several passes. After each, the hidden state of
    every cell is replaced by its mean over the examples, which makes their order irrelevant; each example keeps its
    own cell state:

    .. math::
        (h_j, c_j) = \mathrm{LSTM}([x_j; y_j], (\bar h, c_j)), \qquad \bar h = \frac{1}{M} \sum_j h_j

    ``reading="sequential"`` reads one after the other, in the order of the support set, and that whole sequence
    once a pass.

    A query is one more step, on :math:`[x; 0]`, from the hidden state of the task and a cell state of zero; a
    linear head reads the top hidden state. Queries do not see each other.

    Args:
        backbone: embedding, from ``[M, ...]`` to ``[M, features]``; ``torch.nn.Flatten`` for raw inputs.
        hidden: sizes of the LSTM's cells.
        steps: passes over the support set in meta-training.
        test_steps: passes in meta-validation and meta-test; as many as in training if ``None``.
        reading: all examples at once, or one after the other.
        reads: what the sequential reading sees beside an example; with the previous target, a pass ends with its
            first example again, so that the last target is seen too.
        first_labels: whether the batch reading sees labels in its first pass; if ``None``, in classification it
            does and in regression it does not.
        norm: whose statistics the backbone's batch norms use on queries (:class:`Method`).
    """

    def __init__(
        self,
        backbone: nn.Module,
        hidden: Sequence[int] = (40, 40),
        steps: int = 4,
        test_steps: int | None = None,
        reading: Literal["batch", "sequential"] = "batch",
        reads: Reads = "target",
        first_labels: bool | None = None,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(backbone, norm)
        if not hidden or min(hidden) < 1:
            raise RecipeError(f"PlainLSTM needs the size of at least one cell; got hidden {[*hidden]}")
        if steps < 1 or (test_steps is not None and test_steps < 1):
            raise RecipeError(f"PlainLSTM takes at least one pass, not {steps} (training), {test_steps} (test)")
        if reading == "batch" and reads != "target":
            raise RecipeError(f"reads: {reads} has a meaning only in an order: use reading: sequential")
        if reading == "sequential" and first_labels is not None:
            raise RecipeError("first_labels is of the batch reading; the sequential one is told what it sees by reads")
        self.hidden = [*hidden]
        self.steps = steps
        self.test_steps = steps if test_steps is None else test_steps
        self.reading = reading
        self.reads = reads
        self.first_labels = first_labels

    def create(self, features: int, outputs: int) -> None:
        beside = outputs * (1 + self.reads.count("prediction") + self.reads.count("error"))
        self.beside = beside
        self.lstm = LSTM(features + beside, self.hidden)
        self.head = nn.Linear(self.hidden[-1], outputs)
        self._check(min(self.steps, self.test_steps or 0))

    def set_test_steps(self, steps: int) -> None:
        """Choose how many passes to take in meta-validation and meta-test.

        Raises:
            RecipeError: they are too few to see a label.
        """
        self._check(steps)
        super().set_test_steps(steps)

    def _check(self, steps: int) -> None:
        if steps < 1:
            raise RecipeError(f"PlainLSTM takes at least one pass, not {steps}")
        if self.reading == "batch" and not self._labelled_first and steps < 2:
            raise RecipeError("PlainLSTM sees no label in its first pass: it needs at least two (steps)")

    @property
    def _labelled_first(self) -> bool:
        return self.way is not None if self.first_labels is None else self.first_labels

    def adapt(self, support: Support) -> Memory:
        x, statistics = self.embed_support(support.x)
        y = support.targets(x.dtype)
        read = self._read_batch if self.reading == "batch" else self._read_sequence
        state = read(x, y, self.steps_now)
        return Memory([own.h for own in state if own.h is not None], statistics)

    def predict(self, state: Memory, query_x: Tensor) -> Tensor:
        x = F.pad(self.embed(query_x, state.statistics), (0, self.beside))
        gates = self.lstm.cells[0].inward(x, fresh=True)
        return self._output(self.lstm(gates, [CellState(h) for h in state.hidden]))

    def _output(self, state: Sequence[CellState]) -> Tensor:
        top = state[-1].h
        assert top is not None
        return self.head(top)

    def _read_batch(self, x: Tensor, y: Tensor, steps: int) -> list[CellState]:
        labelled = self.lstm.cells[0].inward(torch.cat([x, y], 1))
        gates = labelled if self._labelled_first else self.lstm.cells[0].inward(F.pad(x, (0, self.beside)))
        state = self.lstm.start()
        for _ in range(steps):
            state = [CellState(own.h.mean(0, keepdim=True), own.c) for own in self.lstm(gates, state)]
            gates = labelled
        return state

    def _read_sequence(self, x: Tensor, y: Tensor, steps: int) -> list[CellState]:
        state = self.lstm.start()
        if self.reads == "target":
            gates = self.lstm.cells[0].inward(torch.cat([x, y], 1))
            for own in gates.split(1) * steps:
                state = self.lstm(own, state)
            return state
        nothing = torch.zeros_like(y[:1])
        for _ in range(steps):
            target, prediction = nothing, nothing
            for number in [*range(len(x)), 0]:
                beside = [target]
                if "prediction" in self.reads:
                    beside.append(prediction)
                if "error" in self.reads:
                    beside.append((target - prediction).square())
                here = torch.cat([x[number : number + 1], *beside], 1)
                state = self.lstm(self.lstm.cells[0].inward(here), state)
                target, prediction = y[number : number + 1], self._output(state)
        return state
