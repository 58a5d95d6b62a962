"""Networks of the library and of users, as backbones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quickstudy.errors import BackboneError
from quickstudy.nn import MLP, BatchNorm, Conv4, adopt


@pytest.mark.parametrize(
    ("network", "shape", "features", "parameters"),
    [
        (Conv4(), (1, 28, 28), 64, 111_936),
        (Conv4(), (3, 84, 84), 1600, 113_088),
        (Conv4(channels=32), (3, 84, 84), 800, 32_901 - 4_005),
        (MLP([256, 128, 64, 64], batch_norm=True), (1, 28, 28), 64, 247_296),
        (MLP([91, 91, 91]), (1,), 91, 17_018 - 92),
    ],
)
def test_sizes_as_published(network: nn.Module, shape: tuple[int, ...], features: int, parameters: int) -> None:
    assert adopt(network, torch.rand(5, *shape)) == features
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_sine_network_starts_from_zero_biases() -> None:
    network = MLP([7, 7], zero_bias=True)
    adopt(network, torch.rand(5, 1))
    assert all((linear.bias == 0).all() for linear in network.linears)
    assert all((linear.weight != 0).any() for linear in network.linears)


def test_own_network_gets_our_batch_norm() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    assert adopt(network, torch.rand(2, 3, 8, 8)) == 4 * 36
    assert isinstance(network[1], BatchNorm)


class Forgetful(nn.Module):
    """Keeps a copy of its weight from before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.kept = [self.layer.weight.detach().clone()]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kept[0].T + self.layer.bias


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.layer(x)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Conv2d(3, 4, 3), "cannot read inputs of shape"),
        (nn.Sequential(nn.Conv2d(1, 4, 3)), r"must return \[5, features\]"),
        (nn.Sequential(nn.Flatten(), Forgetful().layer, nn.Softmax(0)), "cannot read"),
    ],
)
def test_unfit_networks(network: nn.Module, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        adopt(network, torch.rand(5, 1, 8, 8))


@pytest.mark.parametrize(("network", "message"), [(Forgetful(), "not a pure function"), (Counting(), "buffer 'seen'")])
def test_networks_that_are_not_pure(network: nn.Module, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        adopt(network, torch.rand(5, 4))


def test_a_network_that_changes_only_while_it_trains_is_not_pure() -> None:
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    with pytest.raises(BackboneError, match=r"changes the buffer '1\.running_mean'"):
        adopt(nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten()), torch.rand(5, 1, 8, 8))
