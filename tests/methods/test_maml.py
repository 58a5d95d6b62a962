"""Laws of MAML: what is differentiated, what adapts, what stays."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers import loss_of, single
from torch import Tensor, nn

from quickstudy.errors import RecipeError
from quickstudy.methods import MAML, ProtoNet, gradient
from quickstudy.nn import MLP, Conv4
from quickstudy.task import Task


def classes(way: int = 3, shot: int = 2, queries: int = 4, size: tuple[int, ...] = (6,)) -> Task:
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> Tensor:
        return torch.randn(count, *size, dtype=torch.float64, generator=generator)

    labels = torch.arange(way)
    return Task(
        images(way * shot),
        labels.repeat_interleave(shot),
        images(way * queries),
        labels.repeat_interleave(queries),
        way,
    )


def waves() -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(15, 1, dtype=torch.float64, generator=generator) * 10 - 5
    y = torch.sin(x)
    return Task(x[:5], y[:5], x[5:], y[5:])


def built(task: Task, backbone: nn.Module, **settings) -> MAML:
    torch.manual_seed(0)
    return MAML(backbone, **settings).build(single(task)).double()


class Pass(nn.Module):
    """An embedding without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def graph(root: Tensor) -> Counter[str]:
    """Count the nodes of an autograd graph by name."""
    assert root.grad_fn is not None
    seen, todo = set(), [root.grad_fn]
    names: Counter[str] = Counter()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            names[node.name()] += 1
            todo += [parent for parent, _ in node.next_functions if parent is not None]
    return names


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_order_of_differentiation_shows_in_the_graph(steps: int) -> None:
    """Second order has one double-backward of the loss for every inner step; first order has none, and is smaller."""
    task = classes()
    count = {}
    size = {}
    for order in (1, 2):
        names = graph(built(task, Pass(), steps=steps, order=order).loss(task))
        count[order] = sum(number for name, number in names.items() if "NllLossBackwardBackward" in name)
        size[order] = names.total()
    assert count == {1: 0, 2: steps}
    assert size[2] > size[1] if steps else size[2] == size[1]


def test_closed_form_on_a_quadratic() -> None:
    """With a linear learner and squared error, meta-gradient = (I - lr H) grad of the query loss, or without H."""
    torch.manual_seed(0)
    x, y, qx, qy = (torch.randn(*shape, dtype=torch.float64) for shape in [(7, 4), (7, 1), (9, 4), (9, 1)])
    task = Task(x, y, qx, qy)
    lr = 0.05
    design, query = (torch.cat([z, torch.ones(len(z), 1).double()], 1) for z in (x, qx))
    hessian = 2 * design.T @ design / len(x)
    for order in (1, 2):
        method = built(task, Pass(), inner_lr=lr, steps=1, order=order)
        start = torch.cat([method.head.weight[0], method.head.bias]).detach()
        adapted = start - lr * (2 * design.T @ (design @ start - y[:, 0]) / len(x))
        slope = 2 * query.T @ (query @ adapted - qy[:, 0]) / len(qx)
        expected = slope - lr * hessian @ slope if order == 2 else slope
        method.loss(task).backward()
        mine = torch.cat([method.head.weight.grad[0], method.head.bias.grad])  # type: ignore[index]
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("task", [classes(), waves()], ids=["classes", "waves"])
@pytest.mark.parametrize("adapts", ["all", "head", "body"])
@pytest.mark.parametrize("norm", ["batch", "support"])
def test_second_order_meta_gradient_against_finite_differences(task: Task, adapts: str, norm: str) -> None:
    network = nn.Sequential(MLP([5, 4], batch_norm=task.way is not None), nn.Tanh())
    method = built(task, network, inner_lr=0.1, steps=2, adapts=adapts, norm=norm)
    names = [name for name, _ in method.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        def run(method: MAML) -> Tensor:
            return method.loss(task)

        from quickstudy.engine.models import _Bound

        swapped = {f"method.{name}": value for name, value in zip(names, values)}
        return torch.func.functional_call(_Bound(method), swapped, (lambda m, t: m.loss(t), task))

    values = [p.detach().clone().requires_grad_() for p in method.parameters()]
    assert torch.autograd.gradcheck(loss, values, eps=1e-7, atol=1e-5)


def test_first_order_is_the_gradient_at_the_adapted_weights() -> None:
    task = classes()
    method = built(task, MLP([5], batch_norm=True), steps=3, order=1, inner_lr=0.2)
    method.loss(task).backward()
    state = method.adapt(task.support)
    weights = {name: weight.detach().requires_grad_() for name, weight in state.weights.items()}
    loss = F.cross_entropy(method.predict(state._replace(weights=weights), task.query_x), task.query_y)
    expected = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_orders_differ_unless_the_step_is_zero() -> None:
    task = classes()

    def meta_gradient(order: int, inner_lr: float) -> Tensor:
        method = built(task, MLP([5]), steps=2, order=order, inner_lr=inner_lr)
        method.loss(task).backward()
        return torch.cat([p.grad.flatten() for p in method.parameters()])  # type: ignore[union-attr]

    torch.testing.assert_close(meta_gradient(1, 0.0), meta_gradient(2, 0.0))
    assert (meta_gradient(1, 0.3) - meta_gradient(2, 0.3)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("adapts", "moves"), [("all", {"backbone", "head"}), ("head", {"head"}), ("body", {"backbone"})]
)
def test_what_adapts(adapts: str, moves: set[str]) -> None:
    task = classes()
    method = built(task, MLP([5]), steps=1, adapts=adapts)
    weights = method.adapt(task.support).weights
    assert {name.split(".")[0] for name in weights} == moves
    own = dict(method.named_parameters())
    assert all(not torch.equal(weight, own[name]) for name, weight in weights.items())


def test_steps_in_training_and_in_test() -> None:
    task = classes()
    method = built(task, Pass(), steps=1, test_steps=4, inner_lr=0.5)
    trained = method.train().adapt(task.support).weights["head.weight"]
    tested = method.eval().adapt(task.support).weights["head.weight"]
    longer = built(task, Pass(), steps=4, inner_lr=0.5).adapt(task.support).weights["head.weight"]
    torch.testing.assert_close(tested, longer)
    assert not torch.allclose(trained, tested)


def test_clip_bounds_each_element_of_a_step() -> None:
    task = classes()
    method = built(task, MLP([5]), steps=1, inner_lr=1.0, clip=1e-3)
    own = dict(method.named_parameters())
    for name, weight in method.adapt(task.support).weights.items():
        assert (weight - own[name]).abs().max() <= 1e-3 + 1e-12


def test_support_statistics_make_predictions_independent() -> None:
    task = classes(size=(1, 16, 16))
    method = built(task, Conv4(channels=4), norm="support", steps=2).eval()
    with torch.no_grad():
        state = method.adapt(task.support)
        together = method.predict(state, task.query_x)
        alone = torch.cat([method.predict(state, x[None]) for x in task.query_x])
    torch.testing.assert_close(together, alone)


def test_adaptation_lowers_the_support_loss_even_without_gradients_outside() -> None:
    task = waves()
    method = built(task, MLP([20, 20]), steps=5, inner_lr=0.01)
    with torch.no_grad():
        before = F.mse_loss(method(task.support_x), task.support_y)
        after = F.mse_loss(method.predict(method.adapt(task.support), task.support_x), task.support_y)
    assert after < before
    assert not after.requires_grad


def test_gradient_of_weights_that_do_not_matter_is_zero() -> None:
    weights = {"used": torch.ones(2, requires_grad=True), "unused": torch.ones(3, requires_grad=True)}
    for second_order in (True, False):
        found = gradient(lambda w: w["used"].square().sum(), weights, second_order=second_order)
        assert found["unused"].tolist() == [0, 0, 0]
        assert found["used"].tolist() == [2, 2]
        assert found["used"].requires_grad == second_order


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(RecipeError, match="norm batch or support, not 'joint'"):
        MAML(Pass(), norm="joint")
    with pytest.raises(RecipeError, match="inner steps"):
        MAML(Pass(), steps=-1)


@pytest.mark.parametrize("order", [1, 2])
def test_frozen_parameters_stay_as_they_are(order: int) -> None:
    task = classes()
    frozen = nn.Linear(6, 6)
    frozen.requires_grad_(False)
    method = built(task, nn.Sequential(frozen, nn.BatchNorm1d(6, affine=False), nn.ReLU()), order=order, inner_lr=0.1)
    assert set(method.adapt(task.support).weights) == {"head.weight", "head.bias"}
    method.loss(task).backward()
    assert frozen.weight.grad is None
    assert method.head.weight.grad is not None


# ---------------------------------------------------------------------- Meta-SGD: learned inner rates


@pytest.mark.parametrize("learned", ["layer", "weight"])
def test_learned_rates_start_as_the_fixed_one(learned: str) -> None:
    task = classes()
    settings = {"steps": 2, "inner_lr": 0.3, "clip": 0.2}
    plain, method = (built(task, MLP([5]), inner_lr_learned=how, **settings) for how in ("none", learned))
    torch.testing.assert_close(method.adapt(task.support), plain.adapt(task.support))
    shapes = {name: tuple(weight.shape) if learned == "weight" else () for name, weight in method.initial.items()}
    assert {name: tuple(rate.shape) for name, rate in method.rates().items()} == shapes
    assert all(isinstance(rate, nn.Parameter) for rate in method.rates().values())


@pytest.mark.parametrize("adapts", ["all", "head", "body"])
def test_a_rate_is_of_its_own_weight(adapts: str) -> None:
    """Doubled, it doubles the step of that weight, and no other."""
    task = classes()
    method = built(task, MLP([5]), steps=1, inner_lr=0.3, inner_lr_learned="weight", adapts=adapts)
    before, start = method.adapt(task.support).weights, method.initial
    for name, rate in method.rates().items():
        with torch.no_grad():
            rate *= 2
        after = method.adapt(task.support).weights
        with torch.no_grad():
            rate /= 2
        for other in before:
            factor = 2 if other == name else 1
            torch.testing.assert_close(after[other] - start[other], factor * (before[other] - start[other]))


@pytest.mark.parametrize("order", [1, 2])
def test_the_slope_of_a_rate_is_the_product_of_two_gradients(order: int) -> None:
    """Of one step: minus the support gradient before it, times the query gradient after it."""
    task = classes()
    method = built(task, MLP([5]), steps=1, inner_lr=0.3, inner_lr_learned="weight", order=order)
    support = torch.autograd.grad(
        F.cross_entropy(method(task.support_x), task.support_y), list(method.initial.values())
    )
    state = method.adapt(task.support)
    weights = {name: weight.detach().requires_grad_() for name, weight in state.weights.items()}
    query = torch.autograd.grad(
        F.cross_entropy(method.predict(state._replace(weights=weights), task.query_x), task.query_y),
        list(weights.values()),
    )
    method.loss(task).backward()
    for rate, before, after in zip(method.inner_lrs, support, query):
        torch.testing.assert_close(rate.grad, -before * after)


@pytest.mark.parametrize("learned", ["layer", "weight"])
def test_rates_are_drawn_as_one_value(learned: str) -> None:
    rates = []
    for seed in range(5):
        torch.manual_seed(seed)
        method = MAML(MLP([5]), inner_lr_learned=learned, inner_lr_range=(0.005, 0.1)).build(single(classes()))
        values = torch.cat([rate.detach().flatten() for rate in method.rates().values()])  # type: ignore[union-attr]
        assert (values == values[0]).all()
        rates.append(values[0].item())
    assert len(set(rates)) == 5
    assert all(0.005 <= rate <= 0.1 for rate in rates)


# ---------------------------------------------------------------------- ProtoMAML: a head of prototypes


def test_without_a_step_a_head_of_prototypes_is_protonet() -> None:
    task = classes(shot=3)
    method = built(task, MLP([5]), steps=0, head_start="prototypes")
    theirs = ProtoNet(method.backbone).build(task).double()
    ours = method.predict(method.adapt(task.support), task.query_x).log_softmax(-1)
    torch.testing.assert_close(ours, theirs.predict(theirs.adapt(task.support), task.query_x).log_softmax(-1))
    torch.testing.assert_close(method.loss(task), theirs.loss(task))
    names = [name for name, p in method.named_parameters() if p.requires_grad]
    assert names == [name for name, _ in theirs.named_parameters()]  # no head is meta-learned
    slopes = [torch.autograd.grad(m.loss(task), list(method.backbone.parameters())) for m in (method, theirs)]
    torch.testing.assert_close(slopes[0], slopes[1])


@pytest.mark.parametrize("adapts", ["all", "head"])
def test_a_step_from_prototypes_by_hand(adapts: str) -> None:
    """The head starts as a function of the backbone, and inside the task the two are separate weights."""
    task = classes(shot=2)
    method = built(task, MLP([5]), steps=1, inner_lr=0.1, head_start="prototypes", adapts=adapts)
    linear = method.backbone.linears[0]  # type: ignore[index]
    body = [linear.weight.detach().requires_grad_(), linear.bias.detach().requires_grad_()]
    means = F.relu(F.linear(task.support_x, *body)).view(3, 2, -1).mean(1).detach()
    head = [(2 * means).requires_grad_(), (-(means**2).sum(1)).requires_grad_()]
    loss = F.cross_entropy(F.linear(F.relu(F.linear(task.support_x, *body)), *head), task.support_y)
    slopes = torch.autograd.grad(loss, [*body, *head])
    rates = [0.1 if adapts == "all" else 0.0] * 2 + [0.1] * 2
    body0, body1, head0, head1 = (w - rate * g for w, rate, g in zip([*body, *head], rates, slopes))
    expected = F.linear(F.relu(F.linear(task.query_x, body0, body1)), head0, head1)
    torch.testing.assert_close(method.predict(method.adapt(task.support), task.query_x), expected)


def test_a_head_of_prototypes_takes_tasks_of_any_way() -> None:
    method = built(classes(3), MLP([5]), head_start="prototypes")
    for way in (2, 3, 7):
        task = classes(way)
        method.check(task)
        assert method.predict(method.adapt(task.support), task.query_x).shape == (4 * way, way)
    with pytest.raises(RecipeError, match="built for 3-way tasks"):
        built(classes(3), MLP([5]), head_start="prototypes", inner_lr_learned="weight").check(classes(2))


@pytest.mark.parametrize(
    "settings",
    [
        {"inner_lr_learned": "layer"},
        {"inner_lr_learned": "weight"},
        {"inner_lr_learned": "layer", "head_start": "prototypes"},
        {"head_start": "prototypes", "norm": "support"},
        {"head_start": "prototypes", "adapts": "head"},
    ],
    ids=str,
)
def test_meta_gradient_of_the_relatives_against_finite_differences(settings: dict) -> None:
    task = classes(size=(4,))
    method = built(task, nn.Sequential(MLP([4, 3], batch_norm=True), nn.Tanh()), inner_lr=0.1, steps=2, **settings)
    values = [p.detach().clone().requires_grad_(p.requires_grad) for p in method.parameters()]
    assert torch.autograd.gradcheck(loss_of(method, task), values, eps=1e-7, atol=1e-5, fast_mode=True)


def test_relatives_that_make_no_sense() -> None:
    with pytest.raises(RecipeError, match="set inner_lr_learned"):
        MAML(Pass(), inner_lr_range=(0.1, 0.2))
    with pytest.raises(RecipeError, match="for heads that adapt"):
        MAML(Pass(), head_start="prototypes", adapts="body")
    with pytest.raises(RecipeError, match="regression"):
        built(waves(), MLP([5]), head_start="prototypes").loss(waves())
