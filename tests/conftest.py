"""What tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import quickstudy_process


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests run side by side: two processes of two threads each on two cores wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Run the real command in an empty folder; return exit status, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        process = quickstudy_process(arguments, tmp_path)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    return run
