"""Laws of prototypical networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quickstudy.errors import RecipeError
from quickstudy.methods import ProtoNet
from quickstudy.methods.protonet import distances, prototypes
from quickstudy.nn import Conv4
from quickstudy.task import Support, Task


@pytest.fixture
def task() -> Task:
    torch.manual_seed(0)
    labels = torch.arange(4)
    return Task(
        torch.rand(8, 1, 16, 16), labels.repeat_interleave(2), torch.rand(12, 1, 16, 16), labels.repeat_interleave(3), 4
    )


def test_prototypes_are_class_means_whatever_the_order_and_the_balance() -> None:
    embedding = torch.randn(6, 3)
    y = torch.tensor([2, 0, 2, 1, 2, 0])
    expected = torch.stack([embedding[y == label].mean(0) for label in range(3)])
    torch.testing.assert_close(prototypes(embedding, Support(embedding, y, 3)), expected)


@pytest.mark.parametrize("kind", ["euclidean", "cosine"])
def test_distances(kind: str) -> None:
    queries, points = torch.randn(5, 7).double(), torch.randn(3, 7).double()
    found = distances(queries, points, kind)
    if kind == "euclidean":
        torch.testing.assert_close(found, torch.cdist(queries, points) ** 2)
    else:
        expected = 1 - nn.functional.cosine_similarity(queries[:, None], points[None], dim=-1)
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


def test_cosine_of_an_empty_embedding_has_a_finite_gradient() -> None:
    queries = torch.zeros(2, 4, requires_grad=True)
    distances(queries, torch.ones(3, 4), "cosine").sum().backward()
    assert torch.isfinite(queries.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["batch", "support", "joint"])
def test_permutations(task: Task, norm: str) -> None:
    """The order of the support set changes nothing; that of the queries only the order of the predictions."""
    method = ProtoNet(Conv4(channels=4), norm=norm).build(task)
    expected = method.predict(method.adapt(task.support), task.query_x)
    order, queries = torch.randperm(8), torch.randperm(12)
    shuffled = Support(task.support_x[order], task.support_y[order], 4)
    found = method.predict(method.adapt(shuffled), task.query_x[queries])
    torch.testing.assert_close(found, expected[queries], atol=1e-4, rtol=1e-4)


def test_only_support_statistics_make_predictions_independent(task: Task) -> None:
    for norm, independent in (("support", True), ("batch", False), ("joint", False)):
        method = ProtoNet(Conv4(channels=4), norm=norm).build(task)
        state = method.adapt(task.support)
        whole, part = method.predict(state, task.query_x)[:5], method.predict(state, task.query_x[:5])
        assert torch.allclose(whole, part, atol=1e-4) == independent


def test_way_may_change_after_training(task: Task) -> None:
    method = ProtoNet(Conv4(channels=4)).build(task)
    two = Support(task.support_x[:4], task.support_y[:4], 2)
    assert method.predict(method.adapt(two), task.query_x).shape == (12, 2)


def test_regression_is_refused() -> None:
    x: Tensor = torch.rand(5, 1, 16, 16)
    method = ProtoNet(Conv4(channels=4)).build(Task(x, torch.rand(5, 1), x, torch.rand(5, 1)))
    with pytest.raises(RecipeError, match="regression"):
        method.predict(method.adapt(Support(x, torch.rand(5, 1), None)), x)


class Shifted(nn.Module):
    """Pixels, scaled and shifted."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) * self.scale + self.shift


def simple(task: Task, normalise: str, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    method = ProtoNet(Shifted(scale, shift), normalise=normalise).build(task)  # type: ignore[arg-type]
    assert (method.calibration_tasks > 0) == (normalise == "centred-l2")
    method.calibrate([task, task])
    return method.predict(method.adapt(task.support), task.query_x)


def test_what_normalising_makes_no_difference_to(task: Task) -> None:
    """Lengths make none after l2, and once the mean is taken off neither does where the embeddings lie."""
    for normalise, scale, shift in (("l2", 3.0, 0.0), ("centred-l2", 3.0, 0.0), ("centred-l2", 3.0, 2.0)):
        torch.testing.assert_close(simple(task, normalise, scale, shift), simple(task, normalise), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(simple(task, "l2", shift=2.0), simple(task, "l2"))
    assert not torch.allclose(simple(task, "none", 3.0), simple(task, "none"))


def test_nearest_centroids_of_simpleshot_by_hand(task: Task) -> None:
    x, qx = task.support_x.flatten(1), task.query_x.flatten(1)
    centre = torch.cat([x, qx]).mean(0)
    for normalise, shift in (("l2", torch.zeros(1)), ("centred-l2", centre)):
        a, b = ((z - shift) / (z - shift).norm(dim=1, keepdim=True) for z in (x, qx))
        expected = -(torch.cdist(b, a.view(4, 2, -1).mean(1)) ** 2)
        torch.testing.assert_close(simple(task, normalise), expected, rtol=1e-4, atol=1e-5)


def test_distances_do_not_depend_on_where_everything_is() -> None:
    queries, points = torch.rand(5, 64), torch.rand(4, 64)
    near, far = (distances(queries + offset, points + offset, "euclidean") for offset in (0.0, 1e4))
    assert torch.allclose(near, far, atol=0.1)  # and not a thousand apart: floats near 1e4 are 0.001 apart


def test_a_temperature_divides_distances(task: Task) -> None:
    plain, cold = (built_with(task, temperature) for temperature in (1.0, 0.25))
    torch.testing.assert_close(cold, 4 * plain)
    with pytest.raises(RecipeError, match="temperature above zero, not by 0"):
        ProtoNet(nn.Flatten(), temperature=0)


def built_with(task: Task, temperature: float) -> Tensor:
    method = ProtoNet(nn.Flatten(), temperature=temperature).build(task)
    return method.predict(method.adapt(task.support), task.query_x)
