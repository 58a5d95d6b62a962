"""Statistics taken once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from quickstudy.nn import BatchNorm, Conv4, FixedStatistics, adopt, population_statistics, recorded


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    network = Conv4(channels=3, blocks=2)
    adopt(network, torch.rand(4, 2, 8, 8))
    return network.double()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(24, 2, 8, 8, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("sizes", [[24], [8, 8, 8], [2, 7, 15]])
def test_of_one_layer_they_are_those_of_all_images_however_these_are_cut(images: Tensor, sizes: list[int]) -> None:
    with torch.no_grad():
        ((mean, variance),) = population_statistics(BatchNorm(2).double(), images.split(sizes))
    torch.testing.assert_close(mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(variance, images.var((0, 2, 3), correction=0))


def test_of_one_batch_they_are_its_own(network: nn.Module, images: Tensor) -> None:
    with recorded() as own:
        expected = network(images)
    statistics = population_statistics(network, [images])
    torch.testing.assert_close(statistics, own)
    torch.testing.assert_close(FixedStatistics(network, statistics)(images), expected)


def test_an_image_is_embedded_on_its_own(network: nn.Module, images: Tensor) -> None:
    fixed = FixedStatistics(network, population_statistics(network, images.split(8)))
    alone = torch.cat([fixed(image[None]) for image in images])
    torch.testing.assert_close(alone, fixed(images))


def test_restored_from_its_state(network: nn.Module, images: Tensor) -> None:
    fixed = FixedStatistics(network, population_statistics(network, images.split(8)))
    other = Conv4(channels=3, blocks=2)
    adopt(other, torch.rand(4, 2, 8, 8))
    restored = FixedStatistics.restore(other.double(), fixed.state_dict())
    assert torch.equal(restored(images), fixed(images))
    assert {"backbone.convs.0.weight", "mean_0", "variance_1"} <= set(fixed.state_dict())


def test_it_is_itself_a_backbone(network: nn.Module, images: Tensor) -> None:
    fixed = FixedStatistics(network, population_statistics(network, images.split(8)))
    assert adopt(fixed, images) == 12
    tensors = {**dict(fixed.named_parameters()), **dict(fixed.named_buffers())}
    mapped = vmap(lambda x: functional_call(fixed, tensors, (x,)))(images.view(4, 6, 2, 8, 8))
    torch.testing.assert_close(mapped.flatten(0, 1), fixed(images))
    with recorded() as statistics:
        fixed(images)
    assert statistics == []
