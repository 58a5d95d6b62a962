"""Laws of Warp-MAML: what is learned through which step, what stays in a task, and where it starts."""

from __future__ import annotations

import pytest
import torch
from helpers import gradients, scored, single
from torch import Tensor, nn

from quickstudy.engine.models import LOOP, Models
from quickstudy.errors import RecipeError
from quickstudy.methods import MAML, Method, WarpMAML, task_loss
from quickstudy.nn import MLP, Conv4
from quickstudy.task import Task

TASKS = 3
BLOCKS = 3
KINDS = ("weight", "bias")


def batch(seed: int = 0, shot: int = 2, size: int = 8) -> Task:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3)

    def images(count: int) -> Tensor:
        return torch.rand(TASKS, count, 1, size, size, dtype=torch.float64, generator=generator)

    support, query = (labels.repeat_interleave(n).expand(TASKS, -1) for n in (shot, 3))
    return Task(images(3 * shot), support, images(9), query, 3)


def built(seed: int = 0, *, blocks: int = BLOCKS, lively: bool = True, **settings) -> WarpMAML:
    """Build one, ``lively`` with parameters drawn so that all of them matter."""
    torch.manual_seed(seed)
    method = WarpMAML(Conv4(3, blocks), **{"steps": 2, **settings})
    method.build(single(batch()[0])).double()
    if lively:
        with torch.no_grad():
            for name, parameter in method.named_parameters():
                if "norms" in name or "warps" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return method


def slopes_of(method: Method, loss: Tensor) -> dict[str, Tensor]:
    named = dict(method.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True)))


def unseen(name: str) -> bool:
    """Tell whether a parameter is the bias of a convolution right before a batch norm, which takes it away again."""
    return name.startswith("backbone.convs") and name.endswith("bias")


def moved(method: WarpMAML, weights: dict[str, Tensor]) -> WarpMAML:
    """Return a copy that starts from other weights."""
    copy = built(fixed_blocks=method.fixed_blocks, inner_lr=method.inner_lr, norm=method.norm, steps=method.steps)
    copy.load_state_dict({**method.state_dict(), **{name: weight.detach() for name, weight in weights.items()}})
    return copy


def query_loss(method: WarpMAML, task: Task, steps: int) -> Tensor:
    method.eval().set_test_steps(steps)
    loss = task_loss(method.predict(method.adapt(task.support), task.query_x), task.query_y, task.way)
    method.train()
    return loss


def test_number_of_parameters() -> None:
    task = Task(torch.rand(5, 3, 84, 84), torch.arange(5), torch.rand(5, 3, 84, 84), torch.arange(5), 5)
    method = WarpMAML(Conv4()).build(task)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in method.named_children()}
    assert count["backbone"] + count["head"] == 121_093
    assert count["warps"] == 110_784
    assert sum(p.numel() for p in method.parameters()) == 231_877


@pytest.mark.parametrize("fixed_blocks", [0, 1])
def test_a_warp_starts_as_the_identity(fixed_blocks: int) -> None:
    task = batch()[0]
    method = built(lively=False, fixed_blocks=fixed_blocks)
    plain = MAML(Conv4(3, BLOCKS)).build(single(task)).double()
    plain.load_state_dict({name: p for name, p in method.state_dict().items() if not name.startswith("warps")})
    torch.testing.assert_close(method(method.fixed(task.query_x)), plain(task.query_x))
    assert len(method.warps) == BLOCKS - fixed_blocks


@pytest.mark.parametrize("fixed_blocks", [0, 1, 2])
def test_what_adapts(fixed_blocks: int) -> None:
    method = built(fixed_blocks=fixed_blocks, steps=1)
    weights = method.adapt(batch()[0].support).weights
    blocks = range(fixed_blocks, BLOCKS)
    expected = {
        f"backbone.{part}.{block}.{kind}" for part in ("convs", "norms") for block in blocks for kind in KINDS
    } | {f"head.{kind}" for kind in KINDS}
    assert set(weights) == expected
    for name, weight in weights.items():
        assert unseen(name) or not torch.equal(weight, method.get_parameter(name))


@pytest.mark.parametrize("norm", ["batch", "support"])
@pytest.mark.parametrize("fixed_blocks", [0, 1])
def test_meta_gradient_against_finite_differences(norm: str, fixed_blocks: int) -> None:
    """Of the initialisation: of all query losses, warps held; of the warps: of one step from each point, points held.

    Along a random direction of each parameter.
    """
    task, steps, size = batch()[0], 3, 1e-6
    method = built(steps=steps, norm=norm, fixed_blocks=fixed_blocks)
    slopes = slopes_of(method, method.loss(task))
    points = []
    for step in range(steps):
        method.eval().set_test_steps(step)
        points.append(method.adapt(task.support).weights)
    method.train()
    starts = [moved(method, point) for point in points]
    generator = torch.Generator().manual_seed(1)
    for name, slope in slopes.items():
        direction = torch.randn(slope.shape, dtype=torch.float64, generator=generator)
        found = []
        for sign in (1, -1):
            if name.startswith("warps"):
                ends = [
                    query_loss(moved(start, {name: start.get_parameter(name) + sign * size * direction}), task, 1)
                    for start in starts
                ]
            else:
                other = moved(method, {name: method.get_parameter(name) + sign * size * direction})
                ends = [query_loss(other, task, step) for step in range(1, steps + 1)]
            found.append(torch.stack(ends).sum())
        expected = (found[0] - found[1]) / (2 * size)
        torch.testing.assert_close((slope * direction).sum(), expected, rtol=1e-5, atol=1e-7)


def test_the_loss_is_the_sum_over_the_steps() -> None:
    task, method = batch()[0], built(steps=3)
    expected = sum(query_loss(method, task, step) for step in (1, 2, 3))
    torch.testing.assert_close(method.loss(task), expected)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("norm", ["batch", "support"])
def test_with_one_step_it_is_the_query_loss_after_adaptation(order: int, norm: str) -> None:
    task, method = batch()[0], built(steps=1, order=order, norm=norm)
    expected = Method.loss(method, task)
    torch.testing.assert_close(method.loss(task), expected)
    torch.testing.assert_close(slopes_of(method, method.loss(task)), slopes_of(method, expected))


def test_first_order_is_the_gradient_at_the_points_of_the_trajectory() -> None:
    task, method = batch()[0], built(steps=3, order=1)
    slopes = slopes_of(method, method.loss(task))
    expected = {name: torch.zeros_like(slope) for name, slope in slopes.items()}
    for step in (1, 2, 3):
        method.eval().set_test_steps(step)
        there = moved(method, method.adapt(task.support).weights)
        for name, slope in slopes_of(there, query_loss(there, task, 0)).items():
            expected[name] += slope
    torch.testing.assert_close(slopes, expected)


def test_orders_differ_unless_the_step_is_zero() -> None:
    task = batch()[0]
    for inner_lr in (0.0, 0.1):
        first, second = (
            slopes_of(method, method.loss(task)) for method in (built(inner_lr=inner_lr, order=o) for o in (1, 2))
        )
        for name in first:
            if inner_lr == 0:
                torch.testing.assert_close(first[name], second[name])
            elif not unseen(name):
                assert (first[name] - second[name]).abs().max() > 1e-6, name


@pytest.mark.parametrize("warp_init", ["identity", "zero"])
def test_where_gradients_are_nothing_at_the_start(warp_init: str) -> None:
    """Warps of zero cut the learner in two: no image gets through, and no gradient back."""
    task, method = batch()[0], built(lively=False, warp_init=warp_init)
    alive = {name for name, slope in slopes_of(method, method.loss(task)).items() if slope.abs().max() > 1e-8}
    everything = {name for name, _ in method.named_parameters() if not unseen(name)}
    assert alive == (everything if warp_init == "identity" else {"head.bias", "warps.1.bias"})


def test_fixed_blocks_run_once_for_all_steps() -> None:
    method, runs = built(steps=4), []
    method.backbone.convs[0].register_forward_hook(lambda *_: runs.append(1))
    method.loss(batch()[0])
    assert len(runs) == 2  # on the support set, and on the queries
    runs.clear()
    method.adapt(batch()[0].support)
    assert len(runs) == 1


@pytest.mark.parametrize("fixed_blocks", [0, 1])
def test_support_statistics_make_predictions_independent(fixed_blocks: int) -> None:
    task, method = batch()[0], built(norm="support", fixed_blocks=fixed_blocks).eval()
    with torch.no_grad():
        state = method.adapt(task.support)
        together = method.predict(state, task.query_x)
        alone = torch.cat([method.predict(state, x[None]) for x in task.query_x])
        torch.testing.assert_close(together, alone)
        again = method.predict(state, task.support_x)  # whose statistics these are
        method.set_norm("batch")
        torch.testing.assert_close(method.predict(method.adapt(task.support), task.support_x), again)


def test_evaluation_may_take_another_number_of_steps() -> None:
    task, method = batch()[0], built(steps=1, test_steps=3)
    trained = method.adapt(task.support).weights
    tested = method.eval().adapt(task.support).weights
    torch.testing.assert_close(tested, built(steps=3).adapt(task.support).weights)
    assert not torch.allclose(trained["head.weight"], tested["head.weight"])
    method.set_test_steps(0)
    torch.testing.assert_close(method.adapt(task.support).weights, method.initial)


def test_clip_bounds_each_element_of_a_step() -> None:
    task, method = batch()[0], built(steps=1, inner_lr=1.0, clip=1e-3)
    for name, weight in method.adapt(task.support).weights.items():
        assert (weight - method.get_parameter(name)).abs().max() <= 1e-3 + 1e-12


BATCHED = {
    "published": {},
    "first order": {"order": 1},
    "support statistics, all blocks": {"norm": "support", "fixed_blocks": 0, "clip": 0.05},
}


@pytest.mark.parametrize("name", BATCHED)
def test_loop_vmap_chunks_and_traces_are_equal(name: str) -> None:
    models, tasks = Models([built(blocks=2, **BATCHED[name])]), batch()
    slopes, measures = gradients(models, tasks, LOOP), scored(models, tasks, LOOP)
    for chunk in (TASKS, 2):
        torch.testing.assert_close(gradients(models, tasks, chunk), slopes)
        torch.testing.assert_close(scored(models, tasks, chunk), measures)
    traced = LOOP if name == "first order" else TASKS
    torch.testing.assert_close(gradients(models, tasks, traced, traced=True), slopes)
    if "all blocks" in name:
        torch.testing.assert_close(scored(models, tasks, traced, traced=True), measures)
    assert all(program.__name__ == "program" for program in models._programs.values())  # none fell back


def test_stacked_seeds_equal_each_alone() -> None:
    methods, streams = [built(seed) for seed in range(2)], [batch(seed) for seed in range(2)]
    stacked = Task.stack(streams)
    losses, slopes = gradients(Models(methods), stacked, TASKS)
    for i, (method, stream) in enumerate(zip(methods, streams)):
        found = losses[i], [slope[i] for slope in slopes]
        torch.testing.assert_close(found, gradients(Models([method]), stream, LOOP))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": MLP([4])}, "Conv4, and MLP has none"),
        ({"steps": 0}, "at least one in training, not 0"),
        ({"test_steps": -1}, "WarpMAML takes zero or more"),
        ({"fixed_blocks": 4}, "below 4, not 4"),
        ({"fixed_blocks": -1}, "below 4, not -1"),
        ({"norm": "joint"}, "norm batch or support, not 'joint'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    backbone: nn.Module = Conv4(4)
    with pytest.raises(RecipeError, match=message):
        WarpMAML(**{"backbone": backbone, **settings})
