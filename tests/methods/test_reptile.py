"""Laws of Reptile, and of what it descends with: optimisers that are functions, minibatches that are the task's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, single
from torch import Tensor, nn
from torch.func import vmap

from quickstudy.engine.models import Models
from quickstudy.errors import RecipeError
from quickstudy.methods import Reptile
from quickstudy.methods.inner import SGD, Adam, InnerOptimizer, minibatches, random_bits
from quickstudy.nn import MLP
from quickstudy.task import Task

TASKS = 3


def batch(seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3)
    support, query = (labels.repeat_interleave(count).expand(TASKS, -1) for count in (2, 3))
    x, qx = (torch.randn(TASKS, count, 6, dtype=torch.float64, generator=generator) for count in (6, 9))
    return Task(x, support, qx, query, 3)


def waves() -> Task:
    x = torch.linspace(-2, 2, 15, dtype=torch.float64)[:, None]
    return Task(x[::3], torch.sin(x[::3]), x, torch.sin(x))


def built(task: Task, optimizer: InnerOptimizer, backbone: nn.Module | None = None, **settings) -> Reptile:
    torch.manual_seed(0)
    method = Reptile(MLP([5, 4]) if backbone is None else backbone, optimizer, **settings)
    return method.build(single(task)).double()


def whole(task: Task) -> tuple[Tensor, Tensor]:
    return torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])


def trained(method: Reptile, task: Task, optimizer: torch.optim.Optimizer, steps: int, batch: int) -> list[float]:
    """Train a learner itself, in place, in the published way; return the losses."""
    x, y = whole(task)
    losses = []
    for chosen in minibatches(x, batch, steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(method(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("task", [batch()[0], waves()], ids=["classes", "waves"])
def test_one_step_of_gradient_descent_is_joint_training(task: Task) -> None:
    """The meta-gradient is the inner learning rate times the gradient of the loss on all examples."""
    method = built(task, SGD(0.3), steps=1)
    weights = list(method.parameters())
    x, y = whole(task)
    joint = F.mse_loss(method(x), y) if task.way is None else F.cross_entropy(method(x), y)
    loss = method.loss(task)
    torch.testing.assert_close(loss, joint)
    expected = [0.3 * slope for slope in torch.autograd.grad(joint, weights)]
    torch.testing.assert_close(list(torch.autograd.grad(loss, weights)), expected)


@pytest.mark.parametrize("size", [4, 7, 15, 20])
def test_the_meta_gradient_points_from_where_training_leads(size: int) -> None:
    """It is the difference to the weights that PyTorch's Adam comes to; the loss is the mean of those on the way."""
    task = batch()[0]
    method = built(task, Adam(0.01, beta1=0), steps=5, batch=size)
    other = copy.deepcopy(method)
    losses = trained(other, task, torch.optim.Adam(other.parameters(), lr=0.01, betas=(0.0, 0.999)), 5, size)
    loss = method.loss(task)
    assert loss.item() == pytest.approx(sum(losses) / 5)
    slopes = torch.autograd.grad(loss, list(method.parameters()))
    torch.testing.assert_close(list(slopes), [a - b for a, b in zip(method.parameters(), other.parameters())])


def test_an_outer_step_moves_towards_the_mean_of_where_tasks_lead() -> None:
    tasks = batch()
    method = built(tasks[0], SGD(0.1, momentum=0.9), steps=3, batch=5)
    ends = []
    for number in range(TASKS):
        other = copy.deepcopy(method)
        trained(other, tasks[number], torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9), 3, 5)
        ends.append([p.detach() for p in other.parameters()])
    models = Models([method])
    (_, total), weights = gradients(models, tasks, TASKS), list(models.trained.values())
    outer = torch.optim.SGD(weights, lr=0.7)
    for weight, slope in zip(weights, total):
        weight.grad = slope / TASKS
    outer.step()
    means = [torch.stack(end).mean(0) for end in zip(*ends)]
    expected = [start + 0.7 * (mean - start) for start, mean in zip(method.parameters(), means)]
    torch.testing.assert_close(weights, expected)


def test_what_is_learned_in_a_task_is_a_constant() -> None:
    task = batch()[0]
    method = built(task, SGD(0.1), steps=2)
    assert not any(weight.requires_grad for weight in method.adapt(task.support).weights.values())


def test_evaluation_learns_from_the_support_set_alone_in_its_own_way() -> None:
    task = batch()[0]
    method = built(task, SGD(0.1), steps=1, batch=3, test_steps=4, test_batch=2).eval()
    other = built(task, SGD(0.1), steps=4, batch=2)
    torch.testing.assert_close(method.adapt(task.support), other.adapt(task.support))
    method.set_test_steps(0)
    torch.testing.assert_close(method.adapt(task.support).weights, method.initial)
    assert built(task, SGD(0.1), batch=3).test_batch == 3


def test_support_statistics_make_predictions_independent() -> None:
    task = batch()[0]
    method = built(task, SGD(0.1), MLP([5], batch_norm=True), norm="support", batch=4)
    state = method.adapt(task.support)
    alone = torch.cat([method.predict(state, x[None]) for x in task.query_x])
    torch.testing.assert_close(method.predict(state, task.query_x), alone)


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (SGD, torch.optim.SGD, {"lr": 0.1}),
        (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.9, "weight_decay": 0.01}),
        (Adam, torch.optim.Adam, {"lr": 0.1}),
        (Adam, torch.optim.Adam, {"lr": 0.1, "beta1": 0.0, "beta2": 0.9, "eps": 1e-3}),
    ],
    ids=str,
)
def test_inner_optimizers_are_those_of_pytorch(ours: type, theirs: type, settings: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(size, dtype=torch.float64, generator=generator) for name, size in (("a", 3), ("b", 2))}
    parameters = [weight.clone().requires_grad_() for weight in weights.values()]
    given = dict(settings)
    if theirs is torch.optim.Adam:
        given["betas"] = (given.pop("beta1", 0.9), given.pop("beta2", 0.999))
    other, rule, state = theirs(parameters, **given), ours(**settings), None
    for _ in range(4):
        slopes = {name: weight.sin() for name, weight in weights.items()}
        for parameter in parameters:
            parameter.grad = parameter.detach().sin()
        other.step()
        weights, state = rule.step(weights, slopes, state)
        torch.testing.assert_close(list(weights.values()), [p.detach() for p in parameters])


@pytest.mark.parametrize(("size", "count"), [(4, 6), (10, 2), (15, 3), (3, 0)])
def test_minibatches_go_round_the_examples(size: int, count: int) -> None:
    x = torch.randn(10, 2)
    found = minibatches(x, size, count)
    assert [len(x[chosen]) for chosen in found] == [size] * count
    for whole_round in torch.cat([torch.arange(0), *found]).split(10):  # type: ignore[list-item]
        assert len(set(whole_round.tolist())) == len(whole_round)
        if len(whole_round) == 10:
            assert set(whole_round.tolist()) == set(range(10))


def test_minibatches_are_of_the_task_alone() -> None:
    x = torch.randn(5, 10, 2)

    def order(own: Tensor) -> Tensor:
        return torch.stack(minibatches(own, 4, 6))  # type: ignore[arg-type]

    each = torch.stack([order(own) for own in x])
    assert torch.equal(vmap(order)(x), each)
    assert torch.equal(torch.stack([order(own) for own in x]), each)
    assert len({tuple(own.flatten().tolist()) for own in each}) == 5


def test_random_bits_are_spread_evenly() -> None:
    x = torch.rand(2, 75, 1, 8, 8)
    first, second = (random_bits(own, 50_000).double() / 2**63 for own in x)
    for numbers in (first, second):
        assert abs(numbers.mean() - 0.5) < 0.01
        assert torch.histc(numbers, 20, 0, 1).sub(2500).abs().max() < 300
    pairs = torch.stack([first[1:], first[:-1], second[1:]])
    assert torch.corrcoef(pairs).fill_diagonal_(0).abs().max() < 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least one in training, not 0"),
        ({"test_steps": -1}, "zero or more inner steps"),
        ({"batch": 0}, "at least one example, not 0"),
        ({"test_batch": 0}, "not None \\(training\\), 0 \\(test\\)"),
        ({"norm": "joint"}, "norm batch or support, not 'joint'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Reptile(MLP([4]), SGD(0.1), **settings)
