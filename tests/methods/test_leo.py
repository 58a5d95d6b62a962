"""Laws of LEO: what is drawn and when, each term of its loss, and the second order of its meta-gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, loss_of, scored, single
from torch import Tensor, nn

from quickstudy.engine.models import LOOP, Models
from quickstudy.errors import RecipeError
from quickstudy.methods import LEO
from quickstudy.nn import Conv4
from quickstudy.task import Support, Task

TASKS, WAY = 4, 3


def batch(shot: int = 2, size: tuple[int, ...] = (7,), way: int = WAY) -> Task:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(way)

    def examples(count: int) -> Tensor:
        return torch.randn(TASKS, count, *size, dtype=torch.float64, generator=generator)

    support, query = (labels.repeat_interleave(n).expand(TASKS, -1) for n in (shot, 3))
    return Task(examples(way * shot), support, examples(way * 3), query, way)


def built(task: Task, seed: int = 0, backbone: nn.Module | None = None, kind: type[LEO] = LEO, **settings) -> LEO:
    torch.manual_seed(seed)
    method = kind(backbone or nn.Flatten(), **{"latents": 4, "inner_lr": 0.5, **settings})
    return method.build(single(task)).double()


def test_what_is_meta_learned_is_seven_tensors() -> None:
    method = built(batch()[0])
    shapes = {name: tuple(parameter.shape) for name, parameter in method.named_parameters()}
    assert shapes == {
        "encoder.weight": (4, 7),
        **{f"relation.{i}.weight": (8, 8) for i in range(3)},
        "decoder.weight": (14, 4),
        "inner_lr": (4,),
        "finetuning_lr": (7,),
    }
    published = LEO(nn.Flatten()).build(
        Task(torch.rand(5, 640), torch.arange(5), torch.rand(5, 640), torch.arange(5), 5)
    )
    assert sum(parameter.numel() for parameter in published.parameters()) == 172_736
    for weight in published.matrices:  # Glorot's uniform: of this bound, and near it somewhere
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.99 * bound < weight.abs().max().item() <= bound
    assert (published.inner_lr == 1).all()
    assert (published.finetuning_lr == 0.001).all()


class Mocked(LEO):
    """Latents, classifiers and embeddings are one number each, and the loss of ``w`` on ``x`` is ``x w^2``."""

    def encode(self, x: Tensor, same_class: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :1], x.new_zeros(())

    def decode(self, latents: Tensor, way: int) -> Tensor:
        return latents

    def support_loss(self, classifiers: Tensor, x: Tensor, *_: Tensor) -> Tensor:
        return (x * classifiers**2).sum()


@pytest.mark.parametrize(("steps", "finetuning"), [(0, 0), (1, 0), (3, 0), (1, 2), (0, 3)])
def test_steps_of_latents_and_of_classifiers_follow_the_slope(steps: int, finetuning: int) -> None:
    """From 4, with x = 4 and step sizes of 0.1: to 0.8, 0.16 and 0.032."""
    x = torch.full((2, 1), 4.0, dtype=torch.float64, requires_grad=True)
    task = Task(x, torch.arange(2), x, torch.arange(2), 2)
    settings = {"inner_lr": 0.1, "finetuning_lr": 0.1, "normalise": False, "dropout": 0.0, "latents": 1}
    method = built(task, kind=Mocked, steps=steps, finetuning_steps=finetuning, **settings)
    for mode in (True, False):
        state = method.train(mode).adapt(task.support)
        torch.testing.assert_close(state.weights, x * 0.2 ** (steps + finetuning))
        assert state.encoder_penalty.item() == pytest.approx((4 - 4 * 0.2**steps) ** 2 if mode else 0)


def test_relations_are_means_over_all_pairs() -> None:
    task = batch()[0]
    method = built(task)
    encoded = torch.randn(6, 4, dtype=torch.float64)
    first, second, third = method.relation
    pairs = torch.stack([torch.stack([torch.cat([a, b]) for b in encoded]) for a in encoded])
    expected = third(F.relu(second(F.relu(first(pairs))))).mean(1)
    torch.testing.assert_close(method.relate(encoded), expected)


def test_evaluation_draws_nothing_and_training_does() -> None:
    task, settings = batch()[0], {"dropout": 0.5}
    method = built(task, **settings)
    states = [method.train(mode).adapt(task.support) for mode in (False, False, True, True)]
    predictions = [method.eval().predict(state, task.query_x) for state in states]
    assert torch.equal(predictions[0], predictions[1])
    assert not torch.equal(predictions[2], predictions[3])
    for state in states[:2]:
        assert state.kl.item() == state.encoder_penalty.item() == 0
    for state in states[2:]:
        assert state.encoder_penalty.item() > 0
    training = method.train().predict(states[0], task.query_x)
    assert not torch.equal(training, method.predict(states[0], task.query_x))  # queries too lose numbers


def test_dropout_keeps_the_mean_and_drops_at_its_rate() -> None:
    method = built(batch()[0], dropout=0.3)
    torch.manual_seed(0)
    x = torch.ones(200_000, dtype=torch.float64)
    dropped = method.drop(x)
    assert torch.equal(dropped.unique(), torch.tensor([0.0, 1 / 0.7], dtype=torch.float64))
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(dropped, method.drop(x))
    assert method.eval().drop(x) is x


def test_the_divergence_is_a_sample_of_that_of_two_gaussians() -> None:
    """Its mean over many draws is the closed form; where a spread is at its bound, it has no slope."""
    task = batch()[0]
    method = built(task, dropout=0.0)
    raw = torch.tensor([0.5, 1.0, 0.2, -3.0], dtype=torch.float64, requires_grad=True)
    mean = torch.tensor([0.3, -0.2, 1.0, 0.1], dtype=torch.float64)
    method.relate = lambda encoded: torch.cat([mean, raw]).expand(len(encoded), -1)  # type: ignore[method-assign]
    same = torch.eye(6, dtype=torch.float64)
    torch.manual_seed(0)
    deviation = (raw.exp() - 1).clamp(min=1e-10)
    exact = (((deviation**2 + mean**2 - 1) / 2) - deviation.log()).mean()
    found = torch.stack([method.encode(task.support_x, same)[1] for _ in range(2000)]).mean()
    assert exact.item() > 0
    assert found.item() == pytest.approx(exact.item(), rel=0.02)
    found.backward()
    assert raw.grad is not None
    assert raw.grad[3] == 0
    assert (raw.grad[:3] != 0).all()


def test_each_support_example_has_latents_and_classifiers_of_its_own() -> None:
    """In training their draws differ within a class, whose examples have the same distribution."""
    task = batch()[0]
    method = built(task)
    nn.init.constant_(method.relation[2].weight, 0.5)  # spreads above their bound
    same = task.support.members.double()
    same = same.T @ same / 2
    latents, _ = method.encode(task.support_x, same)
    assert not torch.equal(latents[0], latents[1])
    classifiers = method.decode(torch.zeros_like(latents), WAY)  # of the mean zero: the spread alone
    assert classifiers.unique().numel() == classifiers.numel()
    assert classifiers.std().item() == pytest.approx(math.sqrt(2 / (7 + WAY)), rel=0.3)
    method.eval()
    latents, _ = method.encode(task.support_x, same)
    assert torch.equal(latents[0], latents[1])
    assert not torch.allclose(latents[0], latents[2])


def test_the_meta_loss_is_the_sum_of_its_five_terms() -> None:
    task = batch()[0]
    weights = {"kl": 0.3, "encoder_penalty": 0.7, "l2_penalty": 0.05, "orthogonality_penalty": 0.2}
    method = built(task, **{f"{term}_weight": weight for term, weight in weights.items()})

    def run(function):
        torch.manual_seed(1)
        return function()

    loss = run(lambda: method.loss(task))
    state = run(lambda: method.adapt(task.support))
    plain = built(task, **{f"{term}_weight": 0.0 for term in weights})
    query = run(lambda: plain.loss(task))
    squares = sum((weight**2).sum() for weight in method.matrices)
    rows = method.decoder.weight.T
    correlations = torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in rows]) for a in rows])
    off = ((correlations - torch.eye(4)) ** 2).mean()
    expected = query + 0.3 * state.kl + 0.7 * state.encoder_penalty + 0.05 * squares / 2 + 0.2 * off
    torch.testing.assert_close(loss, expected)
    quiet = method.eval().loss(task)
    torch.testing.assert_close(quiet, plain.eval().loss(task) + 0.05 * squares / 2 + 0.2 * off)


def test_the_last_latents_are_constants_of_the_encoder_penalty() -> None:
    """Its slope is that of a first latent alone: nothing comes through the inner steps, decoder or step sizes."""
    task = batch()[0]
    method = built(task)
    torch.manual_seed(0)
    state = method.adapt(task.support)
    slopes = torch.autograd.grad(state.encoder_penalty, list(method.parameters()), materialize_grads=True)
    named = dict(zip((name for name, _ in method.named_parameters()), slopes))
    assert named["encoder.weight"].any()
    assert not named["decoder.weight"].any()
    assert not named["inner_lr"].any()


def test_the_meta_gradient_is_that_of_finite_differences() -> None:
    """Of every parameter, step sizes too: second derivatives through all ten steps."""
    task = batch()[0]
    method = built(task, dropout=0.3, kl_weight=0.1, encoder_penalty_weight=0.0)
    nn.init.constant_(method.relation[2].weight, 0.1)  # not where a spread meets its bound
    nn.init.constant_(method.finetuning_lr, 0.1)
    loss = loss_of(method, task)

    def same_draws(*values: Tensor) -> Tensor:
        torch.manual_seed(0)
        return loss(*values)

    parameters = [parameter.detach().requires_grad_() for parameter in method.parameters()]
    slopes = torch.autograd.grad(same_draws(*parameters), parameters)
    assert all(slope.any() for slope in slopes)
    assert torch.autograd.gradcheck(same_draws, parameters, fast_mode=True)


def test_inner_steps_lower_the_support_loss() -> None:
    task = batch()[0]
    losses = []
    for steps, finetuning in ((0, 0), (5, 0), (5, 5)):
        method = built(task, steps=steps, finetuning_steps=finetuning, inner_lr=0.1, finetuning_lr=0.1).eval()
        losses.append(
            F.cross_entropy(method.predict(method.adapt(task.support), task.support_x), task.support_y).item()
        )
    assert losses[0] > losses[1] > losses[2]


def test_steps_are_of_the_sum_over_the_support_set() -> None:
    """Every example twice: the same averages, so twice the step."""
    task = batch()[0]
    x, y = (torch.cat([tensor, tensor]) for tensor in (task.support_x, task.support_y))
    once = built(task, steps=0, finetuning_steps=1, finetuning_lr=0.2).eval()
    twice = built(task, steps=0, finetuning_steps=1, finetuning_lr=0.2).eval()
    still = built(task, steps=0, finetuning_steps=0).eval()
    start = still.adapt(task.support).weights
    one = once.adapt(task.support).weights - start
    # A classifier of a class that is an average over twice as many moves half as far for the same slope of the average.
    two = twice.adapt(Support(x, y, WAY)).weights - start
    torch.testing.assert_close(two, one)
    assert one.any()


@pytest.mark.parametrize("shot", [1, 3])
def test_neither_order_nor_number_of_examples_and_classes_is_fixed(shot: int) -> None:
    task = batch(shot)[0]
    method = built(batch()[0]).eval()
    mixed = torch.randperm(len(task.support_x), generator=torch.Generator().manual_seed(0))
    expected = method.predict(method.adapt(task.support), task.query_x)
    found = method.predict(method.adapt(Support(task.support_x[mixed], task.support_y[mixed], WAY)), task.query_x)
    torch.testing.assert_close(found, expected)
    wider = batch(shot, way=5)[0]
    method.check(wider)
    assert method.predict(method.adapt(wider.support), wider.query_x).shape == (15, 5)
    with pytest.raises(RecipeError, match="inputs of 7 and cannot take 8"):
        method.check(batch(size=(8,))[0])


def test_embeddings_are_scaled_to_length_one() -> None:
    task = batch()[0]
    longer = task.map(lambda tensor: 10 * tensor if tensor.is_floating_point() else tensor)
    for normalise in (True, False):
        method = built(task, normalise=normalise).eval()
        found = [method.predict(method.adapt(each.support), each.query_x) for each in (task, longer)]
        assert torch.allclose(found[0], found[1]) == normalise
    zeros = torch.zeros(1, 7, dtype=torch.float64)
    assert built(task).eval().predict(method.adapt(task.support), zeros).isfinite().all()


FEW = {"steps": 1, "finetuning_steps": 1, "finetuning_lr": 0.1}
"""Steps enough for what batching and tracing could do wrong."""

BACKBONES = {
    "embeddings": (batch(), nn.Flatten, {}),
    "images": (batch(size=(1, 8, 8)), lambda: Conv4(3, blocks=2), {"norm": "support"}),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_loop_vmap_and_chunks_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same noise, and nothing dropped: what is drawn depends on how many tasks run at once."""
    monkeypatch.setattr(LEO, "noise", lambda self, like: torch.linspace(-1, 1, like.numel()).double().view(like.shape))
    tasks, backbone, settings = BACKBONES[name]
    models = Models([built(tasks[0], backbone=backbone(), dropout=0.0, **FEW, **settings)])
    expected = gradients(models, tasks, LOOP), scored(models, tasks, LOOP)
    assert all(slope.any() for slope in expected[0][1])
    for chunk in (TASKS, 3):
        torch.testing.assert_close((gradients(models, tasks, chunk), scored(models, tasks, chunk)), expected)


def test_stacked_seeds_equal_each_alone() -> None:
    tasks = batch()
    methods = [built(tasks[0], seed, **FEW).eval() for seed in range(2)]
    both = tasks.map(lambda tensor: torch.stack([tensor, tensor.flip(0)]))
    together = scored(Models(methods), both, 2)
    for i, method in enumerate(methods):
        torch.testing.assert_close(together[i], scored(Models([method]), both[i], LOOP))


@pytest.mark.parametrize("chunk", [LOOP, TASKS])
def test_a_trace_draws_as_the_function_does(chunk: int) -> None:
    """The same numbers from the same seed, other ones in every task and update."""
    models, tasks = Models([built(batch()[0], **FEW)]), batch()
    found = []
    for traced in (True, False, True):  # the first makes the trace
        torch.manual_seed(0)
        found.append(gradients(models, tasks, chunk, traced))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[1])
    assert not torch.allclose(gradients(models, tasks, chunk, traced=True)[0], found[0][0])
    same = tasks.map(lambda tensor: tensor[:1].expand(tensor.shape))
    assert gradients(models, same, chunk)[0].unique().numel() == TASKS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latents": 0}, "at least one latent dimension"),
        ({"steps": -1}, "zero or more steps"),
        ({"finetuning_steps": -1}, "zero or more steps"),
        ({"dropout": 1.0}, "below 1"),
    ],
)
def test_a_wrong_setting_is_explained(settings: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        LEO(nn.Flatten(), **settings)


def test_regression_is_refused() -> None:
    x = torch.rand(5, 3)
    method = LEO(nn.Flatten(), latents=2).build(Task(x, x, x, x))
    with pytest.raises(RecipeError, match="a regression task has none"):
        method.adapt(Support(x, x, None))
