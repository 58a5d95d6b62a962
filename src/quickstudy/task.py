"""The one data structure that travels through the house."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from quickstudy.errors import DataError, RecipeError


@dataclass(frozen=True)
class TaskShape:
    """How large a task is.

    Args:
        way: classes of a task; ``None`` for regression.
        shot: support examples of each class (regression: in all).
        queries: query examples of each class (regression: in all).
    """

    way: int | None
    shot: int
    queries: int

    def __post_init__(self) -> None:
        if (self.way is not None and self.way < 2) or self.shot < 1 or self.queries < 1:
            raise DataError(
                f"a task needs at least two classes, one shot and one query; got way {self.way}, "
                f"shot {self.shot}, queries {self.queries}"
            )


class Support(NamedTuple):
    """The labelled examples that a method adapts to: ``x [M, ...]``, ``y [M]``, and the number of classes."""

    x: Tensor
    y: Tensor
    way: int | None

    @property
    def members(self) -> Tensor:
        """Which examples are of which class, bool ``[way, M]``.

        Raises:
            RecipeError: a regression task has no classes.
        """
        if self.way is None:
            raise RecipeError("this method learns classes, and a regression task has none: use another method")
        return self.y[None, :] == torch.arange(self.way, device=self.y.device)[:, None]

    def targets(self, dtype: torch.dtype) -> Tensor:
        """Return what a prediction should be: one-hot labels ``[M, way]`` of a type; in regression ``y``."""
        return self.y if self.way is None else self.members.T.to(dtype)


@dataclass(frozen=True)
class Task:
    """One task, or a batch of them (then every tensor has one more axis in front).

    Shapes of one task: ``support_x [M, ...]``, ``support_y [M]``, ``query_x [Q, ...]``, ``query_y [Q]``.
    Class labels are ``0..way-1`` (int64). In regression ``way`` is ``None`` and the targets are
    ``[M, D]`` and ``[Q, D]`` floats.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    way: int | None = None

    @classmethod
    def stack(cls, tasks: Sequence[Task]) -> Task:
        """Return tasks, or batches of them, of one size on a new leading axis."""
        return cls(*(torch.stack(parts) for parts in zip(*(task.tensors for task in tasks))), way=tasks[0].way)

    @classmethod
    def of_noise(cls, way: int, shape: Sequence[int]) -> Task:
        """Return a task of random inputs ``[2 * way, *shape]``, for what depends on nothing but shapes."""
        generator = torch.Generator().manual_seed(0)  # other draws are to stay what they are
        x, y = torch.rand(2 * way, *shape, generator=generator), torch.arange(way).repeat_interleave(2)
        return cls(x, y, x, y, way)

    @property
    def support(self) -> Support:
        return Support(self.support_x, self.support_y, self.way)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.support_x, self.support_y, self.query_x, self.query_y

    def map(self, function: Callable[[Tensor], Tensor]) -> Task:
        """Apply ``function`` to each of the four tensors."""
        return replace(
            self,
            support_x=function(self.support_x),
            support_y=function(self.support_y),
            query_x=function(self.query_x),
            query_y=function(self.query_y),
        )

    def __getitem__(self, index: int | slice) -> Task:
        """Return one task (int), or some tasks (slice), of a batch."""
        return self.map(lambda tensor: tensor[index])

    def __len__(self) -> int:
        """Return the number of tasks of a batch."""
        return self.support_x.shape[0]
