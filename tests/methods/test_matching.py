"""Laws of matching networks: what a query attends to, in which context, and what its class is worth."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, loss_of, single
from torch import Tensor, nn

from quickstudy.engine.models import LOOP, Models
from quickstudy.errors import RecipeError
from quickstudy.methods import MatchingNet, NearestNeighbour, ProtoNet
from quickstudy.methods.matching import AttentionLSTM
from quickstudy.nn import MLP, Conv4
from quickstudy.task import Support, Task

FORMS = ["none", "concat", "sum"]
CONTEXTS = FORMS[1:]


def batch(size: tuple[int, ...] = (4,), tasks: int = 3) -> Task:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3)

    def images(count: int) -> Tensor:
        return torch.rand(tasks, count, *size, dtype=torch.float64, generator=generator)

    support, query = (labels.repeat_interleave(n).expand(tasks, -1) for n in (2, 3))
    return Task(images(6), support, images(9), query, 3)


def built(task: Task, backbone: nn.Module | None = None, **settings) -> MatchingNet:
    torch.manual_seed(0)
    method = MatchingNet(backbone or nn.Flatten(), **settings)
    return method.build(single(task)).double()


def predicted(method: MatchingNet | ProtoNet | NearestNeighbour, task: Task) -> Tensor:
    return method.predict(method.adapt(task.support), task.query_x)


def cosine_distance(queries: Tensor, points: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(queries[:, None], points[None], dim=-1)


DISTANCES = {"cosine": cosine_distance, "euclidean": lambda queries, points: torch.cdist(queries, points) ** 2}


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_a_class_has_the_attention_of_its_examples(distance: str, temperature: float) -> None:
    """Of queries to the support set, whatever the order of its labels and however many each class has."""
    task = batch()[0]
    y = torch.tensor([2, 0, 2, 1, 2, 0])
    task = Task(task.support_x, y, task.query_x, task.query_y, 3)
    attention = (-DISTANCES[distance](task.query_x, task.support_x) / temperature).softmax(-1)
    assert attention.shape == (9, 6)
    expected = attention @ F.one_hot(y).double()
    method = built(task, distance=distance, temperature=temperature)
    torch.testing.assert_close(predicted(method, task).exp(), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(expected.sum(1), torch.ones(9).double())
    nll = -expected[torch.arange(9), task.query_y].log().mean()
    torch.testing.assert_close(method.loss(task), nll, rtol=1e-7, atol=0)


@pytest.mark.parametrize("norm", ["batch", "support", "joint"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_of_one_shot_without_context_it_is_a_prototypical_network(distance: str, norm: str) -> None:
    task = batch((1, 16, 16))[0]
    task = Task(task.support_x[::2], task.support_y[::2], task.query_x, task.query_y, 3)
    method = built(task, Conv4(4), distance=distance, norm=norm)
    other = ProtoNet(method.backbone, distance=distance, norm=norm)
    torch.testing.assert_close(predicted(method, task), predicted(other, task).log_softmax(-1))


@pytest.mark.parametrize("distance", DISTANCES)
def test_in_the_cold_it_is_the_nearest_neighbour(distance: str) -> None:
    task = batch()[0]
    cold = predicted(built(task, distance=distance, temperature=1e-5), task)
    nearest = predicted(NearestNeighbour(distance=distance), task)
    assert torch.equal(cold.argmax(-1), nearest.argmax(-1))
    torch.testing.assert_close(cold.exp().amax(-1), torch.ones(9).double())


@pytest.mark.parametrize("way", [5, 20])
def test_the_cosine_is_bounded_and_a_temperature_lifts_the_bound(way: int) -> None:
    """A perfect embedding of classes in directions at right angles."""
    x, y = torch.eye(way).double(), torch.arange(way)
    task = Task(x, y, x, y, way)
    best = predicted(built(task), task).exp().amax(-1)
    bound = math.e / (math.e + way - 1)
    torch.testing.assert_close(best, torch.full((way,), bound).double())
    assert (predicted(built(task, temperature=0.1), task).exp().amax(-1) > 0.99).all()


def test_a_query_far_from_its_class_has_a_finite_loss_and_a_gradient() -> None:
    """There is no bound on probabilities behind which the loss would be constant."""
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[0.0], [30.0]], dtype=dtype)
        query = torch.tensor([[30.0]], dtype=dtype, requires_grad=True)
        task = Task(x, torch.tensor([0, 1]), query, torch.tensor([0]), 2)
        loss = built(task, distance="euclidean").to(dtype).loss(task)
        torch.testing.assert_close(loss, torch.tensor(900.0, dtype=dtype))
        (slope,) = torch.autograd.grad(loss, query)
        torch.testing.assert_close(slope, torch.tensor([[60.0]], dtype=dtype))


@pytest.mark.parametrize("fce", FORMS)
def test_only_support_statistics_make_predictions_independent(fce: str) -> None:
    task = batch((1, 16, 16))[0]
    for norm, independent in (("support", True), ("batch", False), ("joint", False)):
        method = built(task, Conv4(4), fce=fce, norm=norm)
        state = method.adapt(task.support)
        whole, part = method.predict(state, task.query_x), method.predict(state, task.query_x[:4])
        assert torch.allclose(whole[:4], part) == independent
        if independent:
            torch.testing.assert_close(torch.cat([method.predict(state, x[None]) for x in task.query_x]), whole)


@pytest.mark.parametrize("fce", FORMS)
def test_joint_is_one_pass_of_both_sets(fce: str) -> None:
    task = batch((1, 16, 16))[0]
    method = built(task, Conv4(4), fce=fce, norm="joint")
    embedding = method.embed(torch.cat([task.support_x, task.query_x]))
    method.backbone = nn.Flatten()
    flat = Task(embedding[:6], task.support_y, embedding[6:], task.query_y, 3)
    expected = predicted(method, flat)
    method.set_norm("support")  # without batch norms all three are the same
    torch.testing.assert_close(predicted(method, flat), expected)
    torch.testing.assert_close(predicted(built(task, Conv4(4), fce=fce, norm="joint"), task), expected)


@pytest.mark.parametrize("fce", FORMS)
def test_the_order_of_the_support_set_matters_in_context_only(fce: str) -> None:
    task = batch()[0]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    turned = Task(task.support_x[order], task.support_y[order], task.query_x, task.query_y, 3)
    method = built(task, fce=fce)
    same = torch.allclose(predicted(method, turned), predicted(method, task), rtol=1e-12, atol=1e-13)
    assert same == (fce == "none")


@pytest.mark.parametrize("fce", CONTEXTS)
def test_a_method_built_for_one_way_takes_any(fce: str) -> None:
    task = batch()[0]
    method = built(task, fce=fce)
    fewer = Task(task.support_x[:4], task.support_y[:4], task.query_x[:6], task.query_y[:6], 2)
    method.check(fewer)
    assert predicted(method, fewer).shape == (6, 2)


@pytest.mark.parametrize("fce", CONTEXTS)
def test_lstms_of_zeros_add_no_context(fce: str) -> None:
    task = batch()[0]
    method = built(task, fce=fce)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.zero_()
    torch.testing.assert_close(predicted(method, task), predicted(built(task), task), rtol=0, atol=0)


@pytest.mark.parametrize("fce", CONTEXTS)
def test_the_context_of_the_support_set_is_an_lstm_in_both_directions(fce: str) -> None:
    task = batch()[0]
    method = built(task, fce=fce)
    assert [name for name, _ in built(task).named_parameters()] == []
    theirs = nn.LSTM(4, 4, bidirectional=True).double()
    for cell, suffix in ((method.g.onward, "l0"), (method.g.backward, "l0_reverse")):
        theirs.load_state_dict({f"{n}_{suffix}": w for n, w in cell.state_dict().items()}, strict=False)
    onward, backward = theirs(task.support_x)[0].split(4, -1)
    points = method.adapt(task.support).points  # type: ignore[union-attr]
    torch.testing.assert_close(points, onward + backward + task.support_x)


@pytest.mark.parametrize("reading", CONTEXTS)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_attention_lstm_by_hand(reading: str, steps: int) -> None:
    """One query after the other; in the concatenating form with a recurrent state, [h; r], of twice the size."""
    task = batch()[0]
    ours = built(task, fce=reading, processing_steps=steps).f
    weights = ours.cell.weight_ih, ours.cell.weight_hh
    recurrent = torch.cat([weights[1], weights[0][:, 4:]], 1) if reading == "concat" else weights[1]
    points, expected = task.support_x, []
    for query in task.query_x:
        h, c = query, torch.zeros(4).double()
        for _ in range(steps):
            r = sum(a * point for a, point in zip(torch.stack([h @ p for p in points]).softmax(0), points))
            state = torch.cat([h, r]) if reading == "concat" else h + r
            gates = weights[0][:, :4] @ query + recurrent @ state + ours.cell.bias_ih + ours.cell.bias_hh
            i, f, g, o = gates.split(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh() + query
        expected.append(h)
    torch.testing.assert_close(ours(task.query_x, points), torch.stack(expected))


def test_to_add_is_to_concatenate_with_one_matrix_for_both() -> None:
    task = batch()[0]
    torch.manual_seed(0)
    side, added = (AttentionLSTM(4, reading, steps=3).double() for reading in CONTEXTS)
    state = added.cell.state_dict()
    side.cell.load_state_dict({**state, "weight_ih": torch.cat([state["weight_ih"], state["weight_hh"]], 1)})
    torch.testing.assert_close(side(task.query_x, task.support_x), added(task.query_x, task.support_x))


@pytest.mark.parametrize("reading", CONTEXTS)
def test_the_attention_lstm_reads_a_set(reading: str) -> None:
    """In no order, so that an example there twice is as if all were; queries do not see each other."""
    task = batch()[0]
    torch.manual_seed(0)
    f = AttentionLSTM(4, reading, steps=2).double()
    expected = f(task.query_x, task.support_x)
    torch.testing.assert_close(f(task.query_x, task.support_x.flip(0).repeat(2, 1)), expected)
    torch.testing.assert_close(f(task.query_x.flip(0), task.support_x), expected.flip(0))
    torch.testing.assert_close(f(task.query_x[3:4], task.support_x), expected[3:4])


def test_the_sizes_of_the_lstms() -> None:
    task = batch((64,))[0]
    for fce, size in {"concat": 49_664, "sum": 33_280}.items():
        method = built(task, fce=fce)
        assert sum(p.numel() for p in method.g.parameters()) == 66_560
        assert sum(p.numel() for p in method.f.parameters()) == size


CASES = {
    "cosine": lambda: MatchingNet(MLP([3], batch_norm=True), norm="support"),
    "concat": lambda: MatchingNet(MLP([3]), fce="concat", temperature=0.5),
    "sum": lambda: MatchingNet(MLP([3], batch_norm=True), distance="euclidean", fce="sum", norm="joint"),
}


def made(name: str) -> MatchingNet:
    torch.manual_seed(0)
    return CASES[name]().build(single(batch()[0])).double()


@pytest.mark.parametrize("name", CASES)
def test_meta_gradient_against_finite_differences(name: str) -> None:
    method = made(name)
    values = [p.detach().clone().requires_grad_() for p in method.parameters()]
    assert torch.autograd.gradcheck(loss_of(method, batch()[0]), values, eps=1e-6, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_a_gradient_batched_or_not(name: str) -> None:
    models, tasks = Models([made(name)]), batch()
    expected = gradients(models, tasks, LOOP)
    assert all(slope.abs().max() > 0 for slope in expected[1])
    torch.testing.assert_close(gradients(models, tasks, len(tasks), traced=True), expected)
    assert all(program.__name__ == "program" for program in models._programs.values())  # none fell back


@pytest.mark.parametrize("norm", ["batch", "joint"])
def test_regression_is_refused(norm: str) -> None:
    x = torch.rand(5, 4)
    task = Task(x, torch.rand(5, 1), x, torch.rand(5, 1))
    with pytest.raises(RecipeError, match="regression"):
        predicted(MatchingNet(nn.Flatten(), norm=norm).build(task), task)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature above zero, not by 0"),
        ({"temperature": -1.0}, "not by -1.0"),
        ({"temperature": math.nan}, "not by nan"),
        ({"processing_steps": 0}, "at least one processing step, not 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        MatchingNet(nn.Flatten(), **settings)


def test_a_support_set_of_any_order_and_balance_keeps_its_labels() -> None:
    """Without context, turning the support set changes nothing, and renaming the classes only their names."""
    task = batch()[0]
    method = built(task)
    expected = predicted(method, task)
    order, names = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 0, 1])
    turned = Support(task.support_x[order], names[task.support_y[order]], 3)
    torch.testing.assert_close(method.predict(method.adapt(turned), task.query_x)[:, names], expected)
