"""Laws of the plain LSTM: what it reads when, in which order, and what is left of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, loss_of, scored, single
from torch import Tensor, nn

from quickstudy.engine.models import LOOP, Models
from quickstudy.errors import RecipeError
from quickstudy.methods import PlainLSTM
from quickstudy.nn import MLP, Conv4
from quickstudy.task import Support, Task

TASKS = 3
READS = [
    "target",
    "previous-target",
    "previous-target-prediction",
    "previous-target-error",
    "previous-target-prediction-error",
]


def batch(seed: int = 0, size: tuple[int, ...] = (4,)) -> Task:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3)

    def images(count: int) -> Tensor:
        return torch.randn(TASKS, count, *size, dtype=torch.float64, generator=generator)

    support, query = (labels.repeat_interleave(n).expand(TASKS, -1) for n in (2, 3))
    return Task(images(6), support, images(9), query, 3)


def waves(seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x, qx = (torch.rand(TASKS, n, 1, dtype=torch.float64, generator=generator) * 4 - 2 for n in (5, 7))
    shifts = torch.arange(TASKS)[:, None, None]
    return Task(x, torch.sin(x + shifts), qx, torch.sin(qx + shifts))


def built(task: Task, backbone: nn.Module | None = None, seed: int = 0, **settings) -> PlainLSTM:
    torch.manual_seed(seed)
    method = PlainLSTM(backbone or nn.Flatten(), **{"hidden": (5, 4), "steps": 3, **settings})
    return method.build(single(task)).double()


def labels(task: Task) -> Tensor:
    return task.support_y if task.way is None else F.one_hot(task.support_y, task.way).double()


def predicted(method: PlainLSTM, task: Task, order: Tensor | None = None) -> Tensor:
    order = torch.arange(len(task.support_x)) if order is None else order
    return method.predict(method.adapt(Support(task.support_x[order], task.support_y[order], task.way)), task.query_x)


def meta_gradient(method: PlainLSTM, task: Task) -> list[Tensor]:
    return list(torch.autograd.grad(method.loss(task), list(method.parameters())))


def torch_cells(method: PlainLSTM) -> list[nn.LSTMCell]:
    """PyTorch's cells, with the weights of the method."""
    cells = []
    for cell in method.lstm.cells:
        theirs = nn.LSTMCell(cell.weight_ih.shape[1], cell.hidden).double()
        theirs.load_state_dict(cell.state_dict())
        cells.append(theirs)
    return cells


def step(cells: list[nn.LSTMCell], x: Tensor, state: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    new = []
    for cell, own in zip(cells, state):
        new.append(cell(x, own))
        x = new[-1][0]
    return new


def zeros(method: PlainLSTM, rows: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros(rows, size).double(), torch.zeros(rows, size).double()) for size in method.hidden]


def queried(method: PlainLSTM, cells: list[nn.LSTMCell], hidden: list[Tensor], query_x: Tensor) -> Tensor:
    """One step on a query beside nothing, from the hidden states and cell states of zero."""
    rows = len(query_x)
    state = [(h.expand(rows, -1), torch.zeros(rows, h.shape[-1]).double()) for h in hidden]
    inputs = torch.cat([query_x, torch.zeros(rows, method.beside).double()], 1)
    return method.head(step(cells, inputs, state)[-1][0])


@pytest.mark.parametrize("task", [batch()[0], waves()[0]], ids=["classes", "waves"])
def test_the_order_is_of_no_influence_on_the_batch_reading_and_of_some_on_the_sequential(task: Task) -> None:
    order = torch.randperm(len(task.support_x), generator=torch.Generator().manual_seed(1))
    method = built(task)
    torch.testing.assert_close(predicted(method, task, order), predicted(method, task), rtol=1e-12, atol=1e-13)
    turned = Task(task.support_x[order], task.support_y[order], task.query_x, task.query_y, task.way)
    torch.testing.assert_close(meta_gradient(method, turned), meta_gradient(method, task))
    for reads in READS:
        method = built(task, reading="sequential", reads=reads)
        assert (predicted(method, task, order) - predicted(method, task)).abs().max() > 1e-6


@pytest.mark.parametrize("task", [batch()[0], waves()[0]], ids=["classes", "waves"])
def test_the_batch_reading_of_every_example_twice_is_that_of_once(task: Task) -> None:
    method = built(task)
    twice = torch.arange(len(task.support_x)).repeat(2)
    torch.testing.assert_close(predicted(method, task, twice), predicted(method, task))
    one = torch.zeros(4, dtype=torch.int64)  # and of one example alone it is an LSTM, whose mean is itself
    torch.testing.assert_close(predicted(method, task, one), predicted(method, task, one[:1]))


@pytest.mark.parametrize("task", [batch()[0], waves()[0]], ids=["classes", "waves"])
@pytest.mark.parametrize("hidden", [(4,), (5, 4, 3)])
@pytest.mark.parametrize("first_labels", [True, False, None])
@pytest.mark.parametrize("steps", [2, 4])
def test_the_batch_reading_by_hand(task: Task, hidden: tuple[int, ...], first_labels: bool | None, steps: int) -> None:
    """The mean of h is common to all examples, and each has its own c."""
    method = built(task, hidden=hidden, first_labels=first_labels, steps=steps)
    x, y, rows = task.support_x, labels(task), len(task.support_x)
    cells, state = torch_cells(method), zeros(method, rows)
    unlabelled = first_labels is False or (first_labels is None and task.way is None)
    for number in range(steps):
        inputs = torch.cat([x, torch.zeros_like(y) if unlabelled and number == 0 else y], 1)
        state = [(h.mean(0).expand(rows, -1), c) for h, c in step(cells, inputs, state)]
    hidden_states = [h[:1] for h, _ in state]
    torch.testing.assert_close(method.adapt(task.support).hidden, hidden_states)
    expected = queried(method, cells, hidden_states, task.query_x)
    torch.testing.assert_close(predicted(method, task), expected)


def test_whether_the_first_pass_sees_labels() -> None:
    """By itself in classification, and not in regression; and with it, one pass is enough."""
    for task, sees in ((batch()[0], True), (waves()[0], False)):
        by_default, *given = (predicted(built(task, first_labels=own), task) for own in (None, True, False))
        torch.testing.assert_close(by_default, given[0 if sees else 1], rtol=0, atol=0)
        assert not torch.allclose(given[0], given[1])
    assert predicted(built(waves()[0], first_labels=True, steps=1), waves()[0]).shape == (7, 1)


@pytest.mark.parametrize("task", [batch()[0], waves()[0]], ids=["classes", "waves"])
@pytest.mark.parametrize("hidden", [(4,), (5, 4, 3)])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_sequential_reading_is_an_lstm_over_the_sequence(task: Task, hidden: tuple[int, ...], steps: int) -> None:
    method = built(task, hidden=hidden, reading="sequential", steps=steps)
    sequence = torch.cat([task.support_x, labels(task)], 1).repeat(steps, 1)[:, None]
    below, last = sequence, []
    for cell, (inputs, size) in zip(method.lstm.cells, pairwise([sequence.shape[-1], *hidden])):
        layer = nn.LSTM(inputs, size).double()
        layer.load_state_dict({f"{name}_l0": weight for name, weight in cell.state_dict().items()})
        below, (h, _) = layer(below)
        last.append(h[0])
    torch.testing.assert_close(method.adapt(task.support).hidden, last)
    expected = queried(method, torch_cells(method), last, task.query_x)
    torch.testing.assert_close(predicted(method, task), expected)


@pytest.mark.parametrize("task", [batch()[0], waves()[0]], ids=["classes", "waves"])
@pytest.mark.parametrize("reads", READS)
def test_what_the_sequential_reading_sees_by_hand(task: Task, reads: str) -> None:
    method = built(task, reading="sequential", reads=reads, steps=2)
    x, y = task.support_x, labels(task)
    width = y.shape[1]
    parts = {"target": 1, "previous-target": 1, "previous-target-prediction-error": 3}.get(reads, 2)
    assert method.lstm.cells[0].weight_ih.shape[1] == x.shape[1] + parts * width
    cells, state = torch_cells(method), zeros(method, 1)
    for _ in range(2):
        before, guess = torch.zeros(1, width).double(), torch.zeros(1, width).double()
        order = list(range(len(x)))
        for i in order if reads == "target" else [*order, 0]:
            beside = {
                "target": [y[i : i + 1]],
                "previous-target": [before],
                "previous-target-prediction": [before, guess],
                "previous-target-error": [before, (before - guess) ** 2],
                "previous-target-prediction-error": [before, guess, (before - guess) ** 2],
            }[reads]
            state = step(cells, torch.cat([x[i : i + 1], *beside], 1), state)
            before, guess = y[i : i + 1], method.head(state[-1][0])
    hidden = [h for h, _ in state]
    torch.testing.assert_close(method.adapt(task.support).hidden, hidden)
    torch.testing.assert_close(predicted(method, task), queried(method, cells, hidden, task.query_x))


@pytest.mark.parametrize("reads", READS[1:])
def test_the_last_target_is_seen_too(reads: str) -> None:
    task = waves()[0]
    method = built(task, reading="sequential", reads=reads, steps=1)
    y = task.support_y.clone().requires_grad_()
    prediction = method.predict(method.adapt(Support(task.support_x, y, None)), task.query_x)
    (slope,) = torch.autograd.grad(prediction.sum(), y)
    assert (slope != 0).all()


@pytest.mark.parametrize("settings", [{}, {"reading": "sequential"}], ids=["batch", "sequential"])
@pytest.mark.parametrize("norm", ["support", "batch"])
def test_queries_do_not_see_each_other(settings: dict, norm: str) -> None:
    """With batch norms in the backbone they do, unless these have the statistics of the support set."""
    task = batch(size=(1, 8, 8))[0]
    method = built(task, Conv4(3, blocks=2), norm=norm, **settings)
    state = method.adapt(task.support)
    together, some = method.predict(state, task.query_x), method.predict(state, task.query_x[:4])
    if norm == "batch":
        assert not torch.allclose(together[:4], some)
        return
    alone = torch.cat([method.predict(state, x[None]) for x in task.query_x])
    torch.testing.assert_close(together, alone)
    embedded, _ = method.embed_support(task.support_x)  # the embedding is what a plain LSTM on vectors reads
    flat = Task(embedded, task.support_y, method.embed(task.query_x, state.statistics), task.query_y, 3)
    method.backbone = nn.Flatten()
    torch.testing.assert_close(predicted(method, flat), together)


def test_evaluation_may_take_another_number_of_passes() -> None:
    task = batch()[0]
    method = built(task, steps=1, test_steps=3)
    trained = predicted(method, task)
    tested = predicted(method.eval(), task)
    torch.testing.assert_close(tested, predicted(built(task, steps=3), task), rtol=0, atol=0)
    assert not torch.allclose(trained, tested)
    method.set_test_steps(1)
    torch.testing.assert_close(predicted(method, task), trained, rtol=0, atol=0)


CASES = {
    "batch": (batch, lambda: PlainLSTM(nn.Flatten(), hidden=(4, 3), steps=2, test_steps=1)),
    "batch, waves": (waves, lambda: PlainLSTM(nn.Flatten(), hidden=(4, 3), steps=3)),
    "batch, norms": (batch, lambda: PlainLSTM(MLP([3], batch_norm=True), hidden=(3,), steps=2, norm="support")),
    "images": (lambda seed: batch(seed, (1, 8, 8)), lambda: PlainLSTM(Conv4(3, blocks=1), hidden=(3,), steps=2)),
    "sequential": (waves, lambda: PlainLSTM(nn.Flatten(), hidden=(4,), steps=2, reading="sequential")),
    "previous": (
        waves,
        lambda: PlainLSTM(nn.Flatten(), hidden=(3,), steps=1, reading="sequential", reads=READS[-1]),  # type: ignore
    ),
}


def made(name: str, seed: int = 0) -> PlainLSTM:
    data, make = CASES[name]
    torch.manual_seed(seed)
    return make().build(single(data(0)[0])).double()


@pytest.mark.parametrize("name", CASES)
def test_meta_gradient_against_finite_differences(name: str) -> None:
    task, method = CASES[name][0](0)[0], made(name)
    loss = loss_of(method, task)

    values = [p.detach().clone().requires_grad_() for p in method.parameters()]
    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_loop_vmap_chunks_and_traces_are_equal(name: str) -> None:
    models, tasks = Models([made(name)]), CASES[name][0](0)
    slopes, measures = gradients(models, tasks, LOOP), scored(models, tasks, LOOP)
    for chunk in (TASKS, 2):
        torch.testing.assert_close(gradients(models, tasks, chunk), slopes)
        torch.testing.assert_close(scored(models, tasks, chunk), measures)
    if name in ("batch", "images", "sequential"):
        torch.testing.assert_close(gradients(models, tasks, TASKS, traced=True), slopes)
    if name == "batch":
        torch.testing.assert_close(scored(models, tasks, TASKS, traced=True), measures)
    assert all(program.__name__ == "program" for program in models._programs.values())  # none fell back


@pytest.mark.parametrize("name", CASES)
def test_stacked_seeds_equal_each_alone(name: str) -> None:
    methods = [made(name, seed) for seed in range(2)]
    streams = [CASES[name][0](seed) for seed in range(2)]
    stacked = Task.stack(streams)
    together = Models(methods)
    losses, slopes = gradients(together, stacked, TASKS, traced=name == "batch, norms")
    measures = scored(together, stacked, 2)
    for i, (method, stream) in enumerate(zip(methods, streams)):
        alone = Models([method])
        torch.testing.assert_close((losses[i], [slope[i] for slope in slopes]), gradients(alone, stream, LOOP))
        torch.testing.assert_close(measures[i], scored(alone, stream, LOOP))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": ()}, r"at least one cell; got hidden \[\]"),
        ({"hidden": (4, 0)}, r"at least one cell; got hidden \[4, 0\]"),
        ({"steps": 0}, "at least one pass, not 0"),
        ({"test_steps": 0}, r"0 \(test\)"),
        *(({"reads": reads}, f"reads: {reads} has a meaning only in an order") for reads in READS[1:]),
        ({"reading": "sequential", "first_labels": True}, "first_labels is of the batch reading"),
        ({"norm": "joint"}, "norm batch or support, not 'joint'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PlainLSTM(nn.Flatten(), **settings)


def test_a_pass_without_labels_needs_another() -> None:
    for task, settings in [
        (waves()[0], {"steps": 1}),
        (waves()[0], {"steps": 2, "test_steps": 1}),
        (batch()[0], {"steps": 1, "first_labels": False}),
    ]:
        with pytest.raises(RecipeError, match="sees no label in its first pass: it needs at least two"):
            built(task, **settings)
    built(waves()[0], steps=1, reading="sequential")
    method = built(waves()[0])
    for steps, message in ((1, "at least two"), (0, "at least one pass, not 0")):
        with pytest.raises(RecipeError, match=message):
            method.set_test_steps(steps)
        assert method.test_steps == 3
