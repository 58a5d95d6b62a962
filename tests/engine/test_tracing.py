"""A traced program is what was traced, to the last bit if no matrix is large, with nothing in it that does nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Recurrent
from torch import Tensor, fx, nn

from quickstudy.engine.models import LOOP, Models, meta_loss
from quickstudy.engine.tracing import _OFTEN_NOTHING, Program, trace
from quickstudy.errors import BackboneError
from quickstudy.methods import MAML, OPLSTM, Method, PlainLSTM, ProtoNet
from quickstudy.nn import MLP, Conv4
from quickstudy.task import Task

TASKS = 3
METHODS = {
    "maml, mlp": lambda: MAML(MLP([6], batch_norm=True), inner_lr=0.1, steps=1),
    "maml, conv": lambda: MAML(Conv4(3, blocks=2), inner_lr=0.1, steps=1),
    "protonet": lambda: ProtoNet(Conv4(3, blocks=2)),
    "op-lstm": lambda: OPLSTM(MLP([6], batch_norm=True), steps=2, gamma=0.1),
    "plain lstm": lambda: PlainLSTM(nn.Flatten(), hidden=(4, 3), steps=2),
}
WHERE = [*((name, TASKS) for name in METHODS), ("op-lstm", LOOP)]


def batch() -> Task:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3)
    support, query = (labels.repeat_interleave(n).expand(TASKS, -1) for n in (2, 3))
    x, qx = (torch.rand(TASKS, n, 1, 8, 8, generator=generator) for n in (6, 9))
    return Task(x, support, qx, query, 3)


def built(name: str) -> Method:
    torch.manual_seed(0)
    return METHODS[name]().build(batch()[0])


def graph_of(program: Program) -> fx.GraphModule:
    return inspect.getclosurevars(program).nonlocals["code"].__self__


class Watched(fx.Interpreter):
    """Runs a graph, and notes the views that are as good as what they look at."""

    names = {target.overloadpacket.__name__ for target in _OFTEN_NOTHING}  # noqa: RUF012

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.views = 0
        self.idle: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = getattr(getattr(n.target, "overloadpacket", None), "__name__", n.target)
        source = self.env.get(n.args[0]) if n.args and isinstance(n.args[0], fx.Node) else None
        if n.op in ("call_function", "call_method") and name in self.names and isinstance(source, Tensor):
            self.views += 1
            if (source.shape, source.stride(), source.dtype) == (result.shape, result.stride(), result.dtype):
                self.idle.append(n.format_node() or n.name)
        return result


@pytest.mark.parametrize(("name", "chunk"), WHERE, ids=str)
def test_a_program_gives_the_same_bits_and_no_view_is_idle(name: str, chunk: int) -> None:
    models, tasks = Models([built(name)]), batch()
    plain, traced = (list(models.differentiate(meta_loss, tasks, chunk, traced=traced)) for traced in (False, True))
    for (loss, slopes), (its_loss, its_slopes) in zip(plain, traced, strict=True):
        assert torch.equal(loss, its_loss)
        assert len(slopes) == len(its_slopes)
        for slope, its_slope in zip(slopes, its_slopes):
            assert torch.equal(slope, its_slope)
    (program,) = filter(None, models._programs.values())
    piece = next(models._pieces(tasks, chunk))
    trained, fixed = models._tensors()
    watched = Watched(graph_of(program))
    with torch.no_grad():
        value, *slopes = watched.run(*trained, *fixed, *piece.tensors)
    assert torch.equal(value, plain[0][0] if chunk != LOOP else plain[0][0][0])
    assert watched.views > 0
    assert not watched.idle


def test_it_reads_its_inputs_and_keeps_what_else_there_was() -> None:
    """Also where inputs are views or lie otherwise in memory than the examples did."""
    factor = torch.tensor(3.0)

    def function(inputs) -> list[Tensor]:
        x, y = inputs
        view = x.view(6).view(2, 3).expand(2, 3).transpose(0, 1).transpose(0, 1)
        return [view * factor * 1, (view @ y).view(2, 2).view(4).view(2, 2), x.detach() + 0]

    x, y = torch.randn(2, 3), torch.randn(3, 2)
    program = trace(function, [x, y])
    for a, b in ((x, y), (torch.randn(2, 3), torch.randn(2, 3).T)):
        torch.testing.assert_close(program([a, b]), function([a, b]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["maml, mlp", "op-lstm"])
def test_autocast_around_a_call_changes_nothing(name: str) -> None:
    """What was traced outside computes as outside, and what was traced inside computes as inside."""
    models, tasks = Models([built(name)]), batch()
    trained, fixed = models._tensors()
    inputs = [*trained, *fixed, *tasks[0].tensors]

    def compute(inputs) -> list[Tensor]:
        loss = models._call(meta_loss, inputs, tasks.way, LOOP)
        return [loss, *torch.autograd.grad(loss, list(inputs[: len(trained)]), materialize_grads=True)]

    outside = trace(compute, inputs)
    expected = outside(inputs)
    # Its cache casts a weight once for several uses, and then the slopes of these are summed in half precision.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        found = outside(inputs)
        inside = trace(compute, inputs)
        half = compute(inputs)
        assert all(torch.equal(a, b) for a, b in zip(half, inside(inputs)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(half, inside(inputs)))
    assert not torch.equal(half[0], expected[0])


def test_what_moves_to_another_device_is_moved() -> None:
    program = trace(lambda inputs: [inputs[0].to("meta")], [torch.ones(3)])
    assert program([torch.ones(3)])[0].device.type == "meta"


def test_large_matrices_lie_as_they_are_read() -> None:
    """The gradient of a weight matrix, as ``vmap`` and the derivatives of a linear layer leave it, and its uses."""

    def function(inputs) -> list[Tensor]:
        x, slope, weight = inputs
        gradient = torch.bmm(x.transpose(1, 2), slope).transpose(1, 2)
        changed = weight - 0.4 * gradient.transpose(1, 2).transpose(1, 2)
        flattened = (2 * gradient).transpose(1, 2).view(3, -1)
        square = changed @ changed.mT
        both_ways = torch.bmm(x.transpose(1, 2), slope + 1)
        of_seeds = torch.bmm(x.transpose(1, 2), slope + 2).view(3, 1, 50, 40).transpose(2, 3)
        assert not of_seeds.is_contiguous()
        products = [torch.bmm(x, changed.transpose(1, 2)), torch.bmm(square, square).transpose(1, 2)]
        return [
            gradient.sum(0),
            -gradient * 0.4,
            flattened,
            both_ways,
            both_ways.transpose(1, 2) + 1,
            of_seeds.sum(1),
            *products,
        ]

    inputs = [torch.randn(3, 8, 50), torch.randn(3, 8, 40), torch.randn(40, 50)]
    program = trace(function, inputs)
    for found, expected in zip(program(inputs), function(inputs), strict=True):
        torch.testing.assert_close(found, expected)
    seen: dict[str, Tensor] = {}

    class Kept(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.target == "sum":
                seen[n.name] = self.env[n.args[0]]
            return super().run_node(n)

    Kept(graph_of(program)).run(*inputs)
    assert len(seen) == 2
    assert all(summed.is_contiguous() for summed in seen.values())


@pytest.mark.parametrize(
    "last",
    [
        lambda h: h.as_strided((2, 40), (1600, 1)),
        lambda h: F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None]),
        lambda h: F.group_norm(h, 4),
        lambda h: torch.view_as_complex(h.unflatten(2, (20, 2))).abs(),
    ],
    ids=["strides", "attention", "group norm", "complex"],
)
def test_what_was_chosen_for_a_layout_finds_it(last: Callable[[Tensor], Tensor]) -> None:
    """Operations that look at memory, or of which one was chosen for inputs that were contiguous while tracing."""

    def function(inputs) -> list[Tensor]:
        x, y = inputs
        return [last(torch.bmm(x, y).transpose(1, 2).relu().transpose(1, 2))]

    inputs = [torch.randn(2, 40, 40), torch.randn(2, 40, 40)]
    torch.testing.assert_close(trace(function, inputs)(inputs), function(inputs), rtol=0, atol=0)


def noisy(x: Tensor) -> Tensor:
    return torch.randn_like(x) - torch.randn_like(x) + torch.rand_like(x) - torch.rand_like(x)


def filled(x: Tensor) -> Tensor:
    one, other = torch.zeros_like(x), torch.zeros_like(x)
    one[:, :1] = 1
    return x * one + other


def half_rectified(x: Tensor) -> Tensor:
    one, other = x * 2, x * 2
    return one.relu_() + other


def written_through_a_view(x: Tensor) -> Tensor:
    one, other = x + 1, x + 1
    before = one * 3
    one.view(-1)[0].mul_(5)
    return before + one * 3 + other


def copied(x: Tensor) -> Tensor:
    copy = x.to(x.dtype, copy=True)
    copy[:, 0] = 0
    return copy + x


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("function", [noisy, filled, half_rectified, written_through_a_view, copied])
def test_what_is_random_or_written_to_is_not_merged(function: Any, batched: bool) -> None:
    def compute(inputs) -> list[Tensor]:
        return [torch.func.vmap(function, randomness="different")(inputs[0]) if batched else function(inputs[0][0])]

    x = torch.randn(2, 4, 3)
    kept = x.clone()
    program = trace(compute, [x])
    torch.manual_seed(1)
    (expected,) = compute([x])
    torch.manual_seed(1)
    (found,) = program([x])
    assert torch.equal(found, expected)
    assert torch.equal(x, kept)


def fresh(x: Tensor) -> Tensor:
    made = torch.tensor([1.0, 2.0, 3.0])
    made += x.sum()
    return made


def written_to_in_other_ways(x: Tensor) -> Tensor:
    one, other, third = torch.empty(2, 3), torch.empty(2, 3), x + 1
    torch.add(x, 1, out=one)
    torch.mul(x, 2, out=other)
    before = third * 3
    torch._foreach_mul_([third], 2.0)
    return one - other + before + third * 3


def turned_in_place(x: Tensor) -> Tensor:
    turned = x.detach()
    turned.t_()
    return x.sum(0) + turned.sum(1)


def scaled_by_one_and_written_to(x: Tensor) -> Tensor:
    return x + (x * 1).add_(1)


def drawn_by_an_operation_of_ones_own(x: Tensor) -> Tensor:
    return drawn(x) - drawn(x)


@torch.library.custom_op("quickstudy_tests::drawn", mutates_args=())
def drawn(x: Tensor) -> Tensor:
    return torch.rand_like(x)


@pytest.mark.parametrize(
    "function",
    [fresh, written_to_in_other_ways, turned_in_place, scaled_by_one_and_written_to, drawn_by_an_operation_of_ones_own],
)
def test_what_is_new_or_written_to_or_drawn_is_so_in_every_run(function: Callable[[Tensor], Tensor]) -> None:
    program = trace(lambda inputs: [function(inputs[0])], [torch.rand(2, 3)])
    for _ in range(2):
        x = torch.rand(2, 3)
        results = []
        for run in (lambda inputs: [function(inputs[0])], program):
            torch.manual_seed(1)
            results += run([x.clone()])
        assert torch.equal(*results)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.tensor([x.mean(), x.std()]),
        lambda x: nn.Parameter(x) * 2,
        lambda x: x + torch.tensor(x.tolist()),
        lambda x: x * torch.from_numpy(x.numpy() + 1),
    ],
    ids=["numbers", "parameter", "list", "array"],
)
def test_what_takes_values_past_the_operations_is_not_traced(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(BackboneError, match="where PyTorch does not see it"):
        trace(lambda inputs: [function(inputs[0])], [torch.rand(2, 3)])


def test_tasks_that_lie_otherwise_in_memory_have_a_program_of_their_own() -> None:
    models = Models([built("maml, conv"), built("maml, conv")])
    tasks = Task.stack([batch(), batch()])
    for count in (2, 3):
        some = tasks.map(lambda tensor: tensor[:, :count])  # noqa: B023
        plain, traced = ([x for x, _ in models.differentiate(meta_loss, some, 2, traced=t)] for t in (False, True))
        torch.testing.assert_close(plain, traced)


def test_what_cannot_be_traced_runs_as_it_is_whatever_the_size_of_the_chunk() -> None:
    class Unpredictable(nn.Flatten):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * scale.item()

    scale = torch.tensor(2.0)
    models, tasks = Models([ProtoNet(nn.Sequential(Unpredictable(), nn.Linear(64, 2))).build(batch()[0])]), batch()
    for _ in range(2):  # three tasks in chunks of two
        parts = models.differentiate(meta_loss, tasks, 2, traced=True, each_task=True)
        assert [len(losses) for losses, _ in parts] == [2, 1]


def test_a_network_whose_program_does_not_run_is_not_traced() -> None:
    models, tasks = Models([ProtoNet(Recurrent(8)).build(batch()[0])]), batch()
    plain, traced = ([x for x, _ in models.differentiate(meta_loss, tasks, LOOP, traced=t)] for t in (False, True))
    torch.testing.assert_close(plain, traced)


def test_a_program_is_of_one_number_of_classes() -> None:
    two, labels = batch()[:1], torch.arange(6)[None]
    six = Task(two.support_x, labels, two.query_x[:, :6], labels, 6)
    two = Task(two.support_x, labels % 2, two.query_x[:, :6], labels % 2, 2)
    models = Models([ProtoNet(nn.Flatten()).build(two[0])])
    for tasks in (two, six):
        (plain,), (traced,) = (list(models.run(meta_loss, tasks, 1, traced=traced)) for traced in (False, True))
        assert torch.equal(plain, traced)
