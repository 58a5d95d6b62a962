"""The same numbers, however tasks and seeds are batched."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import Recurrent, single
from torch import Tensor, nn

from quickstudy.data.base import Dataset
from quickstudy.engine.evaluate import evaluate
from quickstudy.engine.models import LOOP, Models, fastest_chunk, meta_loss, scores
from quickstudy.engine.recipe import Recipe, Training, Validation
from quickstudy.engine.train import Group, build_methods
from quickstudy.errors import BackboneError
from quickstudy.methods import MAML, MatchingNet, Method, ProtoNet, Reptile
from quickstudy.methods.inner import Adam
from quickstudy.nn import MLP, Conv4
from quickstudy.task import Task, TaskShape

TASKS = 5


def batch() -> Task:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3)
    return Task(
        torch.rand(TASKS, 6, 1, 16, 16, dtype=torch.float64, generator=generator),
        labels.repeat_interleave(2).expand(TASKS, -1),
        torch.rand(TASKS, 9, 1, 16, 16, dtype=torch.float64, generator=generator),
        labels.repeat_interleave(3).expand(TASKS, -1),
        3,
    )


def conv() -> nn.Module:
    return Conv4(channels=4)


def mlp() -> nn.Module:
    return MLP([8, 6], batch_norm=True)


METHODS = {
    "maml": lambda: MAML(conv(), inner_lr=0.1, steps=2),
    "fomaml": lambda: MAML(mlp(), inner_lr=0.1, steps=2, order=1),
    "maml, support statistics": lambda: MAML(mlp(), inner_lr=0.1, steps=2, norm="support"),
    "anil": lambda: MAML(mlp(), inner_lr=0.1, steps=2, adapts="head", clip=0.05),
    "meta-sgd": lambda: MAML(mlp(), steps=1, inner_lr_learned="weight", inner_lr_range=(0.005, 0.1)),
    "protomaml": lambda: MAML(mlp(), inner_lr=0.1, steps=2, head_start="prototypes"),
    "reptile": lambda: Reptile(mlp(), Adam(0.01, beta1=0), steps=2, batch=4),
    "protonet": lambda: ProtoNet(conv()),
    "protonet, centred": lambda: ProtoNet(mlp(), normalise="centred-l2"),
    "protonet, joint": lambda: ProtoNet(mlp(), norm="joint", distance="cosine"),
    "protonet, support statistics": lambda: ProtoNet(conv(), norm="support"),
    "matching": lambda: MatchingNet(conv(), norm="support"),
    "matching, full contexts": lambda: MatchingNet(mlp(), fce="concat", norm="joint"),
    "matching, full contexts, summed": lambda: MatchingNet(conv(), distance="euclidean", fce="sum"),
}


def built(make, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    return make().build(single(batch()[0])).double()


def results(models: Models, tasks: Task, chunk: int, traced: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """Losses, meta-gradient and scores."""
    losses, total = [], None
    for values, gradients in models.differentiate(meta_loss, tasks, chunk, traced=traced):
        losses.append(values)
        total = gradients if total is None else [a + b for a, b in zip(total, gradients)]
    assert total is not None
    with torch.no_grad():
        scored = torch.cat(list(models.run(scores, tasks, chunk, traced=traced)), dim=int(models.stacked))
    return torch.cat(losses, dim=-1), total, scored


@pytest.mark.parametrize("name", METHODS)
def test_loop_vmap_chunks_and_traces_are_equal(name: str) -> None:
    models, tasks = Models([built(METHODS[name])]), batch()
    expected = results(models, tasks, LOOP, traced=False)
    for chunk, traced in ((TASKS, False), (2, False), (LOOP, True), (TASKS, True)):
        torch.testing.assert_close(results(models, tasks, chunk, traced), expected)


@pytest.mark.parametrize("name", METHODS)
def test_stacked_seeds_equal_each_alone(name: str) -> None:
    methods = [built(METHODS[name], seed) for seed in range(3)]
    streams = [batch()[i : i + 3] for i in range(3)]
    stacked = Task.stack(streams)
    together = results(Models(methods), stacked, 2, traced=True)
    for i, (method, stream) in enumerate(zip(methods, streams)):
        alone = results(Models([method]), stream, LOOP, traced=False)
        torch.testing.assert_close(together[0][i], alone[0])
        torch.testing.assert_close([gradient[i] for gradient in together[1]], alone[1])
        torch.testing.assert_close(together[2][i], alone[2])


def test_a_trace_gives_the_same_bits() -> None:
    tasks = single(batch())
    models = Models([built(METHODS["maml"]).float()])
    for chunk in (LOOP, TASKS):
        plain, traced = (results(models, tasks, chunk, traced) for traced in (False, True))
        for a, b in zip((plain[0], *plain[1], plain[2]), (traced[0], *traced[1], traced[2])):
            assert torch.equal(a, b)


class Sampled(Dataset):
    """Random images of ten classes, drawn anew for every seed and task."""

    name = "sampled"

    def split(self, split):
        return self

    def to(self, device):
        return self

    def tasks(self, shape: TaskShape, start: int, stop: int, *, seed: int) -> Task:
        assert shape.way is not None
        made = []
        labels = torch.arange(shape.way)
        for number in range(start, stop):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            x = torch.rand(shape.way * (shape.shot + shape.queries), 1, 16, 16, generator=generator)
            first = shape.way * shape.shot
            support, query = labels.repeat_interleave(shape.shot), labels.repeat_interleave(shape.queries)
            made.append(Task(x[:first], support, x[first:], query, shape.way))
        return Task.stack(made)


def recipe(**training) -> Recipe:
    settings = {"task": TaskShape(3, 2, 3), "meta_batch": 4, "updates": 6, "precision": "float64", "trace": False}
    return Recipe(
        Sampled(),
        MAML(mlp(), inner_lr=0.1, steps=1),
        Training(**{**settings, **training}),
        Validation(every=3, tasks=6),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
        schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    )


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.05}, {"clip_parameter_norm": 0.02}, {"clip_value": 0.01}])
def test_training_seeds_together_equals_training_each(clip: dict[str, float]) -> None:
    """Norms, clips, validation and best states are kept per seed, and tasks drawn per seed."""
    seeds = [3, 7]

    def trained(group_seeds: list[int]) -> Group:
        group = Group(recipe(**clip), group_seeds, build_methods(recipe, group_seeds), "cpu")
        group.validate()
        for _ in range(6):
            group.update()
        group.validate()
        return group

    together = trained(seeds)
    for i, seed in enumerate(seeds):
        alone = trained([seed])
        torch.testing.assert_close(together.models.state(i), alone.models.state(0))
        torch.testing.assert_close(together.best[i], alone.best[0])
        mine = [row for row in together.history if row["seed"] == seed]
        for ours, theirs in zip(mine, alone.history):
            assert ours["val_score"] == pytest.approx(theirs["val_score"])
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], nan_ok=True)


def test_clipping_after_every_task_does_not_depend_on_how_many_run_at_once() -> None:
    def gradients(seeds: list[int], chunk: int) -> list[Tensor]:
        clip = {"clip_value": 0.02, "clip_each_task": True}
        group = Group(recipe(**clip), seeds, build_methods(recipe, seeds), "cpu")
        return group.gradients(group.batch(0), chunk)[0]

    alone = [gradients([seed], LOOP) for seed in (3, 7)]
    for chunk in (1, 3, 4):
        torch.testing.assert_close(gradients([3], chunk), alone[0])
        torch.testing.assert_close(gradients([3, 7], chunk), [torch.stack(parts) for parts in zip(*alone)])
    unclipped = Group(recipe(), [3], build_methods(recipe, [3]), "cpu")
    assert not torch.allclose(unclipped.gradients(unclipped.batch(0), 4)[0][0], alone[0][0])


def test_mean_and_sum_differ_by_the_size_of_the_meta_batch() -> None:
    gradients = {}
    for reduction in ("mean", "sum"):
        group = Group(recipe(reduction=reduction), [0], build_methods(recipe, [0]), "cpu")
        gradients[reduction], _ = group.gradients(group.batch(0), LOOP)
    torch.testing.assert_close([4 * gradient for gradient in gradients["mean"]], gradients["sum"])


def test_evaluation_does_not_depend_on_how_many_tasks_run_at_once() -> None:
    models = Models([method.double() for method in build_methods(recipe, [0])])
    source, shape = Sampled(), TaskShape(3, 1, 4)

    def cast(task: Task) -> Task:
        return task.map(lambda t: t.double() if t.is_floating_point() else t)

    expected, _ = evaluate(models, source, shape, [0], tasks=60, chunk=LOOP, cast=cast, traced=False)
    assert expected.shape == (1, 60, 2)
    for chunk in (1, 7, 50):
        found, _ = evaluate(models, source, shape, [0], tasks=60, chunk=chunk, cast=cast, traced=True)
        torch.testing.assert_close(found, expected)
    later, _ = evaluate(models, source, shape, [0], tasks=10, first=50, chunk=5, cast=cast)
    torch.testing.assert_close(later, expected[:, 50:])


def test_half_precision_is_near_and_not_equal() -> None:
    found = {}
    for precision in ("float32", "bfloat16"):

        def make(precision: str = precision) -> Recipe:
            return recipe(precision=precision)

        group = Group(make(), [0], build_methods(make, [0]), "cpu")
        _, found[precision] = group.gradients(group.batch(0), LOOP)
    assert found["bfloat16"] != found["float32"]
    torch.testing.assert_close(found["bfloat16"], found["float32"], rtol=0.1, atol=0.1)


def test_networks_without_a_vmap_rule_run_in_a_loop() -> None:
    def make() -> Recipe:
        return dataclasses.replace(recipe(precision="float32"), method=ProtoNet(Recurrent(16)))

    group = Group(make(), [0], build_methods(make, [0]), "cpu")
    group.update()
    assert group.chunks["train"] == LOOP
    forced = dataclasses.replace(make(), train=dataclasses.replace(make().train, batching="vmap"))
    with pytest.raises(BackboneError, match="Recurrent cannot run under it"):
        Group(forced, [0], build_methods(make, [0]), "cpu").update()


def test_fastest_chunk_tries_and_skips_what_fails() -> None:
    import time

    def trial(chunk: int) -> None:
        if chunk > 4:
            raise RuntimeError("out of memory")
        time.sleep(0.001 if chunk == 4 else 0.02)

    assert fastest_chunk(trial, 16, loop=True) == 4
    assert fastest_chunk(trial, 16, loop=True, only_loop=True) == LOOP
    with pytest.raises(BackboneError, match="out of memory"):
        fastest_chunk(lambda chunk: trial(9), 2, loop=True)
