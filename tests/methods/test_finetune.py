"""Laws of fine-tuning: it is training with PyTorch's optimisers, task by task, and nothing is meta-learned."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import scored, single
from torch import Tensor, nn
from torch.func import functional_call

from quickstudy.engine.models import LOOP, Models
from quickstudy.errors import RecipeError
from quickstudy.methods import FineTune
from quickstudy.methods.finetune import part
from quickstudy.methods.inner import SGD, minibatches
from quickstudy.nn import MLP
from quickstudy.task import Task

TASKS = 3
WAYS = {"head": {"adapts": "head"}, "all": {"adapts": "all"}}
KINDS = {
    "baseline": {"batch": 4},
    "baseline++": {"head": "cosine", "batch": 4},
    "cosines alone": {"head": "cosine", "learned_norms": False},
    "all": {"adapts": "all"},
    "scratch": {"adapts": "all", "start": "scratch", "batch": 4},
    "random features": {"start": "scratch"},
}


def batch(way: int = 3, shot: int = 2) -> Task:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(way)
    support, query = (labels.repeat_interleave(count).expand(TASKS, -1) for count in (shot, 4))
    x, qx = (torch.randn(TASKS, way * count, 6, dtype=torch.float64, generator=generator) for count in (shot, 4))
    return Task(x, support, qx, query, way)


def waves() -> Task:
    x = torch.linspace(-2, 2, 15, dtype=torch.float64)[:, None]
    return Task(x[::3], torch.sin(x[::3]), x, torch.sin(x))


def built(task: Task, backbone: nn.Module | None = None, optimizer: SGD | None = None, **settings) -> FineTune:
    torch.manual_seed(0)
    method = FineTune(MLP([8, 5]) if backbone is None else backbone, optimizer or SGD(0.1), **{"steps": 5, **settings})
    return method.build(single(task)).double()


def learner(method: FineTune, weights: dict[str, Tensor]) -> FineTune:
    """A learner of its own, with these weights, that PyTorch can train."""
    other = copy.deepcopy(method)
    for name, weight in weights.items():
        other.get_parameter(name).data = weight.detach().clone()
    return other


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("norm", ["batch", "support"])
def test_it_is_training_with_pytorch(name: str, norm: str) -> None:
    task = batch()[1]
    settings = {"momentum": 0.9, "dampening": 0.9, "weight_decay": 0.01}
    method = built(task, optimizer=SGD(0.1, **settings), norm=norm, **KINDS[name])
    other = learner(method, method.draw(task.support))
    adapted = [other.get_parameter(own).requires_grad_() for own in sorted(method.adapted)]
    optimizer = torch.optim.SGD(adapted, lr=0.1, **settings)
    for chosen in minibatches(task.support_x, method.batch, 5):
        optimizer.zero_grad()
        F.cross_entropy(other(task.support_x[chosen]), task.support_y[chosen]).backward()
        optimizer.step()
    state = method.adapt(task.support)
    for own in method.adapted:
        torch.testing.assert_close(state.weights[own], other.get_parameter(own).detach())
    torch.testing.assert_close(method.predict(state, task.query_x), other(task.query_x).detach())


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_meta_learned(name: str) -> None:
    method = built(batch()[0], **KINDS[name])
    assert not any(parameter.requires_grad for parameter in method.parameters())
    assert not Models([method]).trained


@pytest.mark.parametrize("name", KINDS)
def test_what_adapts_and_what_is_drawn(name: str) -> None:
    task = batch()[0]
    method = built(task, MLP([8], batch_norm=True), **KINDS[name])
    parts = {"head"} if method.adapts == "head" else {"head", "backbone"}
    assert {own.split(".")[0] for own in method.adapted} == parts
    drawn = method.draw(task.support)
    assert {own.split(".")[0] for own in drawn} == ({"head"} if method.start == "pretrained" else {"head", "backbone"})
    before, after = dict(method.named_parameters()), method.adapt(task.support).weights
    moved = {own.split(".")[0] for own, weight in after.items() if not torch.equal(weight, {**before, **drawn}[own])}
    assert moved == parts


def test_random_weights_are_the_tasks_own_and_drawn_like_the_first() -> None:
    tasks = batch()
    method = built(tasks[0], MLP([200, 5], batch_norm=True), start="scratch")
    own, again, other = (method.draw(tasks[number].support) for number in (0, 0, 1))
    for name, pool in method.named_parameters():
        assert torch.equal(own[name], again[name])
        assert set(own[name].flatten().tolist()) <= set(pool.flatten().tolist())
        if ".norms." in name:
            assert torch.equal(own[name], pool)  # ones and zeros stay
        elif pool.dim() > 1:
            assert not torch.equal(own[name], other[name])
    weights = own["backbone.linears.0.weight"]  # uniform between the bounds of PyTorch's draw
    assert weights.std().item() == pytest.approx(method.backbone.linears[0].weight.std().item(), rel=0.1)  # type: ignore


def test_frozen_weights_stay() -> None:
    frozen = nn.Linear(6, 6)
    frozen.requires_grad_(False)
    task = batch()[0]
    method = built(task, nn.Sequential(frozen, MLP([5])), adapts="all", start="scratch")
    assert not any(own.startswith("backbone.0.") for own in {*method.adapted, *method.draw(task.support)})


def test_the_cosine_head() -> None:
    task = batch()[0]
    method = built(task, head="cosine", scale=3.0, steps=0)
    weights = part("head.", method.draw(task.support))
    torch.testing.assert_close(weights["norms"], weights["weight"].norm(dim=1))  # so that it starts as a linear layer
    z = torch.randn(4, 5, dtype=torch.float64)
    logits = functional_call(method.head, weights, (z,))
    torch.testing.assert_close(logits, 3 * (z / z.norm(dim=1, keepdim=True)) @ weights["weight"].T)
    torch.testing.assert_close(functional_call(method.head, weights, (7 * z,)), logits)
    longer = {"weight": 2 * weights["weight"], "norms": weights["norms"]}
    torch.testing.assert_close(functional_call(method.head, longer, (z,)), logits)

    plain = built(task, head="cosine", scale=3.0, learned_norms=False)
    cosines = functional_call(plain.head, {"weight": weights["weight"]}, (z,)) / 3
    torch.testing.assert_close(cosines, F.cosine_similarity(z[:, None], weights["weight"][None], dim=-1))
    assert set(plain.adapted) == {"head.weight"}


@pytest.mark.parametrize("name", KINDS)
def test_tasks_of_any_way(name: str) -> None:
    method = built(batch(3)[0], **KINDS[name])
    for way in (2, 5):
        task = batch(way)[0]
        method.check(task)
        assert method.predict(method.adapt(task.support), task.query_x).shape == (4 * way, way)


@pytest.mark.parametrize("name", KINDS)
def test_support_statistics_make_predictions_independent(name: str) -> None:
    task = batch()[0]
    method = built(task, MLP([8, 5], batch_norm=True), norm="support", **KINDS[name])
    state = method.adapt(task.support)
    alone = torch.cat([method.predict(state, x[None]) for x in task.query_x])
    torch.testing.assert_close(method.predict(state, task.query_x), alone)


@pytest.mark.parametrize("name", KINDS)
def test_loop_vmap_and_chunks_are_equal(name: str) -> None:
    tasks = batch()
    models = Models([built(tasks[0], MLP([5], batch_norm=True), steps=2, **KINDS[name])])
    measures = scored(models, tasks, LOOP)
    for chunk in (TASKS, 2):
        torch.testing.assert_close(scored(models, tasks, chunk), measures)
    if name == "scratch":
        torch.testing.assert_close(scored(models, tasks, TASKS, traced=True), measures)
        assert all(program.__name__ == "program" for program in models._programs.values())


@pytest.mark.parametrize("adapts", ["head", "all"])
def test_regression(adapts: str) -> None:
    task = waves()
    method = built(task, MLP([20, 20]), optimizer=SGD(0.05), adapts=adapts)

    def error(steps: int) -> Tensor:
        method.set_test_steps(steps)
        return F.mse_loss(method.eval().predict(method.adapt(task.support), task.support_x), task.support_y)

    assert error(50) < error(0)
    with pytest.raises(RecipeError, match="use head: linear"):
        built(task, head="cosine")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "zero or more inner steps, not -1"),
        ({"batch": 0}, "at least one example, not 0"),
        ({"norm": "joint"}, "norm batch or support, not 'joint'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        FineTune(MLP([4]), SGD(0.1), **settings)
