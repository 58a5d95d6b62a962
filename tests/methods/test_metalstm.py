"""Laws of the LSTM meta-learner: what its gates do, what is constant, whose statistics queries get."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, loss_of, scored, single
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from quickstudy.engine.models import LOOP, Models
from quickstudy.errors import RecipeError
from quickstudy.methods import MAML, MetaLSTM, Method, metalstm
from quickstudy.methods.inner import Weights, value_and_gradient
from quickstudy.methods.metalstm import preprocess
from quickstudy.nn import MLP, BatchNorm, Conv4, recorded
from quickstudy.task import Support, Task

TASKS = 3


def batch(seed: int = 0, size: tuple[int, ...] = (1, 16, 16)) -> Task:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3)

    def images(count: int) -> Tensor:
        return torch.rand(TASKS, count, *size, dtype=torch.float64, generator=generator)

    support, query = (labels.repeat_interleave(n).expand(TASKS, -1) for n in (2, 3))
    return Task(images(6), support, images(9), query, 3)


def waves() -> Task:
    x = torch.linspace(-2, 2, 15, dtype=torch.float64)[:, None]
    return Task(x[::3], x[::3].sin(), x, x.sin())


def built(make, task: Task, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    return make().build(single(task)).double()


def lively(method: Method) -> Method:
    """Make the gates vary and the steps large, so that everything has an influence that shows."""
    with torch.no_grad():
        for weight in (method.W_F, method.W_I):
            weight.mul_(50)
        method.b_F.fill_(2)
        method.b_I.fill_(-1)
    return method


def constant(method: Method, keep: float, rate: float) -> Method:
    """Hold the gates constant: before their sigmoids at ``keep``, and with an input gate of ``rate``."""
    with torch.no_grad():
        method.W_F.zero_()
        method.W_I.zero_()
        method.b_F.fill_(keep)
        method.b_I.fill_(math.log(rate / (1 - rate)))
    return method


def nodes(root: Tensor) -> Counter[str]:
    """Count the nodes of an autograd graph by name."""
    seen, todo = set(), [root.grad_fn]
    names: Counter[str] = Counter()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names[node.name()] += 1
            todo += [parent for parent, _ in node.next_functions]
    return names


def test_preprocessing() -> None:
    x = torch.tensor([1.0, -1.0, 0.0, math.exp(-10), -math.exp(-10), 1e-6, -1e-6], dtype=torch.float64)
    edge = math.log(math.exp(-10) + 1e-8) / 10
    magnitude, sign = preprocess(x)
    expected = torch.tensor([1e-9, 1e-9, -1, edge, edge, -1, -1], dtype=torch.float64)
    torch.testing.assert_close(magnitude, expected, rtol=1e-12, atol=1e-15)
    small = math.exp(10) * 1e-6
    torch.testing.assert_close(sign, torch.tensor([1, -1, 0, 1, -1, small, -small], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preprocessing_is_finite_everywhere_and_so_is_its_slope(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-38, 1e-8, -1e-8, largest, -largest], dtype=dtype, requires_grad=True)
    y = preprocess(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert slope.isfinite().all()
    assert y.dtype == dtype


@pytest.mark.parametrize("norm", ["support", "batch"])
def test_constant_gates_are_gradient_descent(norm: str) -> None:
    task = batch()[0]
    method = built(lambda: MetaLSTM(Conv4(4), steps=3, divide_by_batch=False, norm=norm), task)
    constant(method, keep=1e3, rate=0.1)
    maml = built(lambda: MAML(Conv4(4), inner_lr=0.1, steps=3, order=1), task)
    maml.load_state_dict({name: weight for name, weight in method.state_dict().items() if name in maml.state_dict()})
    torch.testing.assert_close(method.adapt(task.support).weights, maml.adapt(task.support).weights)
    torch.testing.assert_close(method.loss(task), maml.loss(task))


@pytest.mark.parametrize("divide", [True, False])
def test_constant_gates_are_stochastic_gradient_descent_over_minibatches(divide: bool) -> None:
    task = batch()[0]
    method = built(lambda: MetaLSTM(MLP([5]), steps=2, batch_size=4, divide_by_batch=divide), task)
    constant(method, keep=1e3, rate=0.1)
    weights = method.learner
    for part in [slice(0, 4), slice(4, 6)] * 2:  # the last batch of a pass is the smaller
        loss = F.cross_entropy(functional_call(method, weights, (task.support_x[part],)), task.support_y[part])
        slopes = torch.autograd.grad(loss, list(weights.values()))
        rate = 0.1 / (part.stop - part.start) if divide else 0.1
        weights = {name: weight - rate * slope for (name, weight), slope in zip(weights.items(), slopes)}
    torch.testing.assert_close(method.adapt(task.support).weights, weights)


def test_a_forget_gate_shrinks_the_initial_weights_and_their_gradient() -> None:
    task = batch()[0]
    method = built(lambda: MetaLSTM(MLP([5]), steps=4), task)
    constant(method, keep=1.5, rate=0.2)
    state = method.adapt(task.support)
    ends = {name: weight.detach().requires_grad_() for name, weight in state.weights.items()}
    loss = F.cross_entropy(method.predict(state._replace(weights=ends), task.query_x), task.query_y)
    slopes = torch.autograd.grad(loss, list(ends.values()))
    method.loss(task).backward()
    for name, slope in zip(ends, slopes):
        assert slope.abs().max() > 0
        torch.testing.assert_close(method.get_parameter(name).grad, torch.sigmoid(method.b_F.detach()) ** 4 * slope)


def test_the_first_cell_state_is_the_learner() -> None:
    """Its parameters are there once, and none of the support set's passes is in the graph."""
    task = batch()[0]
    method = built(lambda: MetaLSTM(Conv4(4), steps=3), task)
    own = sum(p.numel() for p in method.learner.values())
    assert sum(p.numel() for p in method.parameters()) == own + 2080 + 2 * 22 + 2
    names = nodes(method.loss(task))
    assert not [name for name in names if "BackwardBackward" in name]
    assert names["ConvolutionBackward0"] == 4  # of the query pass
    assert names["NllLossBackward0"] == 1
    method.loss(task).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_published_sizes() -> None:
    torch.manual_seed(0)
    images = torch.rand(5, 3, 84, 84)
    task = Task(images, torch.arange(5), images, torch.arange(5), 5)
    method = MetaLSTM(Conv4(32, eps=1e-3)).build(task)
    assert sum(p.numel() for p in method.learner.values()) == 32901
    assert sum(p.numel() for p in method.parameters()) == 35027


def test_unflatten_is_the_inverse_of_the_order_of_the_weights() -> None:
    method = built(lambda: MetaLSTM(Conv4(4)), batch()[0])
    flat = torch.cat([weight.flatten() for weight in method.learner.values()])
    torch.testing.assert_close(method.unflatten(flat), method.learner, rtol=0, atol=0)


@pytest.mark.parametrize("gates", ["wide", "narrow"])
def test_initial_gates(gates: str) -> None:
    torch.manual_seed(0)
    drawn = [MetaLSTM(nn.Flatten(), gates=gates) for _ in range(100)]
    first = torch.cat([p.flatten() for method in drawn for p in method.lstm.parameters()]).abs().max().item()
    second = torch.stack([p for method in drawn for p in (method.W_F, method.W_I)]).abs().max().item()
    forget, input_ = (torch.stack([getattr(method, name) for method in drawn]) for name in ("b_F", "b_I"))
    bound = 20**-0.5 if gates == "wide" else 0.01
    assert first == pytest.approx(bound, rel=1e-2)
    assert second == pytest.approx(0.01, rel=1e-2)
    assert forget.min() >= 4
    assert forget.max().item() == pytest.approx(6 if gates == "wide" else 5, abs=0.1)
    assert input_.min() >= -5
    assert input_.max() <= -4


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (5, 3)), (nn.BatchNorm2d, (2, 3, 4, 4))])
def test_unbiased_statistics_are_what_torch_averages(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    x, theirs = torch.randn(*shape), kind(3, momentum=1.0)
    theirs(x)
    with recorded(unbiased=True) as statistics:
        BatchNorm(3)(x)
    torch.testing.assert_close(statistics[0], (theirs.running_mean, theirs.running_var))


def test_running_statistics_are_those_of_torch() -> None:
    task = batch()[0]
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    method = lively(built(lambda: MetaLSTM(network, steps=3, batch_size=4, momentum=0.7), task)).eval()
    mean, variance = torch.zeros(4).double(), torch.ones(4).double()
    conv = {name: method.learner[f"backbone.0.{name}"] for name in ("weight", "bias")}
    parts = [task.support_x[:4], task.support_x[4:]] * 3
    for part, step in zip(parts, method.inner_steps(task.support)):
        F.batch_norm(F.conv2d(part, **conv), mean, variance, training=True, momentum=0.7)
        conv = {name: method.unflatten(step.weights.detach())[f"backbone.0.{name}"] for name in ("weight", "bias")}
    torch.testing.assert_close(method.adapt(task.support).statistics, [(mean, variance)])


def test_running_statistics_start_afresh_in_each_task() -> None:
    tasks = batch()
    method = built(lambda: MetaLSTM(Conv4(4), steps=2), tasks[0]).eval()
    alone = method.adapt(tasks[1].support)
    method.train().loss(tasks[0])
    method.eval().adapt(tasks[0].support)
    torch.testing.assert_close(method.adapt(tasks[1].support), alone, rtol=0, atol=0)


def test_queries_are_predicted_on_their_own_in_evaluation_and_together_in_training() -> None:
    task = batch()[0]
    method = lively(built(lambda: MetaLSTM(Conv4(4), steps=2), task))
    assert method.adapt(task.support).statistics is None
    method.eval()
    for steps in (2, 0):
        method.set_test_steps(steps)
        with torch.no_grad():
            state = method.adapt(task.support)
            together = method.predict(state, task.query_x)
            alone = torch.cat([method.predict(state, x[None]) for x in task.query_x])
        torch.testing.assert_close(together, alone)
    method.set_norm("batch")
    state = method.adapt(task.support)
    assert state.statistics is None
    assert not torch.allclose(method.predict(state, task.query_x)[:2], method.predict(state, task.query_x[:2]))


def test_evaluation_may_take_another_number_of_steps() -> None:
    task = batch()[0]
    method = built(lambda: MetaLSTM(MLP([5]), steps=1, test_steps=3), task)
    trained = method.adapt(task.support).weights
    tested = method.eval().adapt(task.support).weights
    method.train().steps = 3
    longer = method.adapt(task.support).weights
    torch.testing.assert_close(tested, longer)
    assert not torch.allclose(trained["head.weight"], tested["head.weight"])


def test_adaptation_lowers_the_loss_of_regression_too() -> None:
    task = waves()
    method = constant(built(lambda: MetaLSTM(MLP([20]), steps=20, divide_by_batch=False), task), keep=1e3, rate=0.05)
    method.eval()
    with torch.no_grad():
        before = F.mse_loss(method(task.query_x), task.query_y)
        after = F.mse_loss(method.predict(method.adapt(task.support), task.query_x), task.query_y)
    assert after < 0.5 * before
    assert not after.requires_grad


def test_frozen_parameters_stay_as_they_are() -> None:
    task = batch()[0]
    frozen = nn.Linear(256, 6)
    frozen.requires_grad_(False)
    method = built(lambda: MetaLSTM(nn.Sequential(nn.Flatten(), frozen, nn.ReLU()), steps=2), task)
    assert set(method.adapt(task.support).weights) == {"head.weight", "head.bias"}
    method.loss(task).backward()
    assert frozen.weight.grad is None


@pytest.mark.parametrize("batch_size", [None, 3])
def test_meta_gradient_against_finite_differences(batch_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The true derivative, where inner losses and gradients are the constants that they are taken for."""
    task = batch(size=(5,))[0]
    network = nn.Sequential(MLP([4], batch_norm=True), nn.Tanh())
    method = lively(built(lambda: MetaLSTM(network, hidden=3, steps=2, batch_size=batch_size), task))
    found: list[tuple] = []

    def record(*arguments, **options) -> tuple:
        found.append(value_and_gradient(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(metalstm, "value_and_gradient", record)
    method.loss(task).backward()
    assert len(found) == (2 if batch_size is None else 4)

    of_parameters = loss_of(method, task)

    def loss(*values: Tensor) -> Tensor:
        constants = iter(found)
        monkeypatch.setattr(metalstm, "value_and_gradient", lambda *_, **__: next(constants))
        return of_parameters(*values)

    values = [p.detach().clone().requires_grad_() for p in method.parameters()]
    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-7)
    mine = torch.autograd.grad(loss(*values), values)
    torch.testing.assert_close(mine, tuple(p.grad for p in method.parameters()))


METHODS = {
    "conv, support statistics": lambda: MetaLSTM(Conv4(4, blocks=2, eps=1e-3), hidden=4, steps=2),
    "mlp, minibatches": lambda: MetaLSTM(MLP([8], batch_norm=True), hidden=4, steps=1, batch_size=3, norm="batch"),
    "mlp, no batch norms": lambda: MetaLSTM(MLP([8]), hidden=4, steps=1, test_steps=0, divide_by_batch=False),
}


def results(models: Models, tasks: Task, chunk: int, traced: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """Losses and meta-gradients in training, losses and accuracies in evaluation."""
    return *gradients(models, tasks, chunk, traced), scored(models, tasks, chunk, traced)


@pytest.mark.parametrize("name", METHODS)
def test_loop_vmap_chunks_and_traces_are_equal(name: str) -> None:
    tasks = batch()
    models = Models([lively(built(METHODS[name], tasks[0]))])
    expected = results(models, tasks, LOOP, traced=False)
    for chunk, traced in ((TASKS, False), (2, False), (LOOP, True), (TASKS, True)):
        torch.testing.assert_close(results(models, tasks, chunk, traced), expected)
    assert all(
        hasattr(program, "__closure__") and program.__name__ == "program" for program in models._programs.values()
    )


@pytest.mark.parametrize("name", METHODS)
def test_stacked_seeds_equal_each_alone(name: str) -> None:
    streams = [batch(seed) for seed in range(2)]
    methods = [lively(built(METHODS[name], stream[0], seed)) for seed, stream in enumerate(streams)]
    stacked = Task.stack(streams)
    together = results(Models(methods), stacked, 2, traced=name == "mlp, minibatches")
    for i, (method, stream) in enumerate(zip(methods, streams)):
        alone = results(Models([method]), stream, LOOP, traced=False)
        torch.testing.assert_close(together[0][i], alone[0])
        torch.testing.assert_close([gradient[i] for gradient in together[1]], alone[1])
        torch.testing.assert_close(together[2][i], alone[2])


@pytest.mark.parametrize("chunk", [LOOP, TASKS])
def test_half_precision_is_for_the_learner_alone(chunk: int) -> None:
    tasks = single(batch())
    method = constant(built(METHODS["conv, support statistics"], tasks[0]).float(), keep=6.0, rate=1e-3)
    start = torch.cat([weight.flatten() for weight in method.learner.values()]).detach()

    def ends(method: Method, task: Task) -> Tensor:
        *_, last = method.inner_steps(task.support)
        return last.weights

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = torch.cat(list(Models([method]).run(ends, tasks, chunk)))
    assert found.dtype == torch.float32
    shrunk = torch.sigmoid(torch.tensor(6.0)) ** 2 * start
    assert (found - shrunk).abs().max() < 1e-3  # what two steps add
    kept = start.abs() > 0.1
    moved = (found / start)[:, kept].median()
    torch.testing.assert_close(moved, torch.sigmoid(torch.tensor(6.0)) ** 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("second_order", [True, False])
def test_value_and_gradient(second_order: bool) -> None:
    def loss(weights: Weights, x: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        return (weights["a"] ** 3 * x).sum(), {"extra": [weights["a"] * x]}

    def one(a: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        value, gradient, extra = value_and_gradient(lambda w: loss(w, x), {"a": a}, second_order=second_order)
        return value, gradient["a"], extra["extra"][0]

    a, x = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([[3.0, 5.0], [7.0, 11.0]])
    looped = [torch.stack(parts) for parts in zip(*(one(a, row) for row in x))]
    mapped = vmap(one, (None, 0))(a, x)
    for results in (looped, mapped):
        value, gradient, extra = results
        torch.testing.assert_close(value, (a**3 * x).sum(1))
        torch.testing.assert_close(gradient, 3 * a**2 * x)
        torch.testing.assert_close(extra, a * x)
        assert [result.requires_grad for result in results] == [second_order] * 3
        if second_order:
            slope = torch.autograd.grad(value.sum() + gradient.sum() + extra.sum(), a)[0]
            torch.testing.assert_close(slope, ((3 * a**2 + 6 * a + 1) * x).sum(0))
    nested = grad(lambda a: one(a, x[0])[1].sum())(a.detach())
    torch.testing.assert_close(nested, 6 * a.detach() * x[0] * second_order)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "joint"}, "norm support or batch, not 'joint'"),
        ({"steps": 0}, "at least one pass"),
        ({"test_steps": -1}, "at least one pass"),
        ({"hidden": 0}, "hidden unit"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"momentum": 0.0}, "momentum 0.0"),
        ({"momentum": 1.5}, "momentum 1.5"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        MetaLSTM(nn.Flatten(), **settings)


def test_batches_keep_the_order_of_the_support_set() -> None:
    task = batch(size=(4,))[0]
    method = lively(built(lambda: MetaLSTM(nn.Flatten(), steps=1, batch_size=2), task))
    turned = Support(task.support_x.flip(0), task.support_y.flip(0), task.way)
    assert len(list(method.inner_steps(task.support))) == 3
    forth, back = (method.adapt(support).weights["head.weight"] for support in (task.support, turned))
    assert not torch.allclose(forth, back)
    method.batch_size = 100
    forth, back = (method.adapt(support).weights["head.weight"] for support in (task.support, turned))
    torch.testing.assert_close(forth, back)
