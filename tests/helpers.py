"""Small recipes, and the real command as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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
