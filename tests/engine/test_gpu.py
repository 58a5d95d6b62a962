"""The same training on a GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import GLYPHS, SINE

from quickstudy import engine
from quickstudy.engine import testing

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
        torch.testing.assert_close(cpu, gpu)
    scores = [testing.test_run(run, testing.Wish(tasks=8), device).score for run, device in zip(runs, ("cpu", "cuda"))]
    assert scores[0].mean == pytest.approx(scores[1].mean, rel=1e-2)


def test_half_precision_trains(tmp_path: Path) -> None:
    settings = engine.parse_recipe(GLYPHS, ["--train.precision=bfloat16"])
    assert engine.train(settings, tmp_path / "run", name="x", device="cuda").metrics()[-1]["update"] == 4
