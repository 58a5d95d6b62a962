"""Training and testing in memory: what a run does, without its folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GLYPHS, SINE, SteepAtZero

import quickstudy as qs
from quickstudy import data, engine
from quickstudy.engine import testing
from quickstudy.engine.checkpoint import tensors_of
from quickstudy.engine.job import Quiet
from quickstudy.engine.train import Diverged, Interrupted
from quickstudy.errors import BackboneError, DataError, RecipeError
from quickstudy.methods import MAML, NearestNeighbour, ProtoNet
from quickstudy.nn import MLP, Conv4


def recipe(text: str, *overrides: str) -> qs.Recipe:
    return engine.instantiate(engine.parse_recipe(text, overrides))


@pytest.mark.parametrize("text", [SINE, GLYPHS])
def test_it_is_the_training_of_a_run(text: str, tmp_path: Path) -> None:
    as_chosen = "--train.batching=loop"  # not by timing, which may choose otherwise the second time
    run = engine.train(engine.parse_recipe(text, [as_chosen]), tmp_path, name="x", seeds=[3])
    given = recipe(text, as_chosen)
    trained, history = qs.meta_train(given, seed=3, device="cpu", listener=Quiet())
    found, expected = tensors_of(trained.method), run.load_weights("best", 3)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert [repr(row | {"seconds": 0}) for row in history] == [repr(row | {"seconds": 0}) for row in run.metrics()]
    assert history[-1]["seconds"] > 0
    expected = testing.test_run(run, testing.Wish(), "cpu").score
    assert qs.meta_test(trained, given, seed=3, device="cpu").mean == pytest.approx(expected.mean, rel=1e-5)


def test_a_recipe_is_not_used_up() -> None:
    given = recipe(SINE)
    first, _ = qs.meta_train(given, listener=Quiet())
    assert not given.method.built
    second, _ = qs.meta_train(given, listener=Quiet())
    assert all(map(torch.equal, tensors_of(first.method).values(), tensors_of(second.method).values()))
    other, _ = qs.meta_train(given, seed=1, listener=Quiet())
    assert not all(map(torch.equal, tensors_of(first.method).values(), tensors_of(other.method).values()))


class Counting(MAML):
    """Notes whether it trains, and with how many inner steps."""

    def loss(self, task: qs.Task) -> torch.Tensor:
        self.seen = self.training, self.steps_now
        return super().loss(task)


def test_a_built_method_trains_on() -> None:
    given = replace(recipe(SINE, "--train.batching=loop"), method=Counting(MLP([4]), steps=1, test_steps=3))
    trained, history = qs.meta_train(given, listener=Quiet())
    assert vars(trained.method)["seen"] == (True, 1)
    weights = {name: tensor.clone() for name, tensor in tensors_of(trained.method).items()}
    further, onwards = qs.meta_train(replace(given, method=trained.method, pretrained="nowhere"), listener=Quiet())
    assert vars(further.method)["seen"] == (True, 1)
    best = min(row["val_score"] for row in history)
    same_tasks = replace(given, method=trained.method, train=replace(given.train, updates=0))
    assert onwards[0]["val_score"] == qs.meta_train(same_tasks, listener=Quiet())[1][0]["val_score"] != best
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors_of(trained.method).items())


def test_what_the_caller_has_stays_as_it_is() -> None:
    given = recipe(SINE, "--train.updates=1")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trained, _ = qs.meta_train(given, listener=Quiet())
    qs.meta_test(trained, replace(given, train=replace(given.train, precision="float64")))
    assert torch.equal(torch.rand(3), expected)
    assert {tensor.dtype for tensor in tensors_of(trained.method).values()} == {torch.float32}
    testing_, validation = qs.Testing(tasks=5), qs.Validation(tasks=5)
    parts = {"dataset": given.dataset, "method": given.method, "test": testing_, "validation": validation}
    for shot in (4, 7):
        made = qs.Recipe(**parts, train=qs.Training(qs.TaskShape(None, shot, 5)))
        assert made.test_task == made.validation_task == qs.TaskShape(None, shot, 5)
        longer = replace(made, train=replace(made.train, task=qs.TaskShape(None, 9, 3)))
        assert longer.test_task == longer.validation_task == qs.TaskShape(None, 9, 3)


def test_what_learns_nothing_is_only_tested() -> None:
    given = replace(recipe(GLYPHS), method=NearestNeighbour())
    with pytest.raises(RecipeError, match="in Python meta_test"):
        qs.meta_train(given, listener=Quiet())
    assert qs.meta_test(given.method, given).count == 10
    with pytest.raises(RecipeError, match="ProtoNet has to be trained before it is tested, by meta_train"):
        qs.meta_test(recipe(GLYPHS).method, given)


def test_arguments_that_are_something_else() -> None:
    given = recipe(GLYPHS, "--train.updates=0")
    trained = qs.meta_train(given, device=torch.device("cpu"), listener=Quiet())  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"a recipe is a quickstudy.Recipe, not 'glyphs/x'; Recipe.named"):
        qs.meta_train("glyphs/x")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"meta_train returns first .*, not tuple"):
        qs.meta_test(trained, given)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="not tuple"):
        qs.FewShotClassifier(trained).fit([[0.0], [1.0]], [0, 1])  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="one after the other, as in 'glyphs/protonet-conv4-5w1s', '--train"):
        qs.Recipe.named("glyphs/protonet-conv4-5w1s", ["--train.updates=1"])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="a seed is a whole number from zero up, not -1"):
        qs.meta_test(trained[0], given, seed=-1)
    with pytest.raises(RecipeError, match=r"the schedule cannot be built: .*step_size.*functools.partial"):
        qs.meta_train(replace(given, schedule=torch.optim.lr_scheduler.StepLR))  # type: ignore[arg-type]


def test_a_method_that_was_built_for_other_tasks_than_are_to_be_trained_on() -> None:
    given = recipe(GLYPHS)
    two = replace(given, train=replace(given.train, task=qs.TaskShape(2, 1, 1)), test=qs.Testing(10))
    method, _ = qs.meta_train(replace(two, method=MAML(Conv4(4))), listener=Quiet())
    three = replace(two.train, task=qs.TaskShape(3, 1, 1))
    given = replace(two, method=method.method, train=three, test=qs.Testing(10, qs.TaskShape(2, 1, 1)))
    with pytest.raises(RecipeError, match="built for 2-way tasks and cannot take 3-way ones"):
        qs.meta_train(given, listener=Quiet())


def test_a_method_is_not_built_by_a_build_that_fails() -> None:
    method = MAML(Conv4(4, blocks=9))
    task = recipe(GLYPHS).dataset.split("train").tasks(qs.TaskShape(2, 1, 1), 0, 1, seed=0)[0]
    with pytest.raises(BackboneError):
        method.build(task)
    assert not method.built
    method.backbone = Conv4(4)
    assert method.build(task).built


def test_objects_that_no_file_names() -> None:
    x = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    y = [f"class {number // 5}" for number in range(60)]
    x[:, 0] += np.arange(60) // 5  # so that there is something to learn
    task = qs.TaskShape(2, 1, 2)
    given = qs.Recipe(
        data.Arrays(x, y),
        ProtoNet(torch.nn.Linear(6, 4)),
        qs.Training(task, updates=50),
        qs.Validation(every=25, tasks=50),
        qs.Testing(100, task),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    trained, history = qs.meta_train(given, listener=Quiet())
    assert history[-1]["best_score"] >= history[0]["val_score"]
    score = qs.meta_test(trained, given)
    assert score.count == 100
    assert qs.meta_test(trained.method, given, tasks=7, task=qs.TaskShape(2, 2, 1)).count == 7
    classifier = qs.FewShotClassifier(trained).fit(x, y)
    assert len(classifier.classes_) == 12
    with pytest.raises(RecipeError, match="made in Python"):
        classifier.save("nowhere")


def test_pictures_reach_the_method_as_in_training() -> None:
    bright = data.Normalise([0.5], [0.25])
    x = np.random.default_rng(0).integers(0, 256, (40, 12, 12), dtype=np.uint8)
    given = qs.Recipe(
        data.Arrays(x, np.arange(40) // 4, train_transforms=[bright], test_transforms=[bright]),
        ProtoNet(MLP([4])),
        qs.Training(qs.TaskShape(2, 1, 1), updates=1),
        qs.Validation(tasks=2, task=qs.TaskShape(2, 1, 1)),
    )
    trained, _ = qs.meta_train(given, listener=Quiet())
    classifier = qs.FewShotClassifier(trained).fit(list(x[:2]), ["a", "b"])
    torch.testing.assert_close(classifier.support_.x[:, 0].float(), (torch.from_numpy(x[:2]) / 255 - 0.5) / 0.25)


def test_on_another_dataset() -> None:
    given = recipe(GLYPHS)
    trained, _ = qs.meta_train(replace(given, train=replace(given.train, updates=1)), listener=Quiet())
    larger = np.random.default_rng(0).integers(0, 256, (100, 40, 40, 3), dtype=np.uint8)
    other = data.Arrays(larger, np.arange(100) // 4, splits={"train": [], "val": [], "test": [*map(str, range(25))]})
    assert qs.meta_test(trained, given, on=other, task=qs.TaskShape(5, 1, 3)).count == 10
    other.test_transforms = [data.Normalise([0.5], [0.2])]
    with pytest.raises(RecipeError, match="get the transforms of glyphs: make it without its own"):
        qs.meta_test(trained, given, on=other)
    with pytest.raises(RecipeError, match="the score on sine is mse"):
        qs.meta_test(trained, given, on=data.Sine())
    with pytest.raises(RecipeError, match="at least one task"):
        qs.meta_test(trained, given, tasks=0)


def test_a_broken_training_says_what_may_help() -> None:
    given = replace(recipe(SINE), method=SteepAtZero(MLP([4])))
    with pytest.raises(Diverged, match=r"not finite at update 0.*A lower learning rate") as caught:
        qs.meta_train(given, listener=Quiet())
    assert [row["update"] for row in caught.value.history] == [0]
    assert qs.meta_test(caught.value.trained, given, tasks=2).count == 2


def test_what_a_stopped_training_had_come_to_is_not_lost() -> None:
    class Impatient(Quiet):
        def step(self, updates: int, loss: Callable[[], float]) -> None:
            if updates == 7:
                os.kill(os.getpid(), signal.SIGINT)

    given = recipe(SINE, "--train.updates=20", "--validation.every=5", "--train.batching=loop")
    with pytest.raises(
        Interrupted, match=r"stopped by SIGINT after update 7 of 20.*sys\.last_value\.trained"
    ) as caught:
        qs.meta_train(given, listener=Impatient())
    short, history = qs.meta_train(recipe(SINE, "--train.updates=5", "--train.batching=loop"), listener=Quiet())
    found, expected = tensors_of(caught.value.trained.method), tensors_of(short.method)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [row["val_score"] for row in caught.value.history] == [row["val_score"] for row in history]


def test_published_recipes_by_name() -> None:
    given = qs.Recipe.named("omniglot/maml-conv4-5w1s", "--train.updates=7")
    assert isinstance(given.method, MAML)
    assert isinstance(given.method.backbone, Conv4)
    assert given.train.updates == 7
    with pytest.raises(RecipeError, match="did you mean"):
        qs.Recipe.named("omniglot/maml-conv4-5w1")


def test_names_of_the_package() -> None:
    assert all(getattr(qs, name) is not None for name in qs.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        qs.nonsense  # noqa: B018
