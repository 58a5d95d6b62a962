"""The nearest neighbour: what it says, and that it learns nothing."""

from __future__ import annotations

import pytest
import torch

from quickstudy.engine import LOOP, Models, scores
from quickstudy.errors import RecipeError
from quickstudy.methods import NearestNeighbour, ProtoNet
from quickstudy.nn import Conv4
from quickstudy.task import Support, Task


@pytest.fixture
def task() -> Task:
    torch.manual_seed(0)
    labels = torch.arange(3)
    return Task(
        torch.rand(12, 1, 16, 16), labels.repeat(4), torch.rand(9, 1, 16, 16), labels.repeat_interleave(3), way=3
    )


def test_the_class_of_the_nearest_example(task: Task) -> None:
    method = NearestNeighbour().build(task)
    prediction = method.predict(method.adapt(task.support), task.query_x)
    far = torch.cdist(task.query_x.flatten(1), task.support_x.flatten(1))
    assert torch.equal(prediction.argmax(1), task.support_y[far.argmin(1)])
    torch.testing.assert_close(-prediction.amax(1), far.amin(1) ** 2, rtol=1e-4, atol=1e-4)


def test_with_one_example_a_class_it_is_protonet(task: Task) -> None:
    backbone = Conv4(channels=4)
    one = Support(task.support_x[:3], task.support_y[:3], 3)
    nearest, prototypes = (kind(backbone).build(task) for kind in (NearestNeighbour, ProtoNet))
    torch.testing.assert_close(
        nearest.predict(nearest.adapt(one), task.query_x), prototypes.predict(prototypes.adapt(one), task.query_x)
    )


def test_without_parameters_it_still_runs_batched(task: Task) -> None:
    batch = task.map(lambda tensor: torch.stack([tensor, tensor.flip(0)]))
    models = Models([NearestNeighbour().build(task)])
    loop, mapped = (torch.cat(list(models.run(scores, batch, chunk))) for chunk in (LOOP, 2))
    torch.testing.assert_close(loop, mapped)


def test_regression_is_refused(task: Task) -> None:
    with pytest.raises(RecipeError, match="regression"):
        NearestNeighbour().adapt(Support(task.support_x, task.support_y, None))


def test_inputs_of_another_size_are_refused(task: Task) -> None:
    method = NearestNeighbour().build(task)
    method.check(task)
    with pytest.raises(RecipeError, match="built for inputs of 1×16×16 and cannot take 1×8×16"):
        method.check(task.map(lambda tensor: tensor[:, :, :8] if tensor.dim() > 1 else tensor))
