"""The residual networks: sizes as published, and functions that are batched over tasks and differentiated twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from quickstudy.errors import RecipeError
from quickstudy.nn import DropBlock, ResNet12, WideResNet, adopt

SMALL = {
    "resnet12": lambda: ResNet12([2, 3]),
    "wide": lambda: WideResNet(10, 1),
}


@pytest.fixture(params=SMALL)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    network = SMALL[request.param]()
    adopt(network, torch.rand(3, 2, 8, 8))
    return network.double()


@pytest.mark.parametrize(
    ("make", "features", "parameters"),
    [
        (lambda: ResNet12(), 640, 12_424_320),
        (lambda: ResNet12([64, 128, 256, 512]), 512, 7_996_800),
        (lambda: WideResNet(), 640, 36_479_194 - 6_410),  # as published, without the head for ten classes
        (lambda: WideResNet(16, 4), 256, 2_748_890 - 2_570),
    ],
)
def test_sizes_as_published(make: Callable[[], nn.Module], features: int, parameters: int) -> None:
    with torch.device("meta"):
        network = make()
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, features)
    assert sum(p.numel() for p in network.parameters()) == parameters


def plain_norm(x: Tensor, norm: nn.Module) -> Tensor:
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)


def test_resnet12_is_what_its_equation_says() -> None:
    torch.manual_seed(0)
    network = ResNet12([3, 4]).double()
    x = torch.randn(4, 2, 9, 8, dtype=torch.float64)
    embedding = network(x)
    for block in network.blocks:
        y = x
        for i, (conv, norm) in enumerate(zip(block.convs, block.norms)):
            y = plain_norm(F.conv2d(y, conv.weight, padding=1), norm)
            y = F.leaky_relu(y, 0.1) if i < 2 else y
        conv, norm = block.shortcut
        x = F.max_pool2d(F.leaky_relu(y + plain_norm(F.conv2d(x, conv.weight), norm), 0.1), 2)
    torch.testing.assert_close(embedding, F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_a_wide_network_is_what_its_docstring_says() -> None:
    torch.manual_seed(0)
    network = WideResNet(16, 2).double()
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    embedding = network(x)
    y = F.conv2d(x, network.conv.weight, padding=1)
    sizes = []
    for block in network.blocks:
        stride = 2 if len(sizes) in {2, 4} else 1
        active = F.relu(plain_norm(y, block.norms[0]))
        inner = F.conv2d(active, block.convs[0].weight, padding=1, stride=stride)
        inner = F.conv2d(F.relu(plain_norm(inner, block.norms[1])), block.convs[1].weight, padding=1)
        y = inner + (F.conv2d(active, block.shortcut.weight, stride=stride) if len(sizes) in {0, 2, 4} else y)
        sizes.append(tuple(y.shape[1:]))
    assert sizes == [(32, 8, 8)] * 2 + [(64, 4, 4)] * 2 + [(128, 2, 2)] * 2
    torch.testing.assert_close(embedding, F.relu(plain_norm(y, network.norm)).mean((2, 3)))


def test_second_order_under_vmap_equals_a_loop(network: nn.Module) -> None:
    tasks = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64)
    weights = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(network, weights, (x,)).tanh().square().sum()

    def adapted(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        slopes = grad(loss)(weights, x)
        return loss({name: w - 0.1 * slopes[name] for name, w in weights.items()}, x)

    values = [adapted(weights, x) for x in tasks]
    mapped = vmap(adapted, (None, 0))(weights, tasks)
    torch.testing.assert_close(mapped, torch.stack(values))
    looped = torch.autograd.grad(sum(values), list(weights.values()))  # type: ignore[arg-type]
    for ours, theirs in zip(torch.autograd.grad(mapped.sum(), list(weights.values())), looped):
        torch.testing.assert_close(ours, theirs)
    # and it is the slope along one direction: of steps too small for a ReLU to change its mind
    direction = {name: 1e-8 * torch.randn_like(w) for name, w in weights.items()}
    with torch.no_grad():
        ahead, behind = (
            vmap(adapted, (None, 0))({name: w + sign * direction[name] for name, w in weights.items()}, tasks).sum()
            for sign in (1, -1)
        )
    slope = sum((g * d).sum() for g, d in zip(looped, direction.values()))
    torch.testing.assert_close((ahead - behind) / 2, slope, rtol=1e-4, atol=0)


def test_convolutions_start_from_he_s_draw() -> None:
    torch.manual_seed(0)
    network = ResNet12([32, 64])
    network(torch.rand(2, 3, 8, 8))
    for conv in network.blocks[1].convs:
        assert conv.weight.detach().std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)


def test_nothing_is_dropped_outside_of_training() -> None:
    x = torch.rand(2, 3, 6, 6)
    assert torch.equal(DropBlock(0.5, 3).eval()(x), x)
    assert torch.equal(DropBlock(0.0)(x), x)


@pytest.mark.parametrize("size", [1, 3, 50])
def test_squares_are_dropped_and_the_rest_makes_up_for_it(size: int) -> None:
    torch.manual_seed(0)
    drop = DropBlock(0.1, size)
    y = drop(torch.ones(200, 8, 7, 9))
    lost = y == 0
    if size == 50:  # larger than the image: a square of 7x7, at one of three places
        assert 0 < lost.float().mean() < 0.2
        size = 7
    else:  # fewer than equation 1 says, where squares overlap
        assert 0.07 < lost.float().mean() < 0.105
    opened = F.max_pool2d(F.pad(-F.max_pool2d(-lost.float(), size, 1), (size - 1,) * 4), size, 1)
    assert torch.equal(opened.bool(), lost)  # every lost pixel is in a whole lost square
    assert float(y.mean()) == pytest.approx(1, abs=1e-5)
    assert len(y.unique()) == 2


def test_tasks_lose_different_squares() -> None:
    y = vmap(DropBlock(0.3, 2), randomness="different")(torch.ones(2, 4, 3, 6, 6))
    assert not torch.equal(y[0], y[1])


@pytest.mark.parametrize("make", [lambda: DropBlock(1.0), lambda: DropBlock(0.1, 0), lambda: WideResNet(27)])
def test_settings_out_of_range_are_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(RecipeError, match="got"):
        make()
