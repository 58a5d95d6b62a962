"""Laws of OP-LSTM: order is of no influence, true errors make it gradient descent, every option is what it says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, loss_of, scored, single
from torch import Tensor, nn

from quickstudy.engine.models import LOOP, Models
from quickstudy.errors import RecipeError
from quickstudy.methods import MAML, OPLSTM
from quickstudy.methods.oplstm import Layer
from quickstudy.nn import MLP, Conv4, CoordinateLSTM
from quickstudy.task import Support, Task

TASKS = 3


def batch(seed: int = 0, size: tuple[int, ...] = (6,), shot: int = 2) -> Task:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3)

    def images(count: int) -> Tensor:
        return torch.randn(TASKS, count, *size, dtype=torch.float64, generator=generator)

    support, query = (labels.repeat_interleave(n).expand(TASKS, -1) for n in (shot, 3))
    return Task(images(3 * shot), support, images(9), query, 3)


def waves(seed: int = 0, shot: int = 5, targets: int = 1) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x, qx = (torch.rand(TASKS, n, 1, dtype=torch.float64, generator=generator) * 4 - 2 for n in (shot, 7))
    shifts = torch.arange(targets) + torch.arange(TASKS)[:, None, None]
    return Task(x, torch.sin(x + shifts), qx, torch.sin(qx + shifts))


def built(task: Task, backbone: nn.Module, seed: int = 0, **settings) -> OPLSTM:
    torch.manual_seed(seed)
    method = OPLSTM(backbone, **settings).build(single(task)).double()
    for norm in getattr(backbone, "norms", []):  # so that their weights matter
        if not isinstance(norm, nn.Identity):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return method


def matrices(method: OPLSTM, support: Support) -> list[Tensor]:
    return [layer.matrix for layer in method.adapt(support).layers]


KINDS = {
    "sine": (waves()[0], lambda: MLP([7, 6]), {}),
    "wide": (waves(shot=2)[0], lambda: MLP([40, 40]), {"steps": 2}),
    "norms": (batch()[0], lambda: MLP([7, 6], batch_norm=True), {}),
    "norms, gamma": (batch()[0], lambda: MLP([7], batch_norm=True), {"gamma": 0.3, "adapts_bias": True}),
    "norms, otherwise": (
        batch()[0],
        lambda: MLP([7], batch_norm=True),
        {"activations": "output", "norm_scale": "mean"},
    ),
    "head": (batch()[0], lambda: MLP([7, 6], batch_norm=True), {"adapts": "head", "gamma": 0.3, "bias": "class"}),
    "head, images": (batch(size=(1, 8, 8))[0], lambda: Conv4(3, blocks=2), {"adapts": "head"}),
}


def kind(name: str, **settings) -> tuple[Task, OPLSTM]:
    task, backbone, own = KINDS[name]
    return task, built(task, backbone(), **{"steps": 3, **own, **settings})


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_the_support_set_is_of_no_influence(name: str, order: int) -> None:
    task, method = kind(name, order=order)
    shuffled = torch.randperm(len(task.support_x), generator=torch.Generator().manual_seed(1))
    turned = Task(task.support_x[shuffled], task.support_y[shuffled], task.query_x, task.query_y, task.way)
    torch.testing.assert_close(matrices(method, turned.support), matrices(method, task.support), rtol=1e-12, atol=1e-13)
    found = [meta_gradient(method, each) for each in (task, turned)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


def meta_gradient(method: OPLSTM, task: Task) -> dict[str, Tensor]:
    named = dict(method.named_parameters())
    slopes = torch.autograd.grad(method.loss(task), list(named.values()), materialize_grads=True)
    return dict(zip(named, slopes))


@pytest.mark.parametrize("name", KINDS)
def test_first_order_is_second_order_with_what_is_read_detached(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, slopes = [], []
    for order in (1, 2):
        task, method = kind(name, order=order)
        losses.append(method.loss(task))
        slopes.append(meta_gradient(method, task))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert max((a - b).abs().max().item() for a, b in zip(slopes[0].values(), slopes[1].values())) > 1e-6

    unroll = CoordinateLSTM.unroll

    def detaching(self: CoordinateLSTM):
        step = unroll(self)
        return lambda pair, state: step(pair.detach(), state)

    monkeypatch.setattr(CoordinateLSTM, "unroll", detaching)
    task, method = kind(name, order=2)
    torch.testing.assert_close(meta_gradient(method, task), slopes[0])


class Truth(nn.Module):
    """In place of an LSTM, what it would have to learn to be gradient descent."""

    def __init__(self, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule

    def unroll(self):
        return lambda pair, state: (self.rule(*pair)[None], state)


def truthful(method: OPLSTM, step: float, examples: int, way: int | None) -> OPLSTM:
    """Give it minus the slope of the loss, times the step and the number of examples."""

    def out(target: Tensor, prediction: Tensor) -> Tensor:
        target, prediction = (flat.view(examples, -1) for flat in (target, prediction))
        if way is None:
            slope = 2 * (prediction - target) / target.numel()
        else:
            slope = (prediction.softmax(-1) - target) / examples
        return (-step * examples * slope).flatten()

    method.out_lstm = Truth(out)  # type: ignore[assignment]
    if method.adapts == "all":
        method.body_lstm = Truth(lambda activation, message: message * (activation > 0))  # type: ignore[assignment]
    return method


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize(
    ("task", "widths", "adapts"),
    [
        (waves()[0], [7, 6], "all"),
        (waves(targets=3)[0], [7], "all"),
        (waves(shot=1)[0], [60, 60, 2], "all"),  # outer products apart, and matrices: see below
        (batch()[0], [7, 6], "all"),
        (batch(shot=1)[0], [60, 60], "all"),
        (waves()[0], [7, 6], "head"),
        (batch()[0], [7, 6], "head"),
        (batch()[0], [400], "head"),
    ],
)
def test_with_the_true_errors_it_is_gradient_descent(task: Task, widths: list[int], adapts: str, steps: int) -> None:
    """It adapts as MAML does whose biases stay; and with second order, so is its meta-gradient."""
    step = 0.1
    ours = built(task, MLP(widths), steps=steps, adapts=adapts, bias="class")
    torch.manual_seed(0)
    theirs = MAML(MLP(widths), inner_lr=step, steps=steps, adapts=adapts)
    theirs.build(single(task)).double()
    theirs.load_state_dict({name: p for name, p in ours.state_dict().items() if "lstm" not in name})
    theirs.adapted = {name for name in theirs.adapted if name.endswith("weight")}
    truthful(ours, step, len(task.support_x), task.way)
    adapted = theirs.adapt(task.support).weights
    state = ours.adapt(task.support)
    torch.testing.assert_close([layer.matrix for layer in state.layers], list(adapted.values()))
    assert len(adapted) == (len(widths) + 1 if adapts == "all" else 1)
    apart = [layer.left is not None for layer in state.layers]
    if steps < 3 and widths[:2] == [60, 60]:
        assert apart[1]
        assert not apart[-1] or steps == 1
    torch.testing.assert_close(
        ours.predict(state, task.query_x), theirs.predict(theirs.adapt(task.support), task.query_x)
    )
    names = [name for name, _ in theirs.named_parameters()]
    slopes = [
        torch.autograd.grad(method.loss(task), [method.get_parameter(name) for name in names])
        for method in (ours, theirs)
    ]
    torch.testing.assert_close(slopes[0], slopes[1])


@pytest.mark.parametrize("bias", [None, "scalar", "each"])
def test_a_layer_of_outer_products_is_its_matrix(bias: str | None) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    torch.manual_seed(0)
    weight = normal(50, 40)
    offset = {None: None, "scalar": normal(1), "each": normal(50)}[bias]
    parts = [(normal(2, 50), normal(2, 40)) for _ in range(3)]
    dense = weight + sum(signal.T @ activation for signal, activation in parts)
    for passes, apart in ((2, True), (100, False)):
        layer = Layer(weight, offset)
        for signal, activation in parts:
            layer = layer.plus(signal, activation, passes)
        assert (layer.left is not None) == apart
        if apart:
            assert layer.left is not None
            assert layer.right is not None
            assert layer.weight is weight
            assert (layer.left.shape, layer.right.shape) == ((6, 50), (6, 40))
        x, signal = normal(4, 40), normal(4, 50)
        torch.testing.assert_close(layer.matrix, dense)
        torch.testing.assert_close(layer.forward(x), x @ dense.T + (0 if offset is None else offset))
        torch.testing.assert_close(layer.backward(signal), signal @ dense)


@pytest.mark.parametrize("name", ["sine", "norms", "head"])
def test_gamma_is_the_norm_of_a_step(name: str) -> None:
    """Of all layers together, whatever the size of the updates; and their directions are those without it."""
    task, method = kind(name, gamma=0.3)
    inputs = method.embed(task.support_x) if name == "head" else task.support_x
    for done in method.passes(inputs, task.support):
        change = torch.cat([(a.matrix - b.matrix).flatten() for a, b in zip(done.after, done.before)])
        update = torch.cat([update.flatten() for update in done.updates])
        torch.testing.assert_close(change.norm(), method.gamma.detach())  # type: ignore[union-attr]
        torch.testing.assert_close(change, 0.3 * update / update.norm())
    _, plain = kind(name, gamma=None)
    for done in plain.passes(inputs, task.support):
        for before, after, update in zip(done.before, done.after, done.updates):
            torch.testing.assert_close(after.matrix - before.matrix, update)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_update_of_zeros_changes_nothing_and_has_a_gradient(dtype: torch.dtype) -> None:
    task, method = kind("sine", gamma=0.3)
    method.to(dtype)
    task = task.map(lambda t: t.to(dtype))
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if "lstm" in name:
                parameter.zero_()
    before = [layer.matrix for layer in method.layers]
    torch.testing.assert_close(matrices(method, task.support), before, rtol=0, atol=0)
    for name, slope in meta_gradient(method, task).items():
        assert slope.isfinite().all(), name


@pytest.mark.parametrize("gamma", [None, 0.3])
@pytest.mark.parametrize("activations", ["linear", "output"])
@pytest.mark.parametrize("norm_scale", ["sum", "mean"])
@pytest.mark.parametrize("adapts_bias", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_one_pass_by_hand(
    gamma: float | None, activations: str, norm_scale: str, adapts_bias: bool, batch_norm: bool
) -> None:
    """Two layers, each option spelled out."""
    task = batch()[0]
    settings = {"gamma": gamma, "activations": activations, "norm_scale": norm_scale, "adapts_bias": adapts_bias}
    method = built(task, MLP([7], batch_norm=batch_norm), steps=1, **settings)
    x, count = task.support_x, len(task.support_x)
    first, norm, second = method.backbone.linears[0], method.backbone.norms[0], method.head  # type: ignore[index]
    linear = first(x)
    output = norm(linear).relu()
    recorded = linear if batch_norm and activations == "linear" else output
    logits = second(output)

    def lstm(own: CoordinateLSTM, a: Tensor, b: Tensor) -> Tensor:
        return own.unroll()(torch.stack([a.flatten(), b.flatten()]), None)[0].view_as(a)

    signal2 = lstm(method.out_lstm, F.one_hot(task.support_y, 3).double(), logits)
    signal1 = lstm(method.body_lstm, recorded, signal2 @ second.weight)
    if batch_norm:
        variance = linear.var(0, correction=0)
        signal1 = signal1 * norm.weight / (variance * (count if norm_scale == "sum" else 1) + 1e-7).sqrt()
    updates = [signal1.T @ x / count, signal2.T @ recorded / count]
    size = 1.0 if gamma is None else gamma / sum(update.square().sum() for update in updates).sqrt()  # type: ignore
    layers = method.adapt(task.support).layers
    for layer, old, update, signal in zip(layers, (first, second), updates, (signal1, signal2)):
        torch.testing.assert_close(layer.matrix, old.weight + size * update)
        shift = signal.mean(0) * (1.0 if gamma is None else gamma) * adapts_bias
        torch.testing.assert_close(layer.bias, old.bias + shift)
    queries = norm(F.linear(task.query_x, layers[0].matrix, layers[0].bias)).relu()
    expected = F.linear(queries, layers[1].matrix, layers[1].bias)
    torch.testing.assert_close(method.predict(method.adapt(task.support), task.query_x), expected)


@pytest.mark.parametrize("bias", ["scalar", "class", "none"])
@pytest.mark.parametrize("adapts_bias", [False, True])
@pytest.mark.parametrize("gamma", [None, 0.3])
def test_one_pass_of_the_head_by_hand(bias: str, adapts_bias: bool, gamma: float | None) -> None:
    task = batch()[0]
    method = built(task, MLP([7]), adapts="head", bias=bias, adapts_bias=adapts_bias, gamma=gamma)
    old = method.head.bias
    assert (None if old is None else tuple(old.shape)) == {"scalar": (1,), "class": (3,), "none": None}[bias]
    assert not hasattr(method, "body_lstm")
    features = method.embed(task.support_x)
    logits = features @ method.head.weight.T + (0 if old is None else old)
    pair = torch.stack([F.one_hot(task.support_y, 3).double().flatten(), logits.flatten()])
    signal = method.out_lstm.unroll()(pair, None)[0].view(-1, 3)
    update = signal.T @ features / len(features)
    (layer,) = method.adapt(task.support).layers
    torch.testing.assert_close(
        layer.matrix, method.head.weight + (update if gamma is None else gamma * update / update.norm())
    )
    mean = signal.mean(0) * (1 if gamma is None else gamma)
    shift = {"scalar": mean.mean(), "class": mean, "none": 0}[bias]
    if old is None:
        assert layer.bias is None
    else:
        torch.testing.assert_close(layer.bias, old + shift * adapts_bias)
    expected = method.embed(task.query_x) @ layer.matrix.T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(method.predict(method.adapt(task.support), task.query_x), expected)


def test_each_pass_goes_on_from_the_state_of_the_one_before() -> None:
    task = batch()[0]
    method = built(task, MLP([7]), adapts="head", steps=3)
    features, target = method.embed(task.support_x), F.one_hot(task.support_y, 3).double()
    weight, step, state = method.head.weight, method.out_lstm.unroll(), None
    for done in method.passes(features, task.support):
        logits = F.linear(features, weight, method.head.bias.expand(3))
        signal, state = step(torch.stack([target.flatten(), logits.flatten()]), state)
        weight = weight + signal.view(-1, 3).T @ features / len(features)
        torch.testing.assert_close(done.after[0].matrix, weight)


@pytest.mark.parametrize("name", ["norms", "norms, gamma", "head", "head, images", "wide"])
def test_support_statistics_make_predictions_independent(name: str) -> None:
    task, method = kind(name, norm="support")
    with torch.no_grad():
        state = method.adapt(task.support)
        together = method.predict(state, task.query_x)
        alone = torch.cat([method.predict(state, x[None]) for x in task.query_x])
        torch.testing.assert_close(together, alone)
        if "norms" in name:  # the support set again has the statistics it had, as the rewritten learner sees it
            method.set_norm("batch")
            torch.testing.assert_close(
                method.predict(state, task.support_x), method.predict(method.adapt(task.support), task.support_x)
            )


def test_evaluation_may_take_another_number_of_passes() -> None:
    task, method = kind("norms", steps=1, test_steps=3)
    trained = matrices(method, task.support)
    tested = matrices(method.eval(), task.support)
    _, longer = kind("norms", steps=3)
    torch.testing.assert_close(tested, matrices(longer, task.support), rtol=0, atol=0)
    assert not torch.allclose(trained[0], tested[0])
    method.set_test_steps(0)
    torch.testing.assert_close(matrices(method, task.support), [layer.matrix for layer in method.layers])
    assert method.predict(method.adapt(task.support), task.query_x).isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_meta_gradient_against_finite_differences(name: str) -> None:
    task, _, _ = KINDS[name]
    narrow = {
        "sine": lambda: MLP([3, 2]),
        "wide": lambda: MLP([16, 16]),
        "norms": lambda: MLP([3, 2], batch_norm=True),
        "head, images": lambda: nn.Sequential(Conv4(2, blocks=1), nn.Tanh()),
    }
    own = KINDS[name][2]
    if name == "wide":
        task = task.map(lambda t: t[:1])
        own = {"steps": 2}
    method = built(task, narrow.get(name, KINDS[name][1])(), **{"steps": 2, **own}, hidden=(3, 1))
    loss = loss_of(method, task)

    if name == "wide":
        assert method.adapt(task.support).layers[1].left is not None
    values = [p.detach().clone().requires_grad_() for p in method.parameters()]
    assert torch.autograd.gradcheck(loss, values, eps=1e-7, atol=1e-6, fast_mode=True)


compiler = pytest.mark.skipif(
    not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))), reason="no C compiler here"
)
BATCHED = {
    "sine": (waves, lambda: OPLSTM(MLP([8]), steps=2, test_steps=1, gamma=0.1)),
    "sine, compiled": (waves, lambda: OPLSTM(MLP([8]), steps=2, compiled=True, order=1)),
    "wide": (lambda seed: waves(seed, shot=1), lambda: OPLSTM(MLP([40, 40]), steps=2, adapts_bias=True)),
    "norms, support statistics": (batch, lambda: OPLSTM(MLP([8], batch_norm=True), steps=2, norm="support")),
    "head": (lambda seed: batch(seed, (1, 8, 8)), lambda: OPLSTM(Conv4(3, blocks=1), steps=2, adapts="head")),
}
NAMES = [pytest.param(name, marks=compiler) if "compiled" in name else name for name in BATCHED]


def made(name: str, seed: int = 0) -> OPLSTM:
    data, make = BATCHED[name]
    torch.manual_seed(seed)
    return make().build(single(data(0)[0])).double()


@pytest.mark.parametrize("name", NAMES)
def test_loop_vmap_chunks_and_traces_are_equal(name: str) -> None:
    models, tasks = Models([made(name)]), BATCHED[name][0](0)
    slopes, measures = gradients(models, tasks, LOOP), scored(models, tasks, LOOP)
    for chunk in (TASKS, 2):
        torch.testing.assert_close(gradients(models, tasks, chunk), slopes)
        torch.testing.assert_close(scored(models, tasks, chunk), measures)
    if name != "wide":
        chunk = LOOP if "norms" in name else TASKS
        torch.testing.assert_close(gradients(models, tasks, chunk, traced=True), slopes)
    if name == "head":
        torch.testing.assert_close(scored(models, tasks, TASKS, traced=True), measures)
    assert all(program.__name__ == "program" for program in models._programs.values())  # none fell back


@pytest.mark.parametrize("name", NAMES)
def test_stacked_seeds_equal_each_alone(name: str) -> None:
    methods = [made(name, seed) for seed in range(2)]
    streams = [BATCHED[name][0](seed) for seed in range(2)]
    stacked = Task.stack(streams)
    together = Models(methods)
    losses, slopes = gradients(together, stacked, TASKS, traced="compiled" in name)
    measures = scored(together, stacked, 2)
    for i, (method, stream) in enumerate(zip(methods, streams)):
        alone = Models([method])
        torch.testing.assert_close((losses[i], [slope[i] for slope in slopes]), gradients(alone, stream, LOOP))
        torch.testing.assert_close(measures[i], scored(alone, stream, LOOP))


@compiler
def test_compiled_is_the_same_method() -> None:
    task = waves()[0]
    plain, quick = (built(task, MLP([8, 6]), steps=3, compiled=compiled) for compiled in (False, True))
    torch.testing.assert_close(meta_gradient(quick, task), meta_gradient(plain, task))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=compiler)])
@pytest.mark.parametrize("adapts", ["all", "head"])
def test_half_precision_is_for_the_learner_alone(compiled: bool, adapts: str) -> None:
    tasks = single(batch())
    models = Models([built(tasks[0], MLP([8]), adapts=adapts, compiled=compiled).float()])
    exact = gradients(models, tasks, LOOP)
    with torch.autocast("cpu", torch.bfloat16):
        for chunk, traced in ((LOOP, False), (TASKS, False), (TASKS, True))[
            : 3 if compiled == (adapts == "head") else 2
        ]:
            found = gradients(models, tasks, chunk, traced)
            assert found[1][0].dtype == torch.float32
            assert not torch.equal(found[0], exact[0])
            torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)
    assert all(program.__name__ == "program" for program in models._programs.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": (5, 5)}, r"the last of hidden is 1; got \[5, 5\]"),
        ({"hidden": ()}, r"the last of hidden is 1; got \[\]"),
        ({"steps": 0}, "at least one pass, not 0"),
        ({"test_steps": -1}, "-1 \\(test\\)"),
        ({"backbone": Conv4(4)}, "MLP alone, not of Conv4: use adapts: head"),
        ({"norm": "joint"}, "norm batch or support, not 'joint'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        OPLSTM(**{"backbone": MLP([4]), **settings})
