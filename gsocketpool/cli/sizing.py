"""How large a pool should be: what to measure, and what the figures say.

Nothing here opens a socket or looks at a clock: :mod:`gsocketpool.cli.load` measures, :mod:`gsocketpool.cli.size` and
:mod:`gsocketpool.cli.charts` show. Times are seconds, rates are requests a second.

How the knee is found. Throughput is measured several times at each size, and the median counts. The tolerance is 5 %,
or what runs of the same size typically differ by, if that is more. The knee is the smallest size whose throughput is
within the tolerance of the best that any size gave. It is named only if all of this holds:

1. At least three sizes were measured at which hardly a request failed.
2. Each run with at least half of the best throughput holds at least ten requests.
3. This process was not the limit where throughput was best: it had time to spare.
4. Runs of the same size differ by no more than 25 %.
5. The knee is not the smallest size: a flat line has no knee.
6. Larger sizes were measured: one twice as large, or more than one, and one of them larger by a quarter. And what they
   gained does not come to more than twice the tolerance for each doubling. Else throughput may still be rising.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random
from statistics import fmean, median
from typing import Any, Final

from gsocketpool.cli.demo import quantile

__all__ = ["Plan", "Point", "Sample", "Step", "Verdict", "cut_short", "gone", "judge", "little", "merge"]

#: Throughput within this share of the best is as good as the best.
TOLERANCE: Final = 0.05
#: Runs of one size that differ by more than this share tell nothing.
NOISIEST: Final = 0.25
#: So few requests in a run tell nothing either.
FEWEST_REQUESTS: Final = 10
#: A size where a larger share of the requests failed is left out.
FAILURES: Final = 0.01
#: A server that failed every request of so many steps in a row is gone.
PATIENCE: Final = 2
#: A client that works for so large a share of its time is the limit.
SATURATED: Final = 0.9
#: How much larger than the knee the largest size has to be; twice as large, if it is the only larger one.
BEYOND: Final = 1.25
#: Sizes that are tried between two of the first ones, where the knee is.
REFINED: Final = 3
#: Seconds of a step where nobody has said: at least, and at most; in between, so many requests one after the other.
SHORTEST_STEP: Final = 0.5
LONGEST_STEP: Final = 10.0
IN_A_ROW: Final = 20
#: Seconds that all steps may take by plan.
LONGEST: Final = 900.0
#: Seconds that may pass beside the steps, in all: on a machine that is busy more is done in between than one thinks.
SPARE: Final = 10.0


def little(rate: float, seconds: float) -> float:
    """Little's law: how many are there on average, if `rate` of them come each second and stay for so many seconds."""
    return rate * seconds


# What to measure


@dataclass(frozen=True)
class Step:
    """One run of load.

    :ivar size: the pool's ``max_connections``.
    :ivar greenlets: how many send one request after the other.
    """

    size: int
    greenlets: int


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    :ivar most: the largest pool.
    :ivar greenlets: how many send requests side by side; each number is a measurement of its own. The largest one
        decides, and is not below `most`.
    :ivar seconds: that one step measures. Before it, there are at most as many of warming up.
    :ivar repeats: how often each step is done.
    :ivar requests: most requests that one step measures.
    :ivar timeout: seconds for a connect, and for a reply.
    :ivar seed: decides the order of the steps.
    """

    most: int = 32
    greenlets: tuple[int, ...] = (8, 64)
    seconds: float = SHORTEST_STEP
    repeats: int = 3
    requests: int = 100_000
    timeout: float = 5.0
    seed: int = 1961

    @property
    def heaviest(self) -> int:
        """The number of greenlets that decides."""
        return max(self.greenlets)

    def sizes(self) -> list[int]:
        """1, 2, 4, ... and `most`."""
        return sorted({*(1 << n for n in range(self.most.bit_length())), self.most})

    def steps(self) -> list[Step]:
        """The first steps, all repeats, each repeat in an order of its own: so what changes with time hits no size more
        than others. More connections than greenlets would be of no use to anybody."""
        return self._repeated(
            Step(size, greenlets)
            for greenlets in sorted(set(self.greenlets))
            for size in self.sizes()
            if size <= greenlets
        )

    def refined(self, points: Iterable[Point]) -> list[Step]:
        """The steps that look closer at where the knee seems to be, after the first ones.

        The size that seems to be the knee is measured again among them.
        """
        rates = {p.size: p.rate for p in points if p.greenlets == self.heaviest and not p.failing}
        if not rates:
            return []
        threshold = (1 - TOLERANCE) * max(rates.values())
        for below, size in pairwise(sorted(rates)):
            if rates[size] >= threshold:
                if rates[below] >= threshold:
                    return []  # the smallest size is as good as any
                sizes = between(below, size)
                return self._repeated(Step(each, self.heaviest) for each in [*sizes, size]) if sizes else []
        return []

    def most_steps(self) -> int:
        """How many steps there may be in all."""
        return len(self.steps()) + (REFINED + 1) * self.repeats

    def longest(self) -> float:
        """How many seconds all steps may take."""
        return self.most_steps() * 2 * self.seconds + SPARE

    def _repeated(self, steps: Iterable[Step]) -> list[Step]:
        steps, random = list(steps), Random(self.seed)
        return [step for _ in range(self.repeats) for step in random.sample(steps, len(steps))]


def between(lower: int, upper: int, count: int = REFINED) -> list[int]:
    """At most `count` whole numbers between the two, evenly apart."""
    parts = min(count + 1, upper - lower)
    return [lower + (upper - lower) * n // parts for n in range(1, parts)]


def step_seconds(in_use: float) -> float:
    """How long a step should be if one request takes so many seconds."""
    return min(max(SHORTEST_STEP, IN_A_ROW * in_use), LONGEST_STEP)


# What was measured


@dataclass(frozen=True)
class Sample:
    """What one step gave.

    :ivar seconds: how long it was measured.
    :ivar in_use: of each request answered in that time, from having a connection to having the reply.
    :ivar waits: of each, for a connection.
    :ivar errors: how many requests failed, by kind: in that time, or later if they were under way at its end.
    :ivar busy: the share of the time that this process was working, of the time that it had a processor for.
    :ivar lent: how many connections were lent, on average.
    """

    step: Step
    seconds: float
    in_use: Sequence[float]
    waits: Sequence[float]
    errors: Mapping[str, int] = field(default_factory=dict)
    busy: float = 0.0
    lent: float = 0.0

    @property
    def rate(self) -> float:
        """Requests answered in a second."""
        return len(self.in_use) / self.seconds


@dataclass(frozen=True)
class Point:
    """All samples of one size and one number of greenlets.

    :ivar rates: throughput, of each sample.
    :ivar requests: answered, in all samples.
    :ivar fewest: answered, in the sample that has the fewest.
    :ivar in_use: seconds from having a connection to having the reply: the mean.
    :ivar in_use_p50: likewise, the median; ``in_use_p99``: all but one in a hundred are faster.
    :ivar wait: seconds for a connection: the mean. ``wait_p50`` and ``wait_p99`` likewise.
    :ivar errors: how many requests failed, by kind.
    :ivar busy: the share of the time that this process was working: the median of the samples.
    :ivar lent: how many connections were lent: the mean.
    """

    size: int
    greenlets: int
    rates: tuple[float, ...]
    requests: int
    fewest: int
    in_use: float = 0.0
    in_use_p50: float = 0.0
    in_use_p99: float = 0.0
    wait: float = 0.0
    wait_p50: float = 0.0
    wait_p99: float = 0.0
    errors: Mapping[str, int] = field(default_factory=dict)
    busy: float = 0.0
    lent: float = 0.0

    @property
    def rate(self) -> float:
        """Requests answered in a second: the median of the samples."""
        return median(self.rates)

    @property
    def spread(self) -> float:
        """What the samples' throughput differs by, as a share."""
        return (max(self.rates) - min(self.rates)) / self.rate if self.rate else 0.0

    @property
    def failed(self) -> int:
        """How many requests failed."""
        return sum(self.errors.values())

    @property
    def failing(self) -> bool:
        """Whether too many of the requests failed for the rest to tell something."""
        return self.failed > FAILURES * (self.requests + self.failed)


def merge(samples: Iterable[Sample]) -> list[Point]:
    """The points that the samples make up, by greenlets and size."""
    of_step = defaultdict(list)
    for sample in samples:
        of_step[sample.step].append(sample)
    return [_point(step, of_step[step]) for step in sorted(of_step, key=lambda step: (step.greenlets, step.size))]


def _point(step: Step, samples: list[Sample]) -> Point:
    in_use = [each for sample in samples for each in sample.in_use]
    waits = [each for sample in samples for each in sample.waits]
    return Point(
        size=step.size,
        greenlets=step.greenlets,
        rates=tuple(sample.rate for sample in samples),
        requests=len(in_use),
        fewest=min(len(sample.in_use) for sample in samples),
        in_use=fmean(in_use or [0.0]),
        in_use_p50=quantile(in_use, 0.5),
        in_use_p99=quantile(in_use, 0.99),
        wait=fmean(waits or [0.0]),
        wait_p50=quantile(waits, 0.5),
        wait_p99=quantile(waits, 0.99),
        errors=_sum(sample.errors for sample in samples),
        busy=median(sample.busy for sample in samples),
        lent=fmean(sample.lent for sample in samples),
    )


# What it says


@dataclass(frozen=True)
class Verdict:
    """What the figures say.

    :ivar kind: ``knee`` if there is one; else why none is named: ``rising`` (no end in sight), ``flat`` (one connection
        did as much as many), ``client`` (this process was the limit), ``noisy`` (runs of one size differ too much),
        ``brief`` (too few requests in a run), ``failing`` (too many requests failed), ``few`` (too few sizes),
        ``gone`` (in the end all requests failed), ``unfinished`` (not all steps were done, for another reason).
    :ivar greenlets: how many sent the requests that it is about.
    :ivar knee: the smallest size that is as good as any, or None. It is what is recommended.
    :ivar reached: the smallest size that is as good as any, whether it is a knee or not.
    :ivar best: the highest throughput.
    :ivar best_size: the size that gave it.
    :ivar largest: the largest size that counts.
    :ivar tolerance: what is as good as the best, as a share below it.
    :ivar busy: the share of the time that this process was working where throughput was best.
    :ivar in_use: seconds that a request holds a connection in the smallest pool, where the server has the least to do.
    :ivar needed: by Little's law: `best` times `in_use`.
    :ivar failing: the sizes that were left out since too many requests failed.
    :ivar errors: how many requests failed at those sizes, by kind; if it is ``gone``, how many in the last steps.
    """

    kind: str
    greenlets: int
    knee: int | None = None
    reached: int = 0
    best: float = 0.0
    best_size: int = 0
    largest: int = 0
    tolerance: float = TOLERANCE
    busy: float = 0.0
    in_use: float = 0.0
    needed: float = 0.0
    failing: tuple[int, ...] = ()
    errors: Mapping[str, int] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether Little's law gives about the same as the knee, within a factor of two."""
        return self.knee is not None and self.knee / 2 <= self.needed <= self.knee * 2


def judge(points: Iterable[Point], greenlets: int) -> Verdict:
    """Say where the knee is, if there is one: the head of this module has the rules.

    :param greenlets: the number of greenlets to go by.
    """
    measured = [p for p in points if p.greenlets == greenlets]
    good = sorted((p for p in measured if not p.failing), key=lambda p: p.size)
    failing = tuple(sorted(p.size for p in measured if p.failing))
    errors = _sum(p.errors for p in measured if p.failing)
    if not good:
        return Verdict("failing" if failing else "few", greenlets, failing=failing, errors=errors)
    best = max(good, key=lambda p: p.rate)
    spread = median(p.spread for p in good)
    tolerance = max(TOLERANCE, spread)
    threshold = best.rate * (1 - tolerance)
    plateau = [p for p in good if p.rate >= threshold]
    knee = plateau[0]
    busy = median(p.busy for p in plateau)

    found: dict[str, Any] = {
        "greenlets": greenlets,
        "reached": knee.size,
        "best": best.rate,
        "best_size": best.size,
        "largest": good[-1].size,
        "tolerance": tolerance,
        "busy": busy,
        "in_use": good[0].in_use,
        "needed": little(best.rate, good[0].in_use),
        "failing": failing,
        "errors": errors,
    }
    if len(good) < 3:
        kind = "failing" if failing else "few"
    elif min(p.fewest for p in good if 2 * p.rate >= best.rate) < FEWEST_REQUESTS:
        kind = "brief"
    elif busy >= SATURATED:
        kind = "client"
    elif spread > NOISIEST:
        kind = "noisy"
    elif knee is good[0]:
        kind = "flat"
    elif _still_rises(good, knee, tolerance):
        kind = "rising"
    else:
        kind = "knee"
    return Verdict(kind, knee=knee.size if kind == "knee" else None, **found)


def _still_rises(points: list[Point], knee: Point, tolerance: float) -> bool:
    beyond = [p for p in points if p.size > knee.size]
    further = beyond[-1].size / knee.size if beyond else 1.0
    if further < (BEYOND if len(beyond) > 1 else 2):
        return True
    doublings = math.log2(further)
    gained = max(p.rate for p in beyond) / knee.rate
    return math.log2(max(gained, 1.0)) / doublings > math.log2(1 + 2 * tolerance)


def gone(samples: Sequence[Sample]) -> bool:
    """Whether the server seems to be gone: in the last steps every request failed."""
    last = samples[-PATIENCE:]
    return len(last) == PATIENCE and all(sample.errors and not sample.in_use for sample in last)


def cut_short(verdict: Verdict, samples: Sequence[Sample]) -> Verdict:
    """The verdict if these were not all steps: there is no knee in it."""
    if gone(samples):
        return replace(verdict, kind="gone", knee=None, errors=_sum(sample.errors for sample in samples[-PATIENCE:]))
    return replace(verdict, kind="unfinished", knee=None)


def _sum(errors: Iterable[Mapping[str, int]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for each in errors:
        counts.update(each)
    return dict(counts)


def counted(errors: Mapping[str, int]) -> str:
    """So many of each kind, for people."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(errors.items()))


def words(verdict: Verdict, plan: Plan) -> list[str]:
    """What the verdict means, sentence by sentence, for who has to decide."""
    v = verdict
    best = f"{v.best:,.0f} requests a second, at {_connections(v.best_size)}"
    said = {
        "knee": [
            f"The knee is at {_connections(v.knee or 0)}: the smallest pool that comes within {v.tolerance:.0%} of the "
            f"best throughput ({best}).",
            f"Recommended: max_connections={v.knee}, for all processes together that use this server.",
        ],
        "rising": [
            f"No knee found up to {_connections(v.largest)}: throughput may still be rising there (best: {best}).",
            "Measure further, with a larger --max."
            if not v.failing
            else "Measure again once the server bears more connections.",
        ],
        "flat": [
            f"No knee found up to {_connections(v.largest)}: one connection did as much as many, within "
            f"{v.tolerance:.0%} (best: {best}).",
            "The server seems to do one request at a time, or something on the way does. Throughput does not tell how "
            "many connections to take; more than a few will not help.",
        ],
        "client": [
            f"No knee can be named: this process was the limit, not the server. It was busy for {v.busy:.0%} of the "
            f"time that it had a processor (best: {best}).",
            f"It got there with {_connections(v.reached)}; more are of no use to one process that does nothing else. "
            "To find the server's knee, ask for something that takes it longer.",
        ],
        "noisy": [
            f"No knee can be named: runs of the same size differ by {v.tolerance:.0%} (best: {best}).",
            "Measure again with more --seconds, or while the machine and the server have less else to do.",
        ],
        "brief": [
            f"No knee can be named: some runs hold fewer than {FEWEST_REQUESTS} requests.",
            f"Measure again with more --seconds than {plan.seconds:g}, and no fewer --requests.",
        ],
        "failing": [
            f"No knee can be named: too many requests failed ({counted(v.errors)}). {_what_to_do(v, plan)}",
        ],
        "few": ["No knee can be named: fewer than three sizes were measured."],
        "gone": [
            f"The server is gone: {counted(v.errors)}. That is every request of the last {PATIENCE} steps.",
            *([_what_to_do(v, plan)] if "timed out" in v.errors else []),
        ],
        "unfinished": ["No knee is named: not all steps were done."],
    }[v.kind]
    if v.failing and v.kind not in ("failing", "gone"):
        sizes = ", ".join(map(str, v.failing))
        said.append(f"Left out, since more than {FAILURES:.0%} of the requests failed: pools of {sizes}.")
    return said


def _what_to_do(verdict: Verdict, plan: Plan) -> str:
    if "timed out" in verdict.errors:
        return f"A reply may take {plan.timeout:g} s (--timeout): see what the server does, or raise that."
    return "See what the server says."


def check_words(verdict: Verdict, points: Iterable[Point]) -> list[str]:
    """What Little's law says of the same figures, sentence by sentence: nothing, if they are not whole."""
    v = verdict
    if not v.needed or v.kind in ("failing", "gone", "unfinished"):
        return []
    said = [
        f"Little's law: {v.best:,.0f} requests a second x {v.in_use * 1000:.2f} ms in use (in the smallest pool) "
        f"= {v.needed:.1f} connections at work."
    ]
    point = next((p for p in points if (p.size, p.greenlets) == (v.knee or v.best_size, v.greenlets)), None)
    if point is not None:
        working, there = little(point.rate, point.in_use), little(point.rate, point.in_use + point.wait)
        said.append(
            f"With {_connections(point.size)} it gives {working:.1f} at work (lent, as counted: {point.lent:.1f}) and "
            f"{there:.0f} requests under way, waiting ones included (offered: {point.greenlets})."
        )
        if point.lent > 2 * working and not point.failed:
            said.append("The other connections were lent and idle: this process did not get round to using them.")
    if v.knee is not None and not v.agrees:
        said.append(
            "The two differ by more than a factor of two: requests do not take as long under load as they do alone. "
            "Look at the server before you trust either."
        )
    return said


def _connections(count: int) -> str:
    return f"{count:,} connection{'s' * (count != 1)}"
