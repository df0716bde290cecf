"""What the cases share: running jobs side by side, and printing what came out."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from benchmarks.peer import ROOT, Peer

Job = dict[str, Any]
Result = dict[str, float]
K = TypeVar("K", bound=Hashable)

#: Seconds until a process that measures is given up: a pool that hangs must not hang the others.
LIMIT = 900


@dataclass
class Run:
    """One run of the benchmarks: how thorough, and what was found on the way."""

    quick: bool = False
    targets: list[tuple[str, str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def available(self, peers: Mapping[str, Peer], names: Iterable[str]) -> list[str]:
        """Return those peers that can be measured here; note the others."""
        found = []
        for name in names:
            note = peers[name].missing()
            if note is None:
                found.append(name)
            elif note not in self.notes:
                self.notes.append(note)
        return found

    def target(
        self, what: str, measured: float, *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """Keep a line for the table at the end."""
        if at_most is not None:
            bound, reached = f"<= {at_most:g}", measured <= at_most
        else:
            assert at_least is not None
            bound, reached = f">= {at_least:g}", measured >= at_least
        self.targets.append((what, bound, f"{measured:.2f}", "yes" if reached else "no"))

    def side_by_side(
        self, jobs: dict[K, Job], *, patched: Iterable[K] = (), processes: int, rounds: int = 1, apart: bool = False
    ) -> dict[K, list[Result]]:
        """Do every job ``processes * rounds`` times, taking turns: A B C A B C ... A quick run does each once.

        New processes are started on the way, because the layout of one process's memory can favour one of its jobs.

        :param patched: those jobs that need a monkey-patched process; it runs right after the plain one.
        :param apart: each job has processes of its own, for those that leave the memory of theirs in another state.
        """
        if self.quick:
            processes = rounds = 1
        patched = list(patched)
        results: dict[K, list[Result]] = {name: [] for name in jobs}
        if apart:
            for _ in range(processes * rounds):
                for name in jobs:
                    results[name] += run([jobs[name]], patched=name in patched)
            return results
        for _ in range(processes):
            for wanted in (False, True):
                turns = [name for name in jobs if (name in patched) is wanted] * rounds
                if turns:
                    for name, result in zip(turns, run([jobs[name] for name in turns], patched=wanted), strict=True):
                        results[name].append(result)
        return results


def run(jobs: Sequence[Job], *, patched: bool = False) -> list[Result]:
    """Do the jobs, one after the other, in one new process.

    :raises RuntimeError: the process ended with an error, which it has printed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker", *(["--patched"] if patched else [])],
        cwd=ROOT,
        input=json.dumps(list(jobs)),
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or len(results) != len(jobs):
        unfinished = jobs[len(results)] if len(results) < len(jobs) else "the end"
        raise RuntimeError(f"the measuring process ended with code {done.returncode} at {unfinished}")
    return results


def ratio(ours: Sequence[Result], theirs: Sequence[Result], key: str) -> float:
    """Return the median, over the rounds, of what one found divided by what the other found in the same round."""
    return statistics.median(a[key] / b[key] for a, b in zip(ours, theirs, strict=True))


def median(results: Sequence[Result], key: str) -> float:
    """Return the median over the rounds."""
    return statistics.median(result[key] for result in results)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of the ordered values lie."""
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the power of the size with which the cost grows: 1 is linear, 2 is quadratic."""
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(cost) for cost in costs]).slope


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table that reads well on a terminal and in a reStructuredText file."""
    cells = [list(head), *([cell or "—" for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("=" * width for width in widths)
    return "\n".join([rule, line(cells[0]), rule, *map(line, cells[1:]), rule])


def cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
