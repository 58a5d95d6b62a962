"""Laws of SAP: it starts as the base network, adapts the operations alone, and its mixtures are sums of operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, loss_of, scored, single
from torch import Tensor, nn

from quickstudy.engine.models import LOOP, Models
from quickstudy.errors import RecipeError
from quickstudy.methods import MAML, SAP
from quickstudy.methods.sap import Filters, KernelScales, LinearGate, Matrices, Mixture, ScalarGates
from quickstudy.nn import MLP, Conv4
from quickstudy.task import Task

TASKS = 3


def images(seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3)
    support, query = (labels.repeat_interleave(n).expand(TASKS, -1) for n in (2, 3))
    x = torch.rand(TASKS, 15, 2, 9, 9, dtype=torch.float64, generator=generator)
    return Task(x[:, :6], support, x[:, 6:], query, 3)


def waves(seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(TASKS, 12, 1, dtype=torch.float64, generator=generator) * 4 - 2
    y = torch.sin(x + torch.arange(TASKS)[:, None, None])
    return Task(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:])


def built(task: Task, backbone: nn.Module, seed: int = 0, *, make: type[MAML] = SAP, **settings) -> MAML:
    torch.manual_seed(seed)
    return make(backbone, **settings).build(single(task)).double()


def lively(module: nn.Module) -> nn.Module:
    """Move everything away from where it starts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def conv() -> Conv4:
    return Conv4(3, blocks=2)


SINE = {"adapts_head": False, "inner_lr": 0.05, "ranks": (1, 2)}
KINDS = {
    "images": (images, conv, {"inner_lr": 0.1}),
    "images, all pairs": (images, conv, {"inner_lr": 0.1, "depthwise": False, "clip": 0.05}),
    "sine": (waves, lambda: MLP([5, 4]), SINE),
}


def kind(name: str, **settings) -> tuple[Task, SAP]:
    data, backbone, own = KINDS[name]
    method = built(data()[0], backbone(), **{**own, **settings})
    assert isinstance(method, SAP)
    return data()[0], method


def logits(method: SAP) -> list[nn.Parameter]:
    return [p for name, p in method.named_parameters() if name.endswith("logits")]


@pytest.mark.parametrize("depthwise", [True, False])
def test_published_sizes(depthwise: bool) -> None:
    x, y = torch.rand(5, 3, 84, 84), torch.arange(5)
    method = SAP(Conv4(64), depthwise=depthwise).build(Task(x, y, x, y, 5))
    sizes = {name: p.numel() for name, p in method.named_parameters()}
    base = sum(size for name, size in sizes.items() if name.startswith(("backbone.", "head.")))
    proportions = sum(p.numel() for p in logits(method))
    saved = 7 * 3 * 2 + 4 * (7 * 64 * 63)  # seven numbers for each pair of two different channels
    assert base == 121093
    assert proportions == 48
    assert sum(sizes.values()) - base - proportions == 291711 - saved * depthwise
    assert sum(sizes[name] for name in method.adapted) == 299716 - saved * depthwise


@pytest.mark.parametrize(
    ("name", "settings"), [("images", {}), ("images, all pairs", {}), ("sine", {"ranks": (5, 99)})], ids=str
)
def test_it_starts_as_the_base_network(name: str, settings: dict) -> None:
    """So there the proportions have no slope; after a step, which makes operations differ, all of them have."""
    task, method = kind(name, **settings)
    base = method.head(method.backbone(task.query_x))
    torch.testing.assert_close(method(task.query_x), base, rtol=1e-12, atol=1e-13)
    for steps in (0, 1):
        method.steps = steps
        slopes = torch.autograd.grad(method.loss(task), logits(method))
        for slope in slopes:
            assert (slope.abs().max() > 1e-8) == (steps == 1)
            assert slope.abs().max() < 1e-13 or steps == 1


def test_matrices_of_low_rank_start_as_projections() -> None:
    x = torch.randn(6, 40)
    kept = torch.ones(40)
    for rank in (5, 10, 15):
        kept[rank:] -= 1 / 7
    torch.testing.assert_close(Matrices(40, (5, 10, 15))(x), x * kept)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("adapts_head", [True, False])
@pytest.mark.parametrize("adapts_input_scale", [True, False])
def test_the_operations_adapt_and_the_base_stays(name: str, adapts_head: bool, adapts_input_scale: bool) -> None:
    task, method = kind(name, adapts_head=adapts_head, adapts_input_scale=adapts_input_scale)
    before = {key: p.detach().clone() for key, p in lively(method).named_parameters()}
    weights = method.adapt(task.support).weights
    expected = {key for key in before if not key.startswith(("backbone.", "head.")) and not key.endswith("logits")}
    expected |= {"head.weight", "head.bias"} if adapts_head else set()
    expected -= set() if adapts_input_scale else {"input.factor"}
    assert set(weights) == expected
    assert all(not torch.equal(weight, before[key]) for key, weight in weights.items())
    assert all(torch.equal(p, before[key]) for key, p in method.named_parameters())
    method.loss(task).backward()
    for key, parameter in method.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > (0 if "convs" in key and key.endswith("bias") else 1e-9), key


def spread(x: Tensor) -> Tensor:
    """A vector over the channels of images."""
    return x[:, None, None]


def filters(own: Filters, z: Tensor) -> Tensor:
    a, b = own.logits.softmax(0), own.shift.logits.softmax(0)
    wide = F.pad(z, (0, 2, 0, 2))
    if own.depthwise:
        factored = F.conv2d(wide, torch.einsum("ci,c,cj->cij", own.U, own.S, own.V)[:, None], groups=z.shape[1])
    else:
        factored = F.conv2d(wide, torch.einsum("oci,oc,ocj->ocij", own.U, own.S, own.V))
    narrow = F.conv2d(z, own.pointwise[..., None, None])
    z = a[0] * z + a[1] * narrow + a[2] * F.conv2d(wide, own.kernel) + a[3] * factored
    return b[0] * z + b[1] * (z + own.shift.scalar) + b[2] * (z + spread(own.shift.vector))


def kernel_scales(own: KernelScales, kernel: Tensor) -> Tensor:
    u = own.logits.softmax(0)
    each, whole = kernel * own.slices[..., None, None], kernel * own.channels[:, None, None, None]
    return u[0] * kernel + u[1] * each + u[2] * whole


def linear_gate(own: LinearGate, y: Tensor) -> Tensor:
    s = own.logits.sigmoid()
    return (1 - s) * y + s * (y @ own.matrix.T + own.bias)


def matrices(own: Matrices, x: Tensor) -> Tensor:
    a, b = own.logits.softmax(0), own.shift.logits.softmax(0)
    parts = [part.split(own.ranks, dim=-1) for part in (own.U, own.S, own.V)]
    factored = [x @ (U @ S.diag() @ V.T) for U, S, V in zip(*parts)]
    terms = [x, own.scalar * x, own.vector * x, x @ own.matrix, *factored]
    x = sum((weight * term for weight, term in zip(a, terms)), torch.zeros(()))
    return b[0] * x + b[1] * (x + own.shift.scalar) + b[2] * (x + own.shift.vector)


def scalar_gates(own: ScalarGates, x: Tensor) -> Tensor:
    s, t = own.scale.logits.sigmoid(), own.shift.logits.sigmoid()
    x = (1 - s) * x + s * (own.factor * x)
    return (1 - t) * x + t * (x + own.term)


@pytest.mark.parametrize(
    ("make", "apart", "shape"),
    [
        (lambda: Filters(3, True), filters, (2, 3, 5, 4)),
        (lambda: Filters(3, False), filters, (2, 3, 5, 4)),
        (lambda: KernelScales(nn.Conv2d(3, 4, 3)), kernel_scales, (4, 3, 3, 3)),
        (lambda: LinearGate(3), linear_gate, (5, 3)),
        (lambda: Matrices(5, (2, 3)), matrices, (4, 5)),
        (lambda: ScalarGates(), scalar_gates, (4, 2)),
    ],
    ids=["filters", "filters, all pairs", "kernel scales", "linear gate", "matrices", "scalar gates"],
)
def test_a_mixture_is_the_sum_of_its_operations(
    make: Callable[[], nn.Module], apart: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    """Applied one by one, as the paper writes them, they have the same values, gradients and second derivatives."""
    torch.manual_seed(0)
    own = lively(make().double())
    x, probe = torch.randn(2, *shape, dtype=torch.float64)
    values = [x.requires_grad_(), *own.parameters()]
    found = []
    for apply in (own, lambda x: apart(own, x)):
        y = apply(x)
        slopes = torch.autograd.grad((y.sin() * probe).sum(), values, create_graph=True)
        curvatures = torch.autograd.grad(sum((s.square().sum() for s in slopes), torch.zeros(())), values)
        found.append((y, slopes, curvatures))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("order", [1, 2])
def test_factored_kernels_between_two_channels_stay_zero(order: int) -> None:
    """Whole and on the diagonal, they are the same method, through inner steps and meta-updates."""
    tasks, trained = images(), []
    for depthwise in (True, False):
        method = built(tasks[0], conv(), depthwise=depthwise, inner_lr=0.1, steps=2, order=order)
        optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
        for task in (tasks[0], tasks[1], tasks[2]):
            optimizer.zero_grad()
            method.loss(task).backward()
            optimizer.step()
        trained.append(method)
    alone, pairs = (dict(method.named_parameters()) for method in trained)
    for name, parameter in pairs.items():
        if name[-2:] in (".U", ".V"):
            assert parameter.count_nonzero() == alone[name].numel()
        if name[-2:] in (".U", ".S", ".V"):
            parameter = parameter.diagonal().movedim(-1, 0)
        if not ("convs" in name and name.endswith("bias")):  # no gradient but of rounding, which Adam blows up
            torch.testing.assert_close(parameter, alone[name])
    torch.testing.assert_close(*(method.loss(tasks[0]) for method in trained))


def test_proportions_that_are_kept() -> None:
    mixture, gate = Mixture(5), Mixture(1)
    torch.testing.assert_close(mixture.shares(), torch.full((5,), 0.2))
    torch.testing.assert_close(mixture.shares(2), torch.tensor([0.5, 0.5, 0, 0, 0]))  # of equals the first
    mixture.logits.data = torch.tensor([0.0, 2.0, -1.0, 1.0, 0.5])
    assert mixture.shares(1).tolist() == [0, 1, 0, 0, 0]
    three = torch.tensor([0, 2.0, 1.0, 0.5])[1:].softmax(0)
    torch.testing.assert_close(mixture.shares(3), torch.stack([three[0] * 0, three[0], three[0] * 0, *three[1:]]))
    for keep in (5, 9):
        torch.testing.assert_close(mixture.shares(keep), mixture.logits.softmax(0))
    for logit, kept in ((-1.0, [1, 0]), (0.0, [1, 0]), (1.0, [0, 1])):
        gate.logits.data = torch.tensor([logit])
        assert gate.shares(1).tolist() == kept
        share = torch.sigmoid(gate.logits)
        torch.testing.assert_close(gate.shares(2), torch.cat([1 - share, share]))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_not_kept_is_as_if_it_were_not_there(name: str) -> None:
    """In evaluation, after training with all operations: what is left adapts, and all else stays."""
    task, method = kind(name)
    lively(method)
    soft = method.loss(task)
    method.keep = 1
    torch.testing.assert_close(method.loss(task), soft)
    method.eval()
    assert not torch.allclose(method.loss(task), soft)
    weights = method.adapt(task.support).weights
    assert any(torch.equal(weight, method.get_parameter(key)) for key, weight in weights.items())
    assert any(not torch.equal(weight, method.get_parameter(key)) for key, weight in weights.items())
    method.keep = 99
    torch.testing.assert_close(method.loss(task), soft)


@pytest.mark.parametrize("name", KINDS)
def test_where_the_identity_alone_is_kept_only_the_head_adapts(name: str) -> None:
    task, ours = kind(name, adapts_head=True, steps=2, keep=1)
    lively(ours)
    for proportions in logits(ours):
        proportions.data = torch.linspace(1, 0, len(proportions)).double() if len(proportions) > 1 else -torch.ones(1)
    ours.double().eval()
    settings = {"inner_lr": ours.inner_lr, "steps": 2, "clip": ours.clip, "adapts": "head"}
    theirs = built(task, KINDS[name][1](), make=MAML, **settings)
    theirs.load_state_dict({key: p for key, p in ours.state_dict().items() if key in theirs.state_dict()})
    state, expected = ours.adapt(task.support), theirs.adapt(task.support)
    for key, weight in state.weights.items():
        torch.testing.assert_close(weight, expected.weights.get(key, ours.get_parameter(key)))
    torch.testing.assert_close(ours.predict(state, task.query_x), theirs.predict(expected, task.query_x))


@pytest.mark.parametrize("name", KINDS)
def test_first_and_second_order(name: str) -> None:
    """They are different meta-gradients, except where steps have no size."""
    for rate in (0.0, 0.1):
        slopes = []
        for order in (1, 2):
            task, method = kind(name, order=order, inner_lr=rate)
            lively(method)
            slopes.append(torch.autograd.grad(method.loss(task), list(method.parameters())))
        apart = max((a - b).abs().max().item() for a, b in zip(*slopes))
        assert apart > 1e-6 if rate else apart < 1e-15


@pytest.mark.parametrize("name", KINDS)
def test_meta_gradient_against_finite_differences(name: str) -> None:
    narrow = {"sine": lambda: MLP([3])}.get(name, lambda: Conv4(2, blocks=1))
    data, _, own = KINDS[name]
    task = data()[0]
    method = lively(built(task, narrow(), **{**own, "steps": 2, "clip": None}))
    values = [p.detach().clone().requires_grad_() for p in method.parameters()]
    assert torch.autograd.gradcheck(loss_of(method, task), values, eps=1e-7, atol=1e-6, fast_mode=True)


def test_support_statistics_make_predictions_independent() -> None:
    task, method = kind("images", norm="support")
    with torch.no_grad():
        state = lively(method).adapt(task.support)
        together = method.predict(state, task.query_x)
        alone = torch.cat([method.predict(state, x[None]) for x in task.query_x])
    torch.testing.assert_close(together, alone)


def shallow() -> Conv4:
    return Conv4(3, blocks=1)


BATCHED = {
    "images": (images, lambda: SAP(shallow(), inner_lr=0.1, test_steps=2, clip=0.05)),
    "images, all pairs, first order": (images, lambda: SAP(shallow(), depthwise=False, order=1, norm="support")),
    "images, pruned": (images, lambda: SAP(shallow(), keep=1)),
    "sine": (waves, lambda: SAP(MLP([8]), **{**SINE, "keep": 2})),
}


def made(name: str, seed: int = 0) -> SAP:
    data, make = BATCHED[name]
    torch.manual_seed(seed)
    example = single(data()[0])
    return lively(make().build(example).double())  # type: ignore[return-value]


@pytest.mark.parametrize("name", BATCHED)
def test_loop_vmap_chunks_and_traces_are_equal(name: str) -> None:
    models, tasks = Models([made(name)]), BATCHED[name][0]()
    slopes, measures = gradients(models, tasks, LOOP), scored(models, tasks, LOOP)
    for chunk in (TASKS, 2):
        torch.testing.assert_close(gradients(models, tasks, chunk), slopes)
        torch.testing.assert_close(scored(models, tasks, chunk), measures)
    if name in ("images", "sine"):
        torch.testing.assert_close(gradients(models, tasks, TASKS if name == "sine" else LOOP, traced=True), slopes)
    if name == "images, pruned":
        torch.testing.assert_close(scored(models, tasks, TASKS, traced=True), measures)
    assert all(program.__name__ == "program" for program in models._programs.values())  # none fell back


@pytest.mark.parametrize("name", BATCHED)
def test_stacked_seeds_equal_each_alone(name: str) -> None:
    methods = [made(name, seed) for seed in range(2)]
    streams = [BATCHED[name][0](seed) for seed in range(2)]
    stacked = Task.stack(streams)
    together = Models(methods)
    losses, slopes = gradients(together, stacked, TASKS)
    measures = scored(together, stacked, 2)
    for i, (method, stream) in enumerate(zip(methods, streams)):
        alone = Models([method])
        torch.testing.assert_close((losses[i], [slope[i] for slope in slopes]), gradients(alone, stream, LOOP))
        torch.testing.assert_close(measures[i], scored(alone, stream, LOOP))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": nn.Flatten()}, "quickstudy.nn.MLP, not for Flatten: use one of these two"),
        ({"steps": -1}, "SAP takes zero or more inner steps, not -1"),
        ({"keep": 0}, "at least one operation of each mixture, not 0"),
        ({"ranks": (5, 0)}, r"at least 1; got \[5, 0\]"),
        ({"ranks": ()}, r"needs ranks .* got \[\]"),
        ({"norm": "joint"}, "norm batch or support, not 'joint'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SAP(**{"backbone": Conv4(4), **settings})
