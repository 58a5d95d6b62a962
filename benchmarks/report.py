"""Tables of the benchmarks: on the terminal, as CSV, as Markdown."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quickstudy.engine.run import environment
from quickstudy.files import markdown_table, write_text

Cells = list[list[str]]


def machine() -> dict[str, Any]:
    """Return what a benchmark depends on besides its job: versions, machine, commit, date, cores."""
    return {
        **{key: value for key, value in environment("cpu").items() if key != "command"},
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "cores": os.cpu_count(),
    }


def load() -> str:
    """Return the load averages of the machine over one, five and fifteen minutes."""
    return " ".join(f"{load:.2f}" for load in os.getloadavg())


@dataclass
class Row:
    """One contender of one job.

    Args:
        job: its name.
        contender: its name.
        tasks: of an update.
        updates: how many were timed.
        median_ms: of an update.
        fastest_ms: the fastest update.
        ratio_median: times as fast as the contender ``loop``, by medians of all updates.
        ratio_fastest: the same by the fastest updates.
        ratio_low: lowest ratio of medians within a round.
        ratio_high: highest ratio of medians within a round.
        chunk: tasks at a time, as chosen by timing (``loop``: one after the other).
        start_s: seconds of the first update: choice of the chunk, and tracing.
        target: tasks per second that were promised.
        peak_mib: peak memory of training beyond what was there before.
    """

    job: str
    contender: str
    tasks: int
    updates: int
    median_ms: float
    fastest_ms: float
    ratio_median: float
    ratio_fastest: float
    ratio_low: float
    ratio_high: float
    chunk: str
    start_s: float
    target: float | None = None
    peak_mib: float | None = None

    @property
    def per_second(self) -> float:
        """Tasks per second, by the median."""
        return self.tasks / self.median_ms * 1e3


SPEED_NOTE = (
    "Tasks per second by the median update. Ratios: how many times as fast as the loop, by medians / by fastest "
    "updates, and in brackets the range of the medians of single rounds. PNG: the loop with images decoded one by one; "
    "loop: with decoded images in memory. Chunk: tasks at a time under vmap, chosen by timing. Start: first update, "
    "with choice of the chunk and tracing."
)
MEMORY_NOTE = (
    "Peak resident memory in MiB while training, beyond what was there before the first update, in a process of its "
    "own. Start-up (choice of the chunk, tracing) counts. One backward: a single backward pass over all tasks."
)


def by_job(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Return the rows as ``[job][contender]``."""
    result: dict[str, dict[str, Row]] = {}
    for row in rows:
        result.setdefault(row.job, {})[row.contender] = row
    return result


def speed_table(rows: Sequence[Row]) -> tuple[list[str], Cells]:
    """Return header and cells of the comparison of speed."""
    header = ["job", "loop, PNG", "loop", "ours", "chunk", "ours / PNG", "ours / loop", "untraced / loop", "start"]
    cells = []
    for job, own in by_job(rows).items():
        ours, untraced, png, loop = own["ours"], own["ours-untraced"], own.get("loop-png"), own["loop"]
        cells.append(
            [
                job,
                number(png.per_second) if png else "–",
                number(loop.per_second),
                number(ours.per_second),
                ours.chunk,
                f"{png.median_ms / ours.median_ms:.2f} / {png.fastest_ms / ours.fastest_ms:.2f}" if png else "–",
                f"{ours.ratio_median:.2f} / {ours.ratio_fastest:.2f} ({ours.ratio_low:.2f}–{ours.ratio_high:.2f})",
                f"{untraced.ratio_median:.2f} / {untraced.ratio_fastest:.2f}",
                f"{ours.start_s:.1f} s",
            ]
        )
    return header, cells


def memory_table(rows: Sequence[Row]) -> tuple[list[str], Cells]:
    """Return header and cells of the comparison of memory."""
    header = ["job", "loop", "loop, one backward", "ours", "untraced", "ours / loop", "ours / one backward"]
    cells = []
    for job, own in by_job(rows).items():
        peaks = [own[name].peak_mib for name in ("loop", "loop-one-backward", "ours", "ours-untraced")]
        loop, once, ours, untraced = (float("nan") if peak is None else peak for peak in peaks)
        if ours == ours:
            ratios = [f"{ours / loop:.2f}", f"{ours / once:.2f}"]
            cells.append([job, *(f"{peak:,.0f}" for peak in (loop, once, ours, untraced)), *ratios])
    return header, cells


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for every target, and for every job in which ours is slower than the loop."""
    sentences = []
    for row in rows:
        if row.contender == "ours" and row.target is not None:
            verdict = "met" if row.per_second >= row.target else "missed"
            sentences.append(f"{verdict}: {row.job}: {row.per_second:,.0f} tasks/s, target {row.target:,.0f}")
    slower = [row for row in rows if row.contender == "ours" and row.ratio_median < 1]
    sentences += [f"slower than the loop: {row.job}: {row.ratio_median:.2f}" for row in slower]
    if not slower:
        sentences.append("met: nowhere slower than the loop")
    return sentences


def show(rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Print the tables to the terminal."""
    console = Console()
    console.print(" · ".join(f"{key} {value}" for key, value in flat(facts).items()), highlight=False)
    for title, note, (header, cells) in _tables(rows):
        print_table(title, header, cells, note)
    for sentence in verdicts(rows):
        console.print(sentence, highlight=False)


def print_table(title: str, header: Sequence[str], cells: Cells, note: str | None = None) -> None:
    """Print a table to the terminal; into a file or a pipe at its full width."""
    console = Console()
    if not console.is_terminal:
        console.width = 180
    table = Table(title=title, caption=note, title_justify="left", caption_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for line in cells:
        table.add_row(*line)
    console.print(table)


def publish(
    title: str,
    header: Sequence[str],
    cells: Cells,
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    out: Path | None,
    markdown: Path | None,
) -> None:
    """Print a table to the terminal, and write its rows as CSV and the table as Markdown where files are named."""
    print_table(title, header, cells)
    if out is not None:
        write_csv(out, rows, facts)
    if markdown is not None:
        write_text(markdown, f"# {title}\n\n{facts_markdown(facts)}\n\n{markdown_table(header, cells)}\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write one line for each row, each with all facts about the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {key: round(value, 4) if isinstance(value, float) else value for key, value in {**row, **flat(facts)}.items()}
        for row in rows
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def write_markdown(path: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Write the tables, the verdicts and the facts about the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = ["# Meta-training against the loop everyone else writes", facts_markdown(facts)]
    for title, note, (header, cells) in _tables(rows):
        parts += [f"## {title}", markdown_table(header, cells), note]
    parts += ["## Targets", "\n".join(f"- {sentence}" for sentence in verdicts(rows))]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def facts_markdown(facts: Mapping[str, Any]) -> str:
    """Return the facts about the machine as a list."""
    return "\n".join(f"- {key}: {value}" for key, value in flat(facts).items())


def flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested facts as one level."""
    result: dict[str, Any] = {}
    for key, value in facts.items():
        result.update(value if isinstance(value, Mapping) else {key: value})
    return result


def number(value: float) -> str:
    """Return a number with as many digits as it deserves."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _tables(rows: Sequence[Row]) -> list[tuple[str, str, tuple[list[str], Cells]]]:
    tables = [("Speed", SPEED_NOTE, speed_table(rows))]
    if any(row.peak_mib is not None for row in rows):
        tables.append(("Memory", MEMORY_NOTE, memory_table(rows)))
    return tables
