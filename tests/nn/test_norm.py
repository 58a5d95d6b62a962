"""Batch norm with explicit statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from quickstudy.errors import BackboneError
from quickstudy.nn import BatchNorm, Conv4, recorded, replayed


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5, 5)])
def test_equals_torch_in_training_mode(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.float64)
    ours, theirs = BatchNorm(4).double(), (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(4).double()
    for norm in (ours, theirs):
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), theirs(x))
    with recorded():  # computed from primitives
        torch.testing.assert_close(ours(x), theirs(x))


def test_what_scales_start_from() -> None:
    torch.manual_seed(0)
    one, other = (Conv4(blocks=2, scale="uniform").norms for _ in range(2))
    scales = torch.cat([norm.weight for norm in one])
    assert ((scales > 0) & (scales < 1)).all()
    assert scales.mean().item() == pytest.approx(0.5, abs=0.1)
    assert not torch.equal(one[0].weight, other[0].weight)
    assert (Conv4().norms[0].weight == 1).all()


def test_replayed_statistics_make_queries_independent_of_each_other() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), BatchNorm(3), nn.ReLU(), nn.Conv2d(3, 2, 3), BatchNorm(2)).double()
    support, queries = torch.randn(5, 1, 8, 8).double(), torch.randn(4, 1, 8, 8).double()
    with recorded() as statistics:
        own = network(support)
    assert [mean.shape for mean, _ in statistics] == [(3,), (2,)]
    with replayed(statistics):
        torch.testing.assert_close(network(support), own)
    with replayed(statistics):
        together = network(queries)
    alone = []
    for query in queries:
        with replayed(statistics):
            alone.append(network(query[None]))
    torch.testing.assert_close(together, torch.cat(alone))


def test_one_example_has_no_batch_statistics() -> None:
    with pytest.raises(BackboneError, match="norm='support'"):
        BatchNorm(4)(torch.randn(1, 4))


@pytest.mark.parametrize("shape", [(3, 6, 4), (3, 6, 4, 5, 5)])
def test_second_order_under_vmap_equals_a_loop(shape: tuple[int, ...]) -> None:
    """The fused kernel fails this: under vmap its gradient is silently a constant for the second derivative."""
    norm = BatchNorm(4).double()
    weights = {name: torch.rand_like(p).requires_grad_() for name, p in norm.named_parameters()}
    mix = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(*shape, dtype=torch.float64)

    def loss(mix: Tensor, x: Tensor) -> Tensor:
        mixed = torch.einsum("ij,mj...->mi...", mix, x)
        return (functional_call(norm, weights, (mixed,)).tanh() ** 3).sum()

    def adapted(mix: Tensor, x: Tensor) -> Tensor:
        return loss(mix - 0.1 * grad(loss)(mix, x), x)

    looped = torch.autograd.grad(sum(adapted(mix, one) for one in x), mix)[0]  # type: ignore[arg-type]
    mapped = torch.autograd.grad(vmap(adapted, (None, 0))(mix, x).sum(), mix)[0]
    torch.testing.assert_close(mapped, looped)
    assert torch.autograd.gradcheck(lambda m: vmap(adapted, (None, 0))(m, x).sum(), mix)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_single_precision_is_enough_whatever_the_layout(layout: torch.memory_format) -> None:
    """PyTorch's kernel for channels-last images on a CPU fails this by far."""
    torch.manual_seed(0)
    x = torch.rand(300, 8, 28, 28)
    x = (x * (x > 0.8)).contiguous(memory_format=layout)  # mostly nothing, as in images of characters
    single, double = (BatchNorm(8).to(dtype)(x.to(dtype)).double() for dtype in (torch.float32, torch.float64))
    assert (single - double).norm() < 1e-6 * double.norm()
