"""How long an update takes, and how much memory it needs."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1024 * 1024


@dataclass
class Times:
    """Seconds of single updates, in rounds.

    Args:
        rounds: the updates of each round.
    """

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def all(self) -> list[float]:
        return [seconds for round_ in self.rounds for seconds in round_]

    @property
    def median(self) -> float:
        return statistics.median(self.all)

    @property
    def fastest(self) -> float:
        return min(self.all)

    def times_as_fast_as(self, other: Times) -> tuple[float, float]:
        """Return the lowest and the highest ratio of medians of a round: how far noise could move the result."""
        ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(self.rounds, other.rounds)]
        return min(ratios), max(ratios)


def interleave(updates: Mapping[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, Times]:
    """Time several contenders in turn, so that whatever else the machine does meets all of them.

    Args:
        updates: does one update of each contender, warmed up.
        rounds: how often each has its turn; every other round goes through them backwards.
        seconds: how long a turn lasts, at least one update.
    """
    times = {name: Times() for name in updates}
    counts = {}
    for name, update in updates.items():
        update()
        start = time.perf_counter()
        update()
        counts[name] = max(1, round(seconds / (time.perf_counter() - start)))
    for number in range(rounds):
        for name in list(updates)[:: -1 if number % 2 else 1]:
            turn = []
            for _ in range(counts[name]):
                start = time.perf_counter()
                updates[name]()
                turn.append(time.perf_counter() - start)
            times[name].rounds.append(turn)
    return times


def forget_peak() -> None:
    """Let the highest use of memory so far count no more, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the highest resident memory of this process in bytes, since :func:`forget_peak` if that works.

    Linux starts ``ru_maxrss`` of a new program at what its parent held, so its own high-water mark is read there.
    """
    mark = _status("VmHWM")
    if mark is not None:
        return mark
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory() -> int:
    """Return the resident memory of this process in bytes; its peak where the system does not tell."""
    now = _status("VmRSS")
    return peak_memory() if now is None else now


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
