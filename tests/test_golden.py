"""Ours against the authors' code: every array of every golden case, in float64."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import single
from torch import Tensor, nn

from quickstudy.data.base import Dataset
from quickstudy.engine.models import Models, meta_loss
from quickstudy.engine.recipe import Recipe, Training
from quickstudy.engine.train import Group
from quickstudy.methods import (
    LEO,
    MAML,
    OPLSTM,
    SAP,
    MatchingNet,
    MetaLSTM,
    Method,
    PlainLSTM,
    ProtoNet,
    TNet,
    WarpMAML,
    task_score,
    tnet,
)
from quickstudy.methods.nearest import Neighbours
from quickstudy.methods.protonet import distances, prototypes
from quickstudy.nn import MLP, Conv4, replayed
from quickstudy.task import Support, Task, TaskShape

FOLDER = Path(__file__).parent / "golden"
Case = dict[str, Tensor]


def load(name: str) -> Case:
    return {key: torch.from_numpy(value) for key, value in np.load(FOLDER / f"{name}.npz").items()}


def assert_golden(ours: Tensor, stored: Tensor, *, relative: float = 1e-10) -> None:
    bound = max(relative * stored.abs().max().item() + 1e-12, 1e-3 * relative)
    assert (ours.detach() - stored).abs().max().item() <= bound


def task_of(case: Case, prefix: str = "", way: int | None = None) -> Task:
    return Task(*(case[f"{prefix}{name}"] for name in ("support_x", "support_y", "query_x", "query_y")), way=way)


def mlp_names(layers: int, norm: bool) -> dict[str, str]:
    """Golden name -> ours, of an MLP with ``layers`` hidden layers and a head."""
    names = {}
    for i in range(layers):
        names[f"W{i + 1}"], names[f"b{i + 1}"] = f"backbone.linears.{i}.weight", f"backbone.linears.{i}.bias"
        if norm:
            names[f"bn{i + 1}.scale"] = f"backbone.norms.{i}.weight"
            names[f"bn{i + 1}.shift"] = f"backbone.norms.{i}.bias"
    names[f"W{layers + 1}"], names[f"b{layers + 1}"] = "head.weight", "head.bias"
    return names


def smallconv_names() -> dict[str, str]:
    names = {"head.W": "head.weight", "head.b": "head.bias"}
    for i in range(2):
        names |= {f"conv{i + 1}.{kind}": f"backbone.convs.{i}.{kind}" for kind in ("weight", "bias")}
        names |= {f"bn{i + 1}.scale": f"backbone.norms.{i}.weight", f"bn{i + 1}.shift": f"backbone.norms.{i}.bias"}
    return names


def conv_names() -> dict[str, str]:
    names = {"head.weight": "head.weight", "head.bias": "head.bias"}
    for i in range(4):
        for kind in ("weight", "bias"):
            names[f"block{i + 1}.conv.{kind}"] = f"backbone.convs.{i}.{kind}"
            names[f"block{i + 1}.bn.{kind}"] = f"backbone.norms.{i}.{kind}"
    return names


def build(method: Method, task: Task, case: Case, names: dict[str, str]) -> Method:
    """Build a method for a task and give it the parameters of a case."""
    method.build(single(task)).double()
    own = method.state_dict()
    state = {ours: case[f"param.{theirs}"] for theirs, ours in names.items() if ours in own}
    method.load_state_dict(state)
    return method


NETS = {
    "maml_sine_T3": (lambda: MLP([7, 7, 7]), mlp_names(3, False), None),
    "maml_sine_T3_clip": (lambda: MLP([7, 7, 7]), mlp_names(3, False), None),
    "maml_mlpbn_T2": (lambda: MLP([16, 12, 8, 8], batch_norm=True), mlp_names(4, True), 5),
    "maml_smallconv_T2": (lambda: Conv4(channels=4, blocks=2), smallconv_names(), 5),
    "protonet_mlpbn": (lambda: MLP([16, 12, 8, 8], batch_norm=True), mlp_names(4, True), 5),
    "protonet_smallconv": (lambda: Conv4(channels=4, blocks=2), smallconv_names(), 5),
}


@pytest.mark.parametrize("name", [name for name in NETS if name.startswith("maml")])
@pytest.mark.parametrize("order", [1, 2])
def test_maml(name: str, order: int) -> None:
    network, names, way = NETS[name]
    case, steps = load(name), int(load(name)["T"])
    task = task_of(case, way=way)
    clip = float(case["grad_clip"]) if "grad_clip" in case else None
    method = MAML(network(), inner_lr=float(case["base_lr"]), steps=steps, order=order, clip=clip)
    build(method, task, case, names)

    for step in range(1, steps + 1):
        method.steps = step
        weights = method.adapt(task.support).weights
        for theirs, ours in names.items():
            assert_golden(weights[ours], case[f"adapted.{theirs}.step{step}"])

    prediction = method.predict(method.adapt(task.support), task.query_x)
    assert_golden(prediction, case["query_pred" if way is None else "query_logits"])
    loss = method.loss(task)
    assert_golden(loss, case["query_loss"])
    loss.backward()
    gradients = {key: p.grad for key, p in method.named_parameters()}
    for theirs, ours in names.items():
        assert_golden(gradients[ours], case[f"grad{order}.{theirs}"])


@pytest.mark.parametrize("name", [name for name in NETS if name.startswith("protonet")])
def test_protonet(name: str) -> None:
    network, names, way = NETS[name]
    case = load(name)
    task = task_of(case, way=way)
    method = build(ProtoNet(network()), task, case, names)
    assert_golden(method.embed(task.support_x), case["support_embedding"])
    assert_golden(method.embed(task.query_x), case["query_embedding"])
    assert_golden(method.predict(method.adapt(task.support), task.query_x), case["query_logits"])
    loss = method.loss(task) * case["loss_scale"]
    assert_golden(loss, case["query_loss"])
    loss.backward()
    for key, parameter in method.named_parameters():
        assert_golden(parameter.grad, case[f"grad.{ {o: t for t, o in names.items()}[key] }"])


class Fixed(Dataset):
    """The tasks of a golden case as a dataset; only their sizes are ever looked at."""

    name, metric = "golden", "mse"

    def __init__(self, example: Task) -> None:
        self.example = example

    def split(self, split):
        return self

    def tasks(self, shape, start, stop, *, seed):
        return self.example.map(lambda tensor: tensor[None])

    def to(self, device):
        return self


def test_outer_loop_clips_the_running_sum() -> None:
    case = load("outer_maml_sine_clip")
    names = mlp_names(3, False)
    tasks = [task_of(case, f"task{i}.") for i in range(1, 5)]
    clip = float(case["grad_clip"])
    method = MAML(MLP([7, 7, 7]), inner_lr=float(case["base_lr"]), steps=int(case["T"]), clip=clip)
    build(method, tasks[0], case, names)
    size = int(case["meta_batch_size"])
    training = Training(
        TaskShape(None, 5, 10), size, 2, "sum", clip_value=clip, clip_each_task=True, precision="float64"
    )
    rate = float(case["meta_lr"])
    recipe = Recipe(Fixed(tasks[0]), method, training, optimizer=lambda p: torch.optim.Adam(p, lr=rate, foreach=False))
    group = Group(recipe, [0], [method], "cpu")
    for update in (1, 2):
        pair = tasks[size * (update - 1) : size * update]
        batch = Task.stack(pair)
        for chunk, traced in ((0, False), (1, False), (2, False), (2, True)):  # a loop, and under vmap
            gradients, _ = group.gradients(batch, chunk, traced)
            for theirs, ours in names.items():
                mine = dict(zip(group.models.trained, gradients))[ours]
                assert_golden(mine, case[f"grad.update{update}.{theirs}"])
        for parameter, gradient in zip(group.models.trained.values(), gradients):
            parameter.grad = gradient
        group.optimizer.step()
        for theirs, ours in names.items():
            assert_golden(group.models.parameters[ours], case[f"param_after.update{update}.{theirs}"])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_maml_conv_batch(order: int, chunk: int) -> None:
    """The re-implementation's two tasks: mean loss, probabilities and meta-gradient, in a loop and under vmap."""
    case, names = load("maml_conv_T2"), conv_names()
    shot, way, queries = (int(case[key]) for key in ("n_shot", "k_way", "q_queries"))
    labels = torch.arange(way)
    support, query = labels.repeat_interleave(shot).expand(2, -1), labels.repeat_interleave(queries).expand(2, -1)
    x = case["x"]
    batch = Task(x[:, : way * shot], support, x[:, way * shot :], query, way)
    method = MAML(Conv4(channels=4), inner_lr=float(case["inner_lr"]), steps=int(case["inner_steps"]), order=order)
    models = Models([build(method, batch[0], case, names)])
    loss = torch.cat(list(models.run(meta_loss, batch, chunk))).mean()
    assert_golden(loss, case[f"order{order}.loss"], relative=1e-9)
    gradients = torch.autograd.grad(loss, list(models.trained.values()))
    mine = dict(zip(models.trained, gradients))
    for theirs, ours in names.items():
        assert_golden(mine[ours], case[f"order{order}.metagrad.{theirs}"], relative=1e-9)

    def probabilities(method: Method, task: Task) -> Tensor:
        return method.predict(method.adapt(task.support), task.query_x).softmax(-1)

    ours = torch.cat(list(models.run(probabilities, batch, chunk))).flatten(0, 1)
    assert_golden(ours, case[f"order{order}.prob"], relative=1e-9)


@pytest.mark.parametrize(("kind", "distance"), [("l2", "euclidean"), ("cosine", "cosine")])
def test_protonet_conv(kind: str, distance: str) -> None:
    case, names = load("protonet_conv"), conv_names()
    shot, way, queries = (int(case[key]) for key in ("n_shot", "k_way", "q_queries"))
    labels = torch.arange(way)
    split = way * shot
    task = Task(
        case["x"][:split], labels.repeat_interleave(shot), case["x"][split:], labels.repeat_interleave(queries), way
    )
    method = build(ProtoNet(Conv4(channels=4), distance=distance, norm="joint"), task, case, names)

    logits = method.predict(method.adapt(task.support), task.query_x)
    assert_golden(-logits, case[f"{kind}.train.distance"], relative=1e-9)
    assert_golden(logits.softmax(-1), case[f"{kind}.train.prob"], relative=1e-9)
    loss = method.loss(task)
    assert_golden(loss, case[f"{kind}.train.loss"], relative=1e-9)
    loss.backward()
    for key, parameter in method.named_parameters():
        theirs = {o: t for t, o in names.items()}[key]
        assert_golden(parameter.grad, case[f"{kind}.train.grad.{theirs}"], relative=1e-9)

    stored = [(case[f"param.block{i}.bn.running_mean"], case[f"param.block{i}.bn.running_var"]) for i in range(1, 5)]
    with replayed(stored):
        support = method.backbone(task.support_x)
    with replayed(stored):
        query = method.backbone(task.query_x)
    means = prototypes(support, Support(task.support_x, task.support_y, way))
    assert_golden(means, case["eval.prototypes"], relative=1e-9)
    assert_golden(query, case["eval.embedding_query"], relative=1e-9)
    ours = distances(query, means, distance)
    assert_golden(ours, case[f"{kind}.eval.distance"], relative=1e-9)
    assert_golden((-ours).softmax(-1), case[f"{kind}.eval.prob"], relative=1e-9)
    assert_golden(nn.functional.cross_entropy(-ours, task.query_y), case[f"{kind}.eval.loss"], relative=1e-9)


def full_context_names() -> dict[str, str]:
    """Golden name -> ours, of the LSTMs of full context embeddings."""
    names = {}
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        names |= {f"g.{kind}_l0": f"g.onward.{kind}", f"g.{kind}_l0_reverse": f"g.backward.{kind}"}
        names[f"f.{kind}"] = f"f.cell.{kind}"
    return names


@pytest.mark.parametrize("distance", ["l2", "cosine"])
@pytest.mark.parametrize("name", ["matching_nofce", "matching_fce"])
def test_matching(name: str, distance: str) -> None:
    case = load(name)
    names = {f"encoder.{theirs}": ours for theirs, ours in conv_names().items() if not theirs.startswith("head")}
    if "unrolling_steps" in case:
        names |= full_context_names()
    shot, way, queries = (int(case[key]) for key in ("n_shot", "k_way", "q_queries"))
    labels = torch.arange(way)
    split = way * shot
    task = Task(case["x"][:split], labels.repeat_interleave(shot), case["x"][split:], case["query_y"], way)
    assert torch.equal(task.query_y, labels.repeat_interleave(queries))
    method = MatchingNet(
        Conv4(channels=4),
        distance="euclidean" if distance == "l2" else "cosine",
        fce="sum" if "unrolling_steps" in case else "none",
        processing_steps=int(case.get("unrolling_steps", torch.tensor(1))),
        norm="joint",
    )
    build(method, task, case, names)

    def compare(kind: str, points: Tensor, queries: Tensor, log_probabilities: Tensor) -> None:
        assert_golden(points, case[f"{kind}.embedding_support"], relative=1e-9)
        assert_golden(queries, case[f"{kind}.embedding_query"], relative=1e-9)
        apart = distances(queries, points, method.distance)
        assert_golden(apart, case[f"{distance}.{kind}.distance"], relative=1e-9)
        assert_golden((-apart).softmax(-1), case[f"{distance}.{kind}.attention"], relative=1e-9)
        assert_golden(log_probabilities.exp(), case[f"{distance}.{kind}.prob"], relative=1e-9)
        loss = nn.functional.nll_loss(log_probabilities, task.query_y)
        assert_golden(loss, case[f"{distance}.{kind}.loss"], relative=1e-9)

    def contexts(support: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        points = method.in_context(support)
        return points, method.f(queries, points) if method.fce == "sum" else queries

    embedding = method.embed(case["x"])
    assert_golden(embedding, case["train.encoder_output"], relative=1e-9)
    log_probabilities = method.predict(method.adapt(task.support), task.query_x)
    compare("train", *contexts(embedding[:split], embedding[split:]), log_probabilities)
    loss = method.loss(task)
    assert_golden(loss, case[f"{distance}.train.loss"], relative=1e-9)
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in method.named_parameters()}
    assert gradients.keys() == set(names.values())
    for theirs, ours in names.items():
        assert_golden(gradients[ours], case[f"{distance}.train.grad.{theirs}"], relative=1e-9)

    keys = [f"param.encoder.block{i}.bn.running" for i in range(1, 5)]
    stored = [(case[f"{key}_mean"], case[f"{key}_var"]) for key in keys]
    embedding = method.embed(case["x"], stored)
    assert_golden(embedding, case["eval.encoder_output"], relative=1e-9)
    points, queries = contexts(embedding[:split], embedding[split:])
    log_probabilities = method.predict(Neighbours(points, task.support.members, stored), task.query_x)
    compare("eval", points, queries, log_probabilities)


def test_full_context_embeddings() -> None:
    case, names = load("matching_fce_modules"), full_context_names()
    features, steps = int(case["dim"]), int(case["unrolling_steps"])
    method = MatchingNet(nn.Flatten(), fce="sum", processing_steps=steps)
    method.create(features, 3)
    method.double().load_state_dict({ours: case[theirs] for theirs, ours in names.items()})
    inputs = {name: case[name].requires_grad_() for name in ("support_in", "query_in")}
    points = method.in_context(inputs["support_in"])
    queries = method.f(inputs["query_in"], points)
    assert_golden(points, case["g_out"], relative=1e-12)
    assert_golden(queries, case["f_out"], relative=1e-12)
    ((case["cotangent.f_out"] * queries).sum() + (case["cotangent.g_out"] * points).sum()).backward()
    slopes = {theirs: method.get_parameter(ours).grad for theirs, ours in names.items()}
    for name, slope in {**slopes, **{name: tensor.grad for name, tensor in inputs.items()}}.items():
        assert slope is not None
        assert_golden(slope, case[f"grad.{name}"], relative=1e-12)


def lstm_names(theirs: str, ours: str, cells: int) -> dict[str, str]:
    kinds = {"W_ih": "weight_ih", "W_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh"}
    return {
        f"{theirs}.cell{i + 1}.{their}": f"{ours}.cells.{i}.{our}" for i in range(cells) for their, our in kinds.items()
    }


def op_lstm(name: str, case: Case, order: int) -> tuple[Method, dict[str, str], int | None]:
    """The method of a case, the names of its parameters, and the way."""
    common = {"steps": int(case.get("T", torch.tensor(2))), "order": order}
    if "gamma0" in case:
        common["gamma"] = float(case["gamma0"])
    names = lstm_names("phi_out", "out_lstm", 3) | lstm_names("phi_body", "body_lstm", 3) | {"gamma": "gamma"}
    if "sine" in name:
        return OPLSTM(MLP([7, 7, 7]), **common), names | mlp_names(3, False), None
    if "mlpbn" in name:
        return OPLSTM(MLP([16, 12, 8, 8], batch_norm=True), **common), names | mlp_names(4, True), 5
    names = lstm_names("phi", "out_lstm", 3) | {"gamma": "gamma", "H0": "head.weight", "b": "head.bias"}
    return OPLSTM(nn.Flatten(), hidden=(8, 4, 1), adapts="head", **common), names, 5


OP_LSTM = sorted(path.stem for path in FOLDER.glob("*_oplstm_*.npz") if not path.stem.startswith("outer"))


@pytest.mark.parametrize("name", OP_LSTM)
@pytest.mark.parametrize("order", [1, 2])
def test_op_lstm(name: str, order: int) -> None:
    case = load(name)
    method, names, way = op_lstm(name, case, order)
    task = task_of(case, way=way)
    build(method, task, case, names)
    for key in ("support_x", "query_x"):
        case[key].requires_grad_()

    head = method.adapts == "head"
    for number, done in enumerate(method.passes(task.support_x, task.support), start=1):
        for layer, after in enumerate(done.after, start=1):
            assert_golden(after.matrix, case[f"H.pass{number}" if head else f"W{layer}.pass{number}"])
            assert_golden(done.signals[layer - 1], case[f"h.pass{number}" if head else f"h{layer}.pass{number}"])
            if not head:
                assert_golden(done.activations[layer], case[f"act{layer}.pass{number}"])

    prediction = method.predict(method.adapt(task.support), task.query_x)
    assert_golden(prediction, case["query_logits" if head else "query_pred"])
    loss = method.loss(task)
    assert_golden(loss, case["query_loss"])
    loss.backward()
    gradients = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in method.named_parameters()}
    for theirs, ours in names.items():  # the weights of a first step from zeros may be unused: stored as zeros
        if f"grad{order}.{theirs}" in case:
            assert_golden(gradients[ours], case[f"grad{order}.{theirs}"])
    for key in ("support_x", "query_x"):
        if f"grad{order}.{key}" in case:
            assert_golden(case[key].grad, case[f"grad{order}.{key}"])


def test_op_lstm_outer_loop() -> None:
    case = load("outer_oplstm_sine")
    tasks = [task_of(case, f"task{i}.") for i in range(1, 5)]
    method, names, _ = op_lstm("sine", case, 2)
    build(method, tasks[0], case, names)
    size, rate = int(case["meta_batch_size"]), float(case["meta_lr"])
    training = Training(TaskShape(None, 5, 10), size, 2, "sum", precision="float64")
    recipe = Recipe(Fixed(tasks[0]), method, training, optimizer=lambda p: torch.optim.Adam(p, lr=rate, foreach=False))
    group = Group(recipe, [0], [method], "cpu")
    for update in (1, 2):
        pair = tasks[size * (update - 1) : size * update]
        batch = Task.stack(pair)
        for chunk, traced in ((0, False), (1, False), (2, False), (2, True)):
            gradients, _ = group.gradients(batch, chunk, traced)
            mine = dict(zip(group.models.trained, gradients))
            for theirs, ours in names.items():
                assert_golden(mine[ours], case[f"grad.update{update}.{theirs}"])
        for parameter, gradient in zip(group.models.trained.values(), gradients):
            parameter.grad = gradient
        group.optimizer.step()
        for theirs, ours in names.items():
            assert_golden(group.models.parameters[ours], case[f"param_after.update{update}.{theirs}"])


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("plain_lstm_*.npz")))
def test_plain_lstm(name: str) -> None:
    case, steps = load(name), int(load(name)["T"])
    way = None if "sine" in name else 5
    sizes = [12, 10, 8] if "cls" in name else [6, 6]
    method = PlainLSTM(
        nn.Flatten(),
        hidden=sizes,
        steps=steps,
        reading="sequential" if "sequential" in name else "batch",
        first_labels=False if "zerosupp" in name else None,
    )
    names = lstm_names("lstm", "lstm", len(sizes)) | {"head.W": "head.weight", "head.b": "head.bias"}
    task = task_of(case, way=way)
    build(method, task, case, names)
    for key in ("support_x", "query_x"):
        case[key].requires_grad_()

    for step in range(1, steps + 1):
        method.steps = step
        for layer, hidden in enumerate(method.adapt(task.support).hidden, start=1):
            if method.reading == "batch":
                assert_golden(hidden[0], case[f"h_avg.layer{layer}.pass{step}"])
            elif step == steps:
                assert_golden(hidden[0], case[f"task_h.layer{layer}"].flatten())

    assert_golden(
        method.predict(method.adapt(task.support), task.query_x),
        case["query_logits" if "query_logits" in case else "query_pred"],
    )
    loss = method.loss(task)
    assert_golden(loss, case["query_loss"])
    loss.backward()
    gradients = {key: p.grad for key, p in method.named_parameters()}
    for theirs, ours in names.items():
        assert_golden(gradients[ours], case[f"grad.{theirs}"])
    for key in ("support_x", "query_x"):
        if f"grad.{key}" in case:
            assert_golden(case[key].grad, case[f"grad.{key}"])


def meta_lstm_names(case: Case) -> dict[str, str]:
    """Golden name of each piece of the flat vector -> ours, in golden order."""
    names = {}
    for key in sorted(key for key in case if key.startswith("theta_shapes.")):
        part, kind = key.split(".")[2:]
        ours = "head" if part == "linear" else f"backbone.{part[:-1].replace('bn', 'norm')}s.{int(part[-1]) - 1}"
        names[key] = f"{ours}.{kind}"
    return names


def test_meta_lstm() -> None:
    case = load("metalstm_T3")
    task = task_of(case, way=3)
    assert case["batch_size"] == len(task.support_x)
    method = MetaLSTM(
        Conv4(channels=4, eps=float(case["bn_eps"])), steps=int(case["n_epochs"]), momentum=float(case["bn_momentum"])
    )
    method.build(single(task)).double()
    names = meta_lstm_names(case)
    shapes = {names[key]: tuple(case[key].tolist()) for key in names}
    gates = ("W_F", "W_I", "b_F", "b_I")
    lstm = {f"lstm.cells.0.{kind}_{of}": f"lstm.{kind}_{of}" for kind in ("weight", "bias") for of in ("ih", "hh")}
    parts = case["meta.c_I"].flatten().split([torch.Size(shape).numel() for shape in shapes.values()])
    state = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}
    state |= {name: case[f"meta.{name}"].reshape(getattr(method, name).shape) for name in gates}
    state |= {ours: case[f"meta.{theirs}"] for ours, theirs in lstm.items()}
    method.load_state_dict(state)
    places = method.unflatten(torch.arange(len(case["meta.c_I"])))
    order = torch.cat([places[name].flatten() for name in shapes])  # golden place -> ours

    steps = list(method.inner_steps(task.support))
    assert len(steps) == len(case["steps.theta"])
    for number, step in enumerate(steps):
        assert_golden(step.gradient[order], case["steps.grad"][number], relative=1e-8)
        assert_golden(step.inputs[:2, 0], case["steps.prep_loss"][number], relative=1e-8)
        assert_golden(step.gates[0, order], case["steps.f_preact"][number], relative=1e-8)
        assert_golden(step.gates[1, order], case["steps.i_preact"][number], relative=1e-8)
        assert_golden(step.weights[order], case["steps.theta"][number], relative=1e-8)
    assert_golden(steps[0].inputs[2:, order].T, case["steps.prep_grad_first"], relative=1e-8)
    for name, ours in zip("hc", steps[-1].state.chunk(2)):
        assert_golden(ours[:, order[::20]].T, case[f"last.{name}"], relative=1e-8)

    logits = method.predict(method.adapt(task.support), task.query_x)
    assert_golden(logits, case["train.logits.query"], relative=1e-8)
    loss = method.loss(task)
    assert_golden(loss, case["train.loss.query"], relative=1e-8)
    loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters()}
    for ours, theirs in lstm.items():
        assert_golden(gradients[ours], case[f"metagrad.{theirs}"], relative=1e-8)
    for name in gates:
        assert_golden(gradients[name], case[f"metagrad.{name}"].reshape(gradients[name].shape), relative=1e-8)
    of_learner = torch.cat([gradients[name].flatten() for name in shapes])
    assert_golden(of_learner, case["metagrad.c_I"].flatten(), relative=1e-8)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert_golden(norm, case["metagrad_global_norm"], relative=1e-8)

    method.eval()
    adapted = method.adapt(task.support)
    for place, name in enumerate(("mean", "var")):
        running = torch.stack([statistics[place] for statistics in adapted.statistics])
        assert_golden(running, case[f"bn_running_{name}_after_support"], relative=1e-8)
    logits = method.predict(adapted, task.query_x)
    assert_golden(logits, case["eval.logits.query"], relative=1e-8)
    assert_golden(nn.functional.cross_entropy(logits, task.query_y), case["eval.loss.query"], relative=1e-8)


def sap_names(case: Case) -> dict[str, list[str]]:
    """Ours -> golden names of the arrays that it is made of, one beside the other."""
    names = {}
    if "ranks" in case:
        for i, layer in enumerate(["backbone.linears.0", "backbone.linears.1", "head"], start=1):
            names |= {f"{layer}.{kind}": [f"base.lin{i}.{kind}"] for kind in ("weight", "bias")}
        for ours, theirs in (("input", "in"), ("output", "out")):
            names |= {f"{ours}.factor": [f"phi.{theirs}.p"], f"{ours}.term": [f"phi.{theirs}.r"]}
            names |= {f"{ours}.{gate}.logits": [f"lambda.{theirs}.{gate}"] for gate in ("scale", "shift")}
        operations = {"scalar": "p", "vector": "q", "matrix": "M", "shift.scalar": "r", "shift.vector": "w"}
        for i in range(2):
            ours, theirs = f"hidden.{i}", f"hid{i + 1}"
            names |= {f"{ours}.{own}": [f"phi.{theirs}.{their}"] for own, their in operations.items()}
            names |= {f"{ours}.{f}": [f"phi.{theirs}.{f}{rank}" for rank in case["ranks"]] for f in "USV"}
            names |= {f"{ours}.logits": [f"lambda.{theirs}.a"], f"{ours}.shift.logits": [f"lambda.{theirs}.b"]}
        return names
    names |= {ours: [f"base.{theirs}"] for theirs, ours in conv_names().items()}
    names |= {"output.matrix": ["phi.out.A"], "output.bias": ["phi.out.c"], "output.logits": ["lambda.out.g"]}
    operations = {
        "pointwise": "K1",
        "kernel": "K3",
        "shift.scalar": "s",
        "shift.vector": "t",
        **dict(zip("USV", "USV")),
    }
    for i in range(5):
        ours = f"hidden.{i - 1}" if i else "input"
        names |= {f"{ours}.{own}": [f"phi.pos{i}.{their}"] for own, their in operations.items()}
        names |= {f"{ours}.logits": [f"lambda.pos{i}.a"], f"{ours}.shift.logits": [f"lambda.pos{i}.b"]}
        if i:
            names |= {f"kernels.{i - 1}.slices": [f"phi.pos{i}.M"], f"kernels.{i - 1}.channels": [f"phi.pos{i}.n"]}
            names[f"kernels.{i - 1}.logits"] = [f"lambda.pos{i}.m"]
    return names


@pytest.mark.parametrize(
    ("name", "depthwise"),
    [(path.stem, False) for path in sorted(FOLDER.glob("sap_*.npz"))]
    + [("sap_image_init_T1", True), ("sap_image_T1", True)],  # all between two channels is zero there
)
def test_sap(name: str, depthwise: bool) -> None:
    case = load(name)
    names, common = sap_names(case), {"inner_lr": float(case["inner_lr"]), "steps": int(case["inner_steps"])}
    if "sine" in name:
        widths, ranks = [int(case["width"])] * 2, case["ranks"].tolist()
        method = SAP(MLP(widths), ranks=ranks, adapts_head=False, adapts_input_scale=False, **common)
        task, kind, relative = task_of(case), "pred", 1e-10
    else:
        method = SAP(Conv4(channels=4), depthwise=depthwise, **common)
        task, kind, relative = task_of(case, way=3), "logits", 1e-9
    method.build(single(task)).double()
    parameters = dict(method.named_parameters())

    def stored(ours: str, prefix: str = "") -> Tensor:
        parts = [case[prefix + theirs] for theirs in names[ours]]
        whole = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        if whole.numel() != parameters[ours].numel():  # of all pairs of channels: ours is the diagonal
            pairs, whole = whole, whole.diagonal().movedim(-1, 0)
            assert prefix in ("", "adapted.") or pairs.count_nonzero() == whole.count_nonzero()
        return whole.reshape(parameters[ours].shape)

    method.load_state_dict({ours: stored(ours) for ours in parameters})
    for of in ("support", "query"):
        if f"{kind}.{of}_before" in case:
            before = method(getattr(task, f"{of}_x"))
            assert_golden(before, case[f"{kind}.{of}_before"], relative=relative)
    state = method.adapt(task.support)
    for ours, parameter in parameters.items():
        if f"adapted.{names[ours][0]}" in case:
            assert_golden(state.weights.get(ours, parameter), stored(ours, "adapted."), relative=relative)
        else:
            assert ours not in state.weights
    assert_golden(method.predict(state, task.query_x), case[f"{kind}.query_after"], relative=relative)
    for method.order, prefix in ((2, "metagrad."), (1, "metagrad_first_order.")):
        if f"{prefix}{names['head.weight'][0]}" in case:
            loss = method.loss(task)
            assert_golden(loss, case["loss.query_after"], relative=relative)
            for ours, slope in zip(parameters, torch.autograd.grad(loss, list(parameters.values()))):
                assert_golden(slope, stored(ours, prefix), relative=relative)


def load_named(method: Method, task: Task, case: Case, names: dict[str, str]) -> None:
    """Build a method for a task, and give each parameter the array of its name in the case."""
    method.build(single(task)).double()
    shapes = {ours: p.shape for ours, p in method.named_parameters()}
    assert shapes.keys() == set(names.values())
    method.load_state_dict({ours: case[theirs].reshape(shapes[ours]) for theirs, ours in names.items()})


def test_warp_maml() -> None:
    case = load("warp_maml_T2")
    task, relative = task_of(case, way=3), 1e-9
    method = WarpMAML(Conv4(channels=4), inner_lr=float(case["inner_lr"]), steps=int(case["inner_steps"]))
    names = {f"base.{theirs}": ours for theirs, ours in conv_names().items()}
    names |= {f"warp.warp{i + 2}.{kind}": f"warps.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    load_named(method, task, case, names)
    assert_golden(method(method.fixed(task.query_x)), case["logits.query_before"], relative=relative)

    losses = []
    for step in range(1, method.steps + 1):
        method.set_test_steps(step)
        method.eval()
        state = method.adapt(task.support)
        assert set(state.weights) == {ours for theirs, ours in names.items() if f"step1.adapted.{theirs}" in case}
        for theirs, ours in names.items():
            if ours in state.weights:
                assert_golden(state.weights[ours], case[f"step{step}.adapted.{theirs}"], relative=relative)
        assert_golden(method.predict(state, task.query_x), case[f"step{step}.logits.query"], relative=relative)
        losses.append(case[f"step{step}.loss.query"])
    method.train()
    loss = method.loss(task)
    assert_golden(loss, torch.stack(losses).sum(), relative=relative)
    loss.backward()
    gradients = {key: p.grad for key, p in method.named_parameters()}
    for theirs, ours in names.items():
        assert_golden(gradients[ours], case[f"metagrad.{theirs}"], relative=relative)


@pytest.mark.parametrize("name", ["tnet_T2", "mtnet_T2"])
def test_t_net(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, masks, relative = load(name), name == "mtnet_T2", 1e-8 if name == "mtnet_T2" else 1e-9
    task = task_of(case, way=3)
    method = TNet(Conv4(channels=4), inner_lr=float(case["inner_lr"]), steps=int(case["inner_steps"]), masks=masks)
    names = {f"base.{theirs}": ours for theirs, ours in conv_names().items()}
    names |= {f"transform.T{i + 1}": f"transforms.{i}" for i in range(5)}
    if masks:
        names |= {f"zeta.block{i + 1}": f"zetas.{i}" for i in range(4)}
        noise = itertools.cycle(-case[f"gumbel.block{i}"].diff(dim=1)[:, 0] for i in range(1, 5))
        monkeypatch.setattr(tnet, "logistic", lambda like: next(noise))
    load_named(method, task, case, names)
    assert_golden(method(task.query_x), case["logits.query_before"], relative=relative)
    if masks:
        for i, logits in enumerate(method.zetas, start=1):
            assert torch.equal(method.mask(logits), case[f"mask.block{i}"])

    state = method.adapt(task.support)
    for ours, weight in state.weights.items():
        theirs = {o: t for t, o in names.items()}[ours]
        assert_golden(weight, case[f"adapted.{theirs}"], relative=relative)
    assert_golden(method.predict(state, task.query_x), case["logits.query_after"], relative=relative)
    loss = method.loss(task)
    assert_golden(loss, case["loss.query_after"], relative=relative)
    loss.backward()
    for theirs, ours in names.items():
        gradient = method.get_parameter(ours).grad
        assert gradient is not None
        assert_golden(gradient, case[f"metagrad.{theirs}"].reshape(gradient.shape), relative=relative)

    if masks:
        method.eval()
        logits = method.predict(method.adapt(task.support), task.query_x)
        assert_golden(logits, case["eval.logits.query_after"], relative=relative)
        loss = nn.functional.cross_entropy(logits, task.query_y)
        assert_golden(loss, case["eval.loss.query_after"], relative=relative)


class RecordedLEO(LEO):
    """Draws the noise of a case, and writes down what it computes."""

    def __init__(self, draws: list[Tensor], **settings) -> None:
        super().__init__(nn.Flatten(), **settings)
        self.draws = draws
        self.related, self.tried, self.losses, self.found = [], [], [], []

    def noise(self, like: Tensor) -> Tensor:
        return self.draws.pop(0)

    def relate(self, encoded: Tensor) -> Tensor:
        self.related.append(super().relate(encoded))
        return self.related[-1]

    def support_loss(self, classifiers: Tensor, *data: Tensor) -> Tensor:
        self.tried.append(classifiers)
        self.losses.append(super().support_loss(classifiers, *data))
        return self.losses[-1]

    def logits(self, weights: Tensor, x: Tensor) -> Tensor:
        self.found.append(super().logits(weights, x))
        return self.found[-1]


LEO_MATRICES = {"encoder": "encoder.weight", "decoder": "decoder.weight"}
LEO_MATRICES |= {f"relation{i + 1}": f"relation.{i}.weight" for i in range(3)}
LEO_NAMES = LEO_MATRICES | {name: name for name in ("inner_lr", "finetuning_lr")}


def leo_parameter(array: Tensor) -> Tensor:
    """A golden parameter as ours: theirs are [inputs, outputs], and step sizes [1, 1, size]."""
    return array.T if array.dim() == 2 else array.flatten()


def leo(case: Case) -> RecordedLEO:
    terms = [f"{term}_weight" for term in ("kl", "encoder_penalty", "l2_penalty", "orthogonality_penalty")]
    draws = [case["noise.latents"], *case["noise.decoder"]] if "noise.latents" in case else []
    return RecordedLEO(
        [noise.flatten(0, 1) for noise in draws],
        latents=int(case["num_latents"]),
        steps=int(case["inner_unroll_length"]),
        finetuning_steps=int(case["finetuning_unroll_length"]),
        dropout=float(case["dropout_rate"]),
        **{term: float(case[term]) for term in terms},
    )


def leo_task(case: Case) -> Task:
    x, y, queries, labels = (case[name].flatten(0, 1) for name in ("support_x", "support_y", "query_x", "query_y"))
    return Task(x, y, queries, labels, int(case["num_classes"]))


def load_leo(method: LEO, task: Task, case: Case) -> None:
    method.build(single(task)).double()
    method.load_state_dict({ours: leo_parameter(case[f"param.{theirs}"]) for theirs, ours in LEO_NAMES.items()})


@pytest.mark.parametrize("name", ["leo_train", "leo_eval"])
def test_leo(name: str) -> None:
    case, forward = load(name), 1e-11
    task, method = leo_task(case), leo(case)
    load_leo(method, task, case)
    method.train(name == "leo_train")
    encoded, decoded, latents = [], [], []
    method.encoder.register_forward_hook(lambda _, inputs, output: encoded.append(output))
    method.decoder.register_forward_hook(lambda _, inputs, output: decoded.append(output))
    method.decoder.register_forward_hook(lambda _, inputs, output: latents.append(inputs[0]))

    state = method.adapt(task.support)
    assert_golden(encoded[0], case["encoder_output"].flatten(0, 1), relative=forward)
    assert_golden(method.related[0], case["relation_output"].flatten(0, 1), relative=forward)
    assert_golden(torch.stack(latents), case["steps.latents"].flatten(1, 2), relative=forward)
    assert_golden(torch.stack(decoded), case["steps.decoder_output"].flatten(1, 2), relative=forward)
    classifiers = torch.cat([case["steps.decoded_weights"], case["steps.finetuned_weights"]])
    assert_golden(torch.stack(method.tried), classifiers[:-1].flatten(1, 2), relative=forward)
    assert_golden(state.weights, classifiers[-1].mean(1), relative=forward)
    assert_golden(torch.stack(method.found), case["steps.support_logits"][:-1].flatten(1, 2), relative=forward)
    assert_golden(torch.stack(method.losses), case["steps.support_ce"][:-1].sum((1, 2)), relative=forward)
    assert_golden(
        method.logits(state.weights, task.support_x), case["steps.support_logits"][-1].flatten(0, 1), relative=forward
    )

    logits = method.predict(state, task.query_x)
    assert_golden(logits, case["query_logits"].flatten(0, 1), relative=forward)
    assert_golden(task_score(logits, task.query_y, 3), case["query_accuracy"], relative=1e-6)
    assert_golden(state.kl, case["loss.kl"], relative=1e-7)
    assert_golden(state.encoder_penalty, case["loss.encoder_penalty"], relative=1e-7)
    assert_golden(method.l2_penalty_weight * method.l2_penalty(), case["loss.l2_weighted"], relative=forward)
    orthogonality = method.orthogonality_penalty_weight * method.orthogonality_penalty()
    assert_golden(orthogonality, case["loss.orthogonality_weighted"], relative=forward)


@pytest.mark.parametrize("name", ["leo_train", "leo_eval"])
def test_leo_update(name: str) -> None:
    """The meta-gradient of one task, and what is left of it when its elements and then each tensor are bounded."""
    case = load(name)
    task, method = leo_task(case), leo(case)
    load_leo(method, task, case)
    group = leo_group(method, task, clip_value=0.1, clip_parameter_norm=0.1)
    method.train(name == "leo_train")
    before = group.models.state(0)
    draws = list(method.draws)
    gradients, loss = group.gradients(task.map(lambda t: t[None]), 0)
    assert_golden(loss, case["loss.total"], relative=1e-7)
    method.draws = draws
    group.update()
    for theirs, ours in LEO_NAMES.items():
        mine = dict(zip(group.models.trained, gradients))[ours]
        assert_golden(mine, leo_parameter(case[f"metagrad.{theirs}"]), relative=1e-6)
        step = before[ours] - group.models.parameters[ours]
        assert_golden(step, leo_parameter(case[f"metagrad_clipped.{theirs}"]), relative=1e-6)


def leo_group(method: Method, task: Task, **settings) -> Group:
    """One that steps down the meta-gradient of a task as it is."""
    training = Training(TaskShape(3, 2, 4), 1, precision="float64", batching="loop", trace=False, **settings)
    recipe = Recipe(Fixed(task), method, training, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    return Group(recipe, [0], [method], "cpu")


def test_leo_whose_loss_is_not_a_number() -> None:
    """Decay by the whole of the weights, then both bounds: their step for the matrices, none for the step sizes."""
    case, shapes = load("leo_nan_guard"), load("leo_eval")
    shapes["query_x"][0, 0, 0] = float("nan")  # the case has no data
    task, method = leo_task(shapes), leo(shapes)
    load_leo(method, task, case)
    group = leo_group(method, task, clip_value=0.1, clip_parameter_norm=0.1, decay_if_broken=1.0)
    before = group.models.state(0)
    method.eval()
    assert group.update().isnan().all()
    for theirs, ours in LEO_NAMES.items():
        step = before[ours] - group.models.parameters[ours]
        if theirs in LEO_MATRICES:
            assert_golden(step, leo_parameter(case[f"metagrad_clipped.{theirs}"]), relative=1e-12)
        else:
            assert not step.any()
