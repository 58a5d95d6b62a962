"""Laws of T-Net and MT-Net: what metric a transform is, what a mask holds, and where the randomness comes from."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, loss_of, scored, single
from torch import Tensor, nn

from quickstudy.engine.models import LOOP, Models
from quickstudy.errors import RecipeError
from quickstudy.methods import MAML, Method, TNet, tnet
from quickstudy.nn import MLP, Conv4
from quickstudy.task import Task

TASKS = 3
KINDS = ("images", "sine")


def images(seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3)

    def draw(count: int) -> Tensor:
        return torch.rand(TASKS, count, 1, 4, 4, dtype=torch.float64, generator=generator)

    support, query = (labels.repeat_interleave(n).expand(TASKS, -1) for n in (2, 3))
    return Task(draw(6), support, draw(9), query, 3)


def waves(seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x, qx = (torch.rand(TASKS, n, 1, dtype=torch.float64, generator=generator) * 4 - 2 for n in (5, 7))
    shifts = torch.arange(TASKS)[:, None, None]
    return Task(x, torch.sin(x + shifts), qx, torch.sin(qx + shifts))


def data(kind: str, seed: int = 0) -> Task:
    return images(seed) if kind == "images" else waves(seed)


def backbone(kind: str) -> nn.Module:
    return Conv4(3, blocks=2) if kind == "images" else MLP([6, 5])


def drawn(method: Method, kind: str) -> Method:
    """Build it, and draw what starts as ones, zeros or the identity, so that all of it matters."""
    method.build(single(data(kind)[0])).double()
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if name.startswith(("transforms", "zetas")) or "norms" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return method


def built(kind: str, seed: int = 0, **settings) -> TNet:
    torch.manual_seed(seed)
    return drawn(TNet(backbone(kind), **{"inner_lr": 0.1, "steps": 2, **settings}), kind)  # type: ignore[return-value]


def plain(kind: str, like: TNet, **settings) -> MAML:
    """MAML from the same weights."""
    method = drawn(MAML(backbone(kind), **{"inner_lr": 0.1, "steps": 2, **settings}), kind)
    method.load_state_dict({name: p for name, p in like.state_dict().items() if name.startswith(("backbone", "head"))})
    return method  # type: ignore[return-value]


def set_transforms(method: TNet, make) -> None:
    with torch.no_grad():
        for T in method.transforms:
            T.copy_(make(len(T)))


def set_logits(method: TNet, *values: float) -> None:
    """Give the units of each layer the values in turn. At 50 a unit always adapts, at -50 it never does."""
    with torch.no_grad():
        for logits in method.zetas:
            logits.copy_(torch.tensor(values).repeat(len(logits))[: len(logits)])


def merged(method: TNet) -> dict[str, Tensor]:
    """The layers that weights and transforms make together, as those of a plain network."""
    state = {name: p.clone() for name, p in method.state_dict().items() if name.startswith(("backbone", "head"))}
    paths = [*(f"backbone.{method.kind}.{n}" for n in range(len(method.transforms) - 1)), "head"]
    for T, path in zip(method.transforms, paths):
        for kind in ("weight", "bias"):
            state[f"{path}.{kind}"] = torch.einsum("oi,i...->o...", T.detach(), state[f"{path}.{kind}"])
    return state


def slopes_of(method: Method, loss: Tensor) -> dict[str, Tensor]:
    named = dict(method.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_identity_it_is_maml(kind: str) -> None:
    task = data(kind)[0]
    method = TNet(backbone(kind)).build(single(task))
    assert all(torch.equal(T, torch.eye(len(T))) for T in method.transforms)
    method = built(kind)
    set_transforms(method, torch.eye)
    maml = plain(kind, method)
    torch.testing.assert_close(method.loss(task), maml.loss(task))
    ours = slopes_of(method, method.loss(task))
    for name, slope in slopes_of(maml, maml.loss(task)).items():
        torch.testing.assert_close(ours[name], slope)
    assert all(ours[f"transforms.{n}"].abs().max() > 1e-6 for n in range(3))


def test_a_transform_mixes_the_outputs_of_its_layer() -> None:
    method, x = built("images"), images().query_x[0]
    *body, last = method.transforms
    hidden = x
    for T, conv, norm in zip(body, method.backbone.convs, method.backbone.norms):
        hidden = F.max_pool2d(norm(F.conv2d(conv(hidden), T[:, :, None, None])).relu(), 2)
    torch.testing.assert_close(method(x), method.head(hidden.flatten(1)) @ last.T)
    method, x = built("sine"), waves().query_x[0]
    *body, last = method.transforms
    hidden = x
    for T, linear in zip(body, method.backbone.linears):
        hidden = (linear(hidden) @ T.T).relu()
    torch.testing.assert_close(method(x), method.head(hidden) @ last.T)


@pytest.mark.parametrize("kind", KINDS)
def test_a_transform_is_a_metric(kind: str) -> None:
    """A step moves T W by T T' times the gradient that a plain network of weight T W has."""
    task, method = data(kind)[0], built(kind, steps=1)
    maml = plain(kind, method, steps=1)
    maml.load_state_dict(merged(method))
    before, after = merged(method), dict(maml.adapt(task.support).weights)
    paths = [*(f"backbone.{method.kind}.{n}" for n in range(2)), "head"]
    metrics = dict(zip(paths, (T.detach() @ T.detach().T for T in method.transforms)))
    adapted = method.adapt(task.support).weights
    method.load_state_dict(method.state_dict() | {name: weight.detach() for name, weight in adapted.items()})
    moved = merged(method)
    for name, weight in after.items():
        step = weight.detach() - before[name]
        metric = metrics.get(name.rpartition(".")[0])
        expected = step if metric is None else torch.einsum("oi,i...->o...", metric, step)
        torch.testing.assert_close(moved[name] - before[name], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rotations_change_nothing(kind: str) -> None:
    """With T T' the identity, it learns what MAML learns from the layers T W."""
    task, method = data(kind)[0], built(kind, steps=3)
    set_transforms(method, lambda size: torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0])
    maml = plain(kind, method, steps=3)
    maml.load_state_dict(merged(method))
    torch.testing.assert_close(
        method.predict(method.adapt(task.support), task.query_x), maml.predict(maml.adapt(task.support), task.query_x)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("norm", ["batch", "support"])
def test_meta_gradient_against_finite_differences(kind: str, masks: bool, norm: str) -> None:
    """Of all but the logits of masks, whose gradient is another than that of what they decide."""
    task, method = data(kind)[0], built(kind, masks=masks, norm=norm)
    if masks:
        set_logits(method, 50, -50)
        method.zetas.requires_grad_(False)
    loss = loss_of(method, task)
    values = [p.detach().clone().requires_grad_(p.requires_grad) for p in method.parameters()]
    assert torch.autograd.gradcheck(loss, values, eps=1e-7, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, 2])
def test_the_gradient_of_logits_passes_straight_through(kind: str, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the slope of the loss along the mask, times that of the sigmoid."""
    task, method = data(kind)[0], built(kind, masks=True, masks_head=True, order=order)
    noise = [torch.randn_like(logits) for logits in method.zetas]
    repeated = itertools.cycle(noise)
    monkeypatch.setattr(tnet, "logistic", lambda like: next(repeated))
    slopes = slopes_of(method, method.loss(task))
    leaves = [(logits + g > 0).double().requires_grad_() for logits, g in zip(method.zetas, noise)]
    handed = iter(leaves)
    monkeypatch.setattr(TNet, "mask", lambda self, logits: next(handed))
    found = torch.autograd.grad(method.loss(task), leaves)
    for n, (logits, g, slope) in enumerate(zip(method.zetas, noise, found)):
        soft = torch.sigmoid(logits.detach() + g)
        torch.testing.assert_close(slopes[f"zetas.{n}"], slope * soft * (1 - soft))
    assert sum(slope.abs().sum() for slope in found) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masks_head", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_masks_hold_units(kind: str, masks_head: bool, training: bool) -> None:
    task, method = data(kind)[0], built(kind, masks=True, masks_head=masks_head, steps=3)
    method.train(training)
    set_logits(method, 50, -50)
    state = method.adapt(task.support)
    for name, weight in state.weights.items():
        change = (weight - method.get_parameter(name)).flatten(1 if weight.dim() > 1 else 0).abs()
        changed = change if weight.dim() == 1 else change.amax(1)
        if masks_head or not name.startswith("head"):
            assert changed[1::2].max() == 0 if len(changed) > 1 else True
        elif len(changed) > 1:
            assert changed[1::2].min() > 0
        if "convs" not in name or "weight" in name:  # a bias before a batch norm has no gradient
            assert changed[::2].max() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [False, True])
def test_what_adapts(kind: str, first: bool) -> None:
    method = built(kind, masks=True, adapts_first_weight=first)
    everything = {name for name, _ in method.named_parameters() if name.startswith(("backbone", "head"))}
    weights = method.adapt(data(kind)[0].support).weights
    assert set(weights) == everything - (set() if first else {f"backbone.{method.kind}.0.weight"})


@pytest.mark.parametrize("kind", KINDS)
def test_all_units_or_none(kind: str) -> None:
    """With all of them it is T-Net, with none only the head adapts, or nothing does."""
    task, method = data(kind)[0], built(kind, masks=True)
    whole = built(kind)
    whole.load_state_dict({name: p for name, p in method.state_dict().items() if "zetas" not in name})
    set_logits(method, 50)
    torch.testing.assert_close(method.loss(task), whole.loss(task))
    set_logits(method, -50)
    set_transforms(method, torch.eye)
    torch.testing.assert_close(method.loss(task), plain(kind, method, adapts="head").loss(task))
    still = built(kind, masks=True, masks_head=True)
    set_logits(still, -50)
    torch.testing.assert_close(still.adapt(task.support).weights, still.initial, rtol=0, atol=0)


def test_in_evaluation_a_unit_adapts_if_its_logit_is_above_zero() -> None:
    method = built("sine", masks=True).eval()
    logits = torch.tensor([0.3, 0.0, -1e-9, 1e-9, -5.0])
    assert method.mask(logits).tolist() == [1, 0, 0, 1, 0]
    fresh = TNet(MLP([6]), masks=True).build(waves()[0].map(Tensor.float))
    assert all(logits.eq(0).all() for logits in fresh.zetas)


def test_in_training_a_unit_adapts_with_the_probability_of_its_logit() -> None:
    method, count = built("sine", masks=True), 10_000
    torch.manual_seed(0)
    logits = torch.tensor([-2.0, 0.0, 1.0]).repeat_interleave(count)
    mask = method.mask(logits)
    assert set(mask.tolist()) == {0.0, 1.0}
    frequency, expected = mask.view(3, count).mean(1), torch.tensor([-2.0, 0.0, 1.0]).sigmoid()
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_one_mask_for_all_steps_of_a_task() -> None:
    """So what does not move in the first step does not move later."""
    task, method = data("sine")[0], built("sine", masks=True)
    still = []
    for steps in (1, 6):
        method.steps = steps
        torch.manual_seed(3)
        weights = method.adapt(task.support).weights
        still.append([(weights[f"backbone.linears.{n}.bias"] == method.backbone.linears[n].bias) for n in (0, 1)])
    assert 0 < sum(int(s.sum()) for s in still[0]) < 11
    for early, late in zip(*still):
        assert torch.equal(early, late)


def test_masks_are_drawn_for_every_task_and_anew_each_time() -> None:
    """In a loop, under vmap, and by a traced program."""
    task = waves()[0]
    same = Task(*(tensor.expand(8, *tensor.shape) for tensor in task.tensors))
    models = Models([built("sine", masks=True)])
    torch.manual_seed(0)
    for chunk, traced in ((LOOP, False), (8, False), (8, True)):
        losses = torch.cat([gradients(models, same, chunk, traced)[0] for _ in range(2)])
        assert len(losses.unique()) > 12  # some masks act the same
    assert all(program.__name__ == "program" for program in models._programs.values())
    assert len(scored(models, same, 8).unique(dim=0)) == 1  # and never in evaluation


BATCHED = {
    "T-Net, images": ("images", {}),
    "T-Net, sine": ("sine", {"clip": 0.05}),
    "MT-Net, images, support statistics": ("images", {"masks": True, "norm": "support"}),
    "MT-Net, sine, first order": ("sine", {"masks": True, "masks_head": True, "order": 1}),
}


def batched(name: str, seed: int = 0) -> TNet:
    kind, settings = BATCHED[name]
    method = built(kind, seed, **settings)
    if method.masks:
        set_logits(method, 50, -50)
    return method


@pytest.mark.parametrize("name", BATCHED)
def test_loop_vmap_chunks_and_traces_are_equal(name: str) -> None:
    models, tasks = Models([batched(name)]), data(BATCHED[name][0])
    slopes, measures = gradients(models, tasks, LOOP), scored(models, tasks, LOOP)
    for chunk in (TASKS, 2):
        torch.testing.assert_close(gradients(models, tasks, chunk), slopes)
        torch.testing.assert_close(scored(models, tasks, chunk), measures)
    if name != "T-Net, images":  # traced with masks
        chunk = LOOP if name == "T-Net, sine" else TASKS
        torch.testing.assert_close(gradients(models, tasks, chunk, traced=True), slopes)
    assert all(program.__name__ == "program" for program in models._programs.values())  # none fell back


@pytest.mark.parametrize("name", ["T-Net, images", "MT-Net, sine, first order"])
def test_stacked_seeds_equal_each_alone(name: str) -> None:
    methods, streams = [batched(name, seed) for seed in range(2)], [data(BATCHED[name][0], seed) for seed in range(2)]
    stacked = Task.stack(streams)
    losses, slopes = gradients(Models(methods), stacked, TASKS)
    for i, (method, stream) in enumerate(zip(methods, streams)):
        found = losses[i], [slope[i] for slope in slopes]
        torch.testing.assert_close(found, gradients(Models([method]), stream, LOOP))


@pytest.mark.parametrize("masks", [False, True])
def test_orders_differ_unless_the_step_is_zero(masks: bool) -> None:
    task = waves()[0]
    for inner_lr in (0.0, 0.3):
        found = []
        for order in (1, 2):
            method = built("sine", order=order, inner_lr=inner_lr, masks=masks)
            if masks:
                set_logits(method, 50)
            found.append(slopes_of(method, method.loss(task)))
        for name, slope in found[0].items():
            if inner_lr == 0 or name.startswith("zetas"):
                torch.testing.assert_close(slope, found[1][name])
            else:
                assert (slope - found[1][name]).abs().max() > 1e-6, name


def test_support_statistics_make_predictions_independent() -> None:
    task, method = images()[0], built("images", norm="support").eval()
    with torch.no_grad():
        state = method.adapt(task.support)
        together = method.predict(state, task.query_x)
        alone = torch.cat([method.predict(state, x[None]) for x in task.query_x])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": nn.Flatten()}, "not of Flatten: use one of them"),
        ({"masks_head": True}, "set masks too"),
        ({"steps": -1}, "TNet takes zero or more"),
        ({"norm": "joint"}, "norm batch or support, not 'joint'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TNet(**{"backbone": MLP([4]), **settings})
