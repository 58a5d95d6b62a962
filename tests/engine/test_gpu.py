"""The same training on a GPU; skipped where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import GLYPHS, SINE
from torch import Tensor

from quickstudy import engine
from quickstudy.engine import testing
from quickstudy.engine.tracing import trace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("text", [SINE, GLYPHS], ids=["sine", "glyphs"])
@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_gpu_equals_cpu(tmp_path: Path, text: str, seeds: list[int]) -> None:
    settings = engine.parse_recipe(text, ["--train.precision=float64", "--train.trace=true", "--train.updates=4"])
    runs = [
        engine.train(settings, tmp_path / device, name="x", seeds=seeds, device=device) for device in ("cpu", "cuda")
    ]
    for seed in seeds:
        cpu, gpu = (run.load_weights("last", seed) for run in runs)
        torch.testing.assert_close(cpu, gpu, rtol=1e-4, atol=1e-5)  # Adam enlarges rounding where a gradient is zero
    scores = [testing.test_run(run, testing.Wish(tasks=8), device).score for run, device in zip(runs, ("cpu", "cuda"))]
    assert scores[0].mean == pytest.approx(scores[1].mean, rel=1e-2)


def test_half_precision_trains(tmp_path: Path) -> None:
    settings = engine.parse_recipe(GLYPHS, ["--train.precision=bfloat16"])
    assert engine.train(settings, tmp_path / "run", name="x", device="cuda").metrics()[-1]["update"] == 4


def test_traced_program_is_one_cuda_graph() -> None:
    """It computes what the function computes, with inputs it was not captured with, and keeps what it returned."""
    calls = []

    def function(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        calls.append(None)
        return [inputs[0] @ inputs[1], inputs[1].sum()]

    examples = [[torch.randn(4, 4, device="cuda") for _ in range(2)] for _ in range(3)]
    program = trace(function, examples[0])
    results = [program(inputs) for inputs in examples]
    assert len(calls) == 1
    assert "replay" in program.__name__
    for inputs, result in zip(examples, results):
        torch.testing.assert_close(list(result), list(function(inputs)))


def test_traced_randomness_follows_the_seed() -> None:
    inputs = [torch.ones(100, device="cuda")]
    program = trace(lambda inputs: [torch.nn.functional.dropout(inputs[0])], inputs)
    drawn = []
    for seed in (0, 1, 0):
        torch.cuda.manual_seed(seed)
        drawn.append(program(inputs)[0])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_what_cannot_be_captured_still_runs() -> None:
    def function(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return [inputs[0].cpu() * 2]

    inputs = [torch.ones(3, device="cuda")]
    assert torch.equal(trace(function, inputs)(inputs)[0], torch.full((3,), 2.0))
