"""What is one of a few words is checked in Python as in a recipe."""

from __future__ import annotations

from typing import Any, Literal, get_origin, get_type_hints

import pytest
import torch
from torch import nn

from quickstudy import Training, methods
from quickstudy.errors import RecipeError
from quickstudy.methods import MAML, Method, ProtoNet
from quickstudy.nn import BatchNorm, Conv4
from quickstudy.task import TaskShape

METHODS = [found for found in vars(methods).values() if isinstance(found, type) and issubclass(found, Method)]
METHODS.remove(Method)
CHOICES = [
    (method, name)
    for method in METHODS
    for name, hint in get_type_hints(method.__init__).items()
    if get_origin(hint) is Literal
]


@pytest.mark.parametrize(("method", "name"), CHOICES)
def test_a_word_that_is_none_of_the_choices(method: type[Method], name: str) -> None:
    arguments: dict[str, Any] = {name: "nonsense"}
    if method in (methods.FineTune, methods.Reptile):
        arguments["optimizer"] = methods.inner.SGD(0.1)
    with pytest.raises(RecipeError, match=f"^{method.__name__}: {name} is .+, not 'nonsense'"):
        method(Conv4(), **arguments)


def test_every_choice_of_every_method_is_found() -> None:
    assert len(CHOICES) >= len(METHODS) + 10  # each has a norm


def test_the_nearest_is_suggested_and_positions_count_as_names_do() -> None:
    with pytest.raises(RecipeError, match=r"ProtoNet: distance is 'euclidean' or 'cosine', not 'Cosine' \(did you"):
        ProtoNet(Conv4(), "Cosine")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="MAML: order is 1 or 2, not '2'"):
        MAML(Conv4(), order="2")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="BatchNorm: scale is 'ones' or 'uniform', not 'zeros'"):
        BatchNorm(3, scale="zeros")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("precision", "bf16"), ("reduction", "Mean"), ("batching", "vmaps")])
def test_settings_of_a_training(name: str, value: str) -> None:
    task = TaskShape(5, 1, 1)
    with pytest.raises(RecipeError, match=f"train.{name} is .+, not '{value}'"):
        Training(task, **{name: value})  # type: ignore[arg-type]


def test_methods_of_your_own_are_checked_too() -> None:
    class Own(ProtoNet):
        def __init__(self, backbone: nn.Module, *, mood: Literal["good", "bad"] = "good") -> None:
            super().__init__(backbone)
            self.mood = mood

    assert Own(nn.Flatten()).mood == "good"
    with pytest.raises(RecipeError, match="Own: mood is 'good' or 'bad', not 'glad'"):
        Own(nn.Flatten(), mood="glad")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'backbone'"):
        Own()  # type: ignore[call-arg]


@pytest.mark.parametrize("backbone", [Conv4, "quickstudy.nn.Conv4", torch.rand(3), None])
def test_a_backbone_is_a_network(backbone: Any) -> None:
    with pytest.raises(RecipeError, match=r"the backbone of ProtoNet is a network \(a torch.nn.Module, such as Conv4"):
        ProtoNet(backbone)
