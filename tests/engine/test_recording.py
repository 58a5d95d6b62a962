"""What a function does, operation by operation, and what keeps it from being recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from quickstudy.engine.recording import record
from quickstudy.errors import BackboneError


def inner_step(inputs: Sequence[Tensor]) -> list[Tensor]:
    """A meta-gradient: of the query loss after a step on the support loss, over a batch of tasks."""
    weight, x, y = inputs

    def loss(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x @ weight, y)

    def one(x: Tensor, y: Tensor) -> Tensor:
        return loss(weight - 0.1 * grad(loss)(weight, x, y), x.flip(0), y)

    losses = vmap(one)(x, y)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), [weight])]


def examples() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 3, requires_grad=True), torch.randn(5, 6, 4), torch.randint(0, 3, (5, 6))]


def run(function: Callable[[Sequence[Tensor]], Sequence[Tensor]], inputs: Sequence[Tensor]) -> Callable[..., Any]:
    graph, constants = record(function, inputs)
    return fx.GraphModule(constants, graph)


def test_it_records_what_pytorch_records() -> None:
    inputs = examples()
    graph, constants = record(inner_step, inputs)
    theirs = make_fx(lambda *tensors: inner_step(tensors))(*inputs).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == [
        str(node.target) for node in theirs.nodes if node.op == "call_function"
    ]
    assert not constants
    for found, expected in zip(fx.GraphModule({}, graph)(*inputs), inner_step(inputs), strict=True):
        assert torch.equal(found, expected)


def test_every_layout_is_that_of_the_result() -> None:
    class Checked(fx.Interpreter):
        seen = 0

        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                assert n.meta["layout"] == (result.shape, result.stride(), result.dtype)
                assert n.meta["contiguous"] == result.is_contiguous()
                self.seen += 1
            return result

    graph, constants = record(lambda inputs: [*inner_step(inputs), *inputs[1].mT.split(2, dim=1)], examples())
    checked = Checked(fx.GraphModule(constants, graph))
    checked.run(*examples())
    assert checked.seen > 30


def test_other_tensors_are_read_anew_and_new_ones_are_made_anew() -> None:
    outer = torch.ones(2)

    def function(inputs: Sequence[Tensor]) -> list[Tensor]:
        made = torch.tensor([1.0, 2.0])
        made += inputs[0]
        return [made, outer * 2, outer]

    module = run(function, [torch.ones(2)])
    outer.fill_(3)
    for _ in range(2):
        made, doubled, same = module(torch.ones(2))
        assert (made.tolist(), doubled.tolist()) == ([2, 3], [6, 6])
        assert same is outer


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * float(x.sum()),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x * torch.equal(x, x),
    ],
    ids=["number", "condition", "mask", "places", "comparison"],
)
def test_what_looks_at_values_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(BackboneError, match=r"aten\.\S+ looks at the values of a tensor"):
        record(lambda inputs: [function(inputs[0])], [torch.ones(3)])


def test_copies_of_memory_are_refused() -> None:
    with pytest.raises(BackboneError, match="takes a UntypedStorage, which a graph cannot hold"):
        record(lambda inputs: [copy.deepcopy(inputs[0] * 2)], [torch.ones(3)])


def test_inputs_are_told_apart() -> None:
    x = torch.ones(3)
    with pytest.raises(BackboneError, match="two inputs are the same tensor"):
        record(lambda inputs: [inputs[0] - inputs[1]], [x, x])


def test_places_are_no_values() -> None:
    def function(inputs: Sequence[Tensor]) -> list[Tensor]:
        x, places = inputs
        kept = x.clone()
        kept[x > 1] = 0
        return [x[places], x[0], kept, torch.where(x > 1, x, -x)]

    inputs = [torch.arange(4.0), torch.tensor([2, 0])]
    module = run(function, inputs)
    inputs = [torch.arange(4.0).flip(0), torch.tensor([1, 1])]
    for found, expected in zip(module(*inputs), function(inputs), strict=True):
        assert torch.equal(found, expected)


def test_the_cache_of_autocast_is_as_it_was_whatever_happens() -> None:
    assert torch.is_autocast_cache_enabled()
    with pytest.raises(ZeroDivisionError):
        record(lambda inputs: [inputs[0] / (1 // 0)], [torch.ones(1)])
    assert torch.is_autocast_cache_enabled()
