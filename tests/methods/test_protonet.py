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
