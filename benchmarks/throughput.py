"""Tasks per second and memory of meta-training, against the loop everyone else writes (``make bench``)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import baseline
import jobs
import measure
import torch
from jobs import Job
from jsonargparse import auto_cli
from report import Row, load, machine, show, write_csv, write_markdown

from quickstudy.engine import LOOP
from quickstudy.engine.train import Group

CHECKED_TASKS = 2
TOLERANCE = 1e-8
"""Largest difference of two meta-gradients in float64, relative to the largest element of all tensors."""


@dataclass
class Contender:
    """One way to train a job.

    Args:
        update: does one update.
        ours: the library's training, if this is it.
    """

    update: Callable[[], object]
    ours: Group | None = None

    @property
    def chunk(self) -> str:
        """Tasks at a time that were chosen."""
        if self.ours is None:
            return ""
        chunk = self.ours.chunks["train"]
        return "loop" if chunk == LOOP else str(chunk)


def contender(job: Job, name: str) -> Contender:
    """Build a contender: a baseline (``loop-png``, ``loop``, ``loop-one-backward``) or ``ours`` (``ours-untraced``)."""
    if name.startswith("ours"):
        group = jobs.group(job, trace=name == "ours", seeds=job.seeds)
        jobs.touch(group)
        return Contender(group.update, group)
    group = jobs.group(job)
    draw = jobs.png_tasks(group) if name == "loop-png" else jobs.tensor_tasks(group)
    jobs.seed_all()
    return Contender(jobs.loop(job, group, draw, one_backward=name == "loop-one-backward").update)


def contenders(job: Job) -> list[str]:
    """Return the names of a job's contenders."""
    images = [] if job.recipe.startswith("sine/") else ["loop-png"]
    return [*images, "loop", "loop-one-backward", "ours", "ours-untraced"]


def check(job: Job) -> float:
    """Make sure that both sides compute the same meta-gradient, and return the largest relative difference.

    In float64, from the same weights on the same tasks; ours in a loop and under vmap, traced and not.

    Raises:
        AssertionError: they do not.
    """
    small = Job(job.name, job.network, job.recipe, (*job.overrides, f"--train.meta_batch={CHECKED_TASKS}"))
    group = jobs.group(small, precision="float64")
    batch = group.batch(0)
    tasks: list[baseline.Example] = [batch[i].tensors for i in range(CHECKED_TASKS)]
    theirs = jobs.loop(small, group, lambda: tasks[0])
    remaining = iter(tasks)
    theirs.backward(lambda: next(remaining))
    worst = 0.0
    for chunk, traced in ((LOOP, True), (CHECKED_TASKS, False)):
        gradients, _ = group.gradients(batch, chunk, traced)
        named = dict(zip(group.models.trained, gradients))
        scale = max(weight.grad.abs().max().item() for weight in theirs.weights if weight.grad is not None)
        for name, weight in zip(jobs.weight_names(group), theirs.weights):
            assert weight.grad is not None
            worst = max(worst, (named[name] - weight.grad).abs().max().item() / scale)
    assert worst < TOLERANCE, f"{job.name}: the two meta-gradients differ by {worst:.1e} of their largest element"
    return worst


def time_job(job: Job, rounds: int, seconds: float) -> list[Row]:
    """Time all contenders of a job in turn."""
    built = {name: contender(job, name) for name in contenders(job)}
    traced, untraced = built["ours"].ours, built["ours-untraced"].ours
    assert traced is not None
    assert untraced is not None
    untraced.chunks = traced.chunks  # one choice for both
    starts = {}
    for name, item in built.items():  # the first update chooses the chunk and traces
        start = time.perf_counter()
        item.update()
        starts[name] = time.perf_counter() - start
    times = measure.interleave({name: item.update for name, item in built.items()}, rounds, seconds)
    rows = []
    for name, own in times.items():
        low, high = own.times_as_fast_as(times["loop"])
        seeds = job.seeds if name.startswith("ours") else 1
        rows.append(
            Row(
                job=job.name,
                contender=name,
                tasks=traced.recipe.train.meta_batch * seeds,
                updates=len(own.all),
                median_ms=own.median * 1e3,
                fastest_ms=own.fastest * 1e3,
                ratio_median=seeds * times["loop"].median / own.median,
                ratio_fastest=seeds * times["loop"].fastest / own.fastest,
                ratio_low=seeds * low,
                ratio_high=seeds * high,
                chunk=built[name].chunk,
                start_s=starts[name],
                target=job.target if name == "ours" else None,
            )
        )
    return rows


def peak_of(job: Job, name: str) -> float:
    """Return the peak memory of training, in MiB beyond what was there before the first update, in a new process."""
    # One thread, because memory does not depend on their number, and a busy machine holds up a single one least.
    command = [sys.executable, __file__, f"--alone={json.dumps([job.name, name])}", "--threads=1"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"{job.name}, {name}:\n{answer.stderr}")
    return float(answer.stdout.splitlines()[-1])


def train_alone(job: Job, name: str, updates: int = 3) -> float:
    """Train a few updates, and return the peak memory in MiB beyond what was there before."""
    item = contender(job, name)
    before = measure.memory()
    measure.forget_peak()
    for _ in range(updates):
        item.update()
    return (measure.peak_memory() - before) / measure.MIB


def main(
    threads: int = 2,
    rounds: int = 10,
    seconds: float = 0.15,
    only: str = "",
    memory: bool = True,
    out: Path | None = None,
    markdown: Path | None = None,
    alone: str | None = None,
) -> None:
    """Compare the library with the loop everyone else writes: first the results, then memory, then speed.

    Args:
        threads: of PyTorch.
        rounds: how often each contender has its turn.
        seconds: how long a turn lasts.
        only: regular expression; only jobs whose names match.
        memory: also measure peak memory (each contender in a process of its own).
        out: CSV file to write.
        markdown: Markdown file to write.
        alone: used within: train one contender, ``[job, contender]``, and print its peak memory.
    """
    torch.set_num_threads(threads)
    if alone is not None:
        job_name, name = json.loads(alone)
        print(train_alone(next(job for job in jobs.JOBS if job.name == job_name), name))
        return
    chosen = jobs.jobs_matching(only)
    facts = {**machine(), "images": jobs.images_from()}
    for job in chosen:
        say(f"same meta-gradient to {check(job):.0e}: {job.name}")
    peaks: dict[tuple[str, str], float] = {}
    for job in chosen if memory else []:
        for name in contenders(job):
            if name == "loop-png":  # the same loop
                continue
            peaks[job.name, name] = peak_of(job, name)
            say(f"{peaks[job.name, name]:7.0f} MiB: {name}, {job.name}")
    facts["load average before timing"] = load()
    rows: list[Row] = []
    for job in chosen:
        say(f"timing: {job.name}")
        rows += time_job(job, rounds, seconds)
    for row in rows:
        row.peak_mib = peaks.get((row.job, row.contender))
    facts["load average after timing"] = load()
    show(rows, facts)
    if out is not None:
        write_csv(out, [asdict(row) for row in rows], facts)
    if markdown is not None:
        write_markdown(markdown, rows, facts)


def say(text: str) -> None:
    """Tell what goes on, on standard error."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    auto_cli(main)
