"""Few-shot learning in PyTorch: every meta-learner behind one interface."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quickstudy.classifier import FewShotClassifier
    from quickstudy.engine.objects import meta_test, meta_train
    from quickstudy.engine.recipe import Recipe, Testing, Training, Validation
    from quickstudy.task import Task, TaskShape

__version__ = "0.1.0"
__all__ = [
    "FewShotClassifier",
    "Recipe",
    "Task",
    "TaskShape",
    "Testing",
    "Training",
    "Validation",
    "__version__",
    "meta_test",
    "meta_train",
]

_HOMES = {
    "FewShotClassifier": "classifier",
    **dict.fromkeys(("meta_test", "meta_train"), "engine.objects"),
    **dict.fromkeys(("Recipe", "Testing", "Training", "Validation"), "engine.recipe"),
    **dict.fromkeys(("Task", "TaskShape"), "task"),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, and torch with it, which `quickstudy --help` needs not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"quickstudy.{_HOMES[name]}"), name)
