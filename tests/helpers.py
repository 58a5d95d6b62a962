"""Small recipes, and the real command as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from quickstudy.methods import Method
from quickstudy.nn import MLP
from quickstudy.task import Support

SINE = """
dataset: {class_path: quickstudy.data.Sine}
method:
  class_path: quickstudy.methods.MAML
  init_args:
    backbone: {class_path: quickstudy.nn.MLP, init_args: {widths: [8, 8]}}
    steps: 2
train: {task: {way: null, shot: 5, queries: 5}, meta_batch: 4, updates: 30, trace: false}
validation: {every: 10, tasks: 20}
test: {tasks: 40}
"""

GLYPHS = """
dataset: {class_path: quickstudy.data.Glyphs}
method:
  class_path: quickstudy.methods.ProtoNet
  init_args:
    backbone: {class_path: quickstudy.nn.Conv4, init_args: {channels: 4}}
train: {task: {way: 5, shot: 1, queries: 3}, meta_batch: 2, updates: 4, trace: false}
validation: {every: 2, tasks: 4}
test: {tasks: 10}
"""


def quickstudy_process(arguments: Sequence[str], folder: Path, **options) -> subprocess.Popen[str]:
    """Start the real command in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "quickstudy", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


class Dropping(nn.Module):
    """A network that draws random numbers in training."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = MLP([width, width])
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.body(x))


class SteepAtZero(Method):
    """A loss that is finite, with a slope that is not."""

    def create(self, features: int, outputs: int) -> None:
        self.offset = nn.Parameter(torch.zeros(outputs))

    def adapt(self, support: Support) -> Tensor:
        return self.offset.abs().sqrt()

    def predict(self, state: Tensor, query_x: Tensor) -> Tensor:
        return state + 0 * self.embed(query_x).sum(1, keepdim=True)
