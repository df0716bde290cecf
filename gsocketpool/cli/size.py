"""``python -m gsocketpool size``: how many connections a server is worth. Needs click and rich."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import signal
import ssl
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gsocketpool import __version__
from gsocketpool.cli.load import Address, NoAnswerError, Request, Run, Target, first_contact, is_here, shorten, unescape
from gsocketpool.cli.practice import Practice, PracticeServer
from gsocketpool.cli.sizing import (
    LONGEST,
    Plan,
    Point,
    Verdict,
    check_words,
    counted,
    cut_short,
    judge,
    merge,
    step_seconds,
    words,
)

__all__ = ["size"]

#: Picture formats; charts.py has them too, and cannot be loaded to ask.
FORMATS: Final = (".svg", ".png")
#: What the practice server is asked.
PRACTICE: Final = Request(b"ping\n", b"\n")
#: Why a run can have ended early.
_WHY: Final = {
    "interrupted": "Ctrl-C was pressed",
    "late": "the time was up; late replies had to be awaited after each step, for up to {:g} s (--timeout)",
    "gone": "the server is gone",
}
#: Descriptors that this process needs beside its sockets.
SPARE: Final = 64


def _escaped(context: click.Context, param: click.Parameter, text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        data = unescape(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if not data:
        raise click.BadParameter("it is empty")
    return data


@click.command()
@click.argument("address", required=False)
@click.option("--send", callback=_escaped, help=r"One request, such as 'PING\r\n'.")
@click.option("--until", callback=_escaped, help=r"What ends a reply, such as '\r\n'.")
@click.option("--expect-bytes", type=click.IntRange(1, 2**30), help="Or how many bytes a reply has.")
@click.option("--tls", is_flag=True, help="Speak TLS, and verify the server.")
@click.option("--ca", type=click.Path(exists=True, dir_okay=False), help="Trust the certificates in this file alone.")
@click.option("--max", "most", type=click.IntRange(4, 1024), default=Plan.most, show_default=True, help="Largest pool.")
@click.option(
    "--greenlets",
    type=click.IntRange(1, 16384),
    multiple=True,
    help="How many send requests. Can be given several times; the largest number decides.  "
    "[default: a quarter of --max, and twice --max]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.05, 60),
    help="That a step measures.  [default: 0.5, and longer where a request takes long]",
)
@click.option(
    "--repeats", type=click.IntRange(2, 20), default=Plan.repeats, show_default=True, help="Runs of each step."
)
@click.option(
    "--requests",
    type=click.IntRange(min=100),
    default=Plan.requests,
    show_default=True,
    help="Most that a step measures.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 60),
    default=Plan.timeout,
    show_default=True,
    help="Seconds for a connect, and for a reply.",
)
@click.option("--seed", type=int, default=Plan.seed, show_default=True, help="Decides the order of the steps.")
@click.option("--workers", type=click.IntRange(1, 256), help="Of the practice server.  [default: 4]")
@click.option("--service", type=click.FloatRange(0.0005, 10), help="Seconds that it takes.  [default: 0.005]")
@click.option("--picture", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="An SVG or PNG file.")
@click.option("--json", "as_json", is_flag=True, help="For machines, on standard output.")
@click.option("--yes", is_flag=True, help="Do not ask before another machine is put under load.")
def size(address: str | None, picture: Path | None, as_json: bool, yes: bool, **given: Any) -> None:
    """How many connections is a server worth?

    Puts load on it with pools of 1, 2, 4, ... connections, and shows what each gives. ADDRESS is tcp://host:port or
    unix:/path:

    \b
    python -m gsocketpool size tcp://127.0.0.1:6379 \\
        --send 'PING\\r\\n' --until '\\r\\n'

    Without one, a practice server with a limit that is known is measured.
    """
    where = _address(address, given)
    plan = _plan(given)
    _refuse_picture(picture)
    target = _target(where, given)
    if where is not None:
        _ask_first(where, target.places, plan, yes)

    talk = Console(stderr=as_json, highlight=False)
    with ExitStack() as stack:
        stack.enter_context(_no_log())
        practice = None
        if where is None:
            practice = Practice(given["workers"] or Practice.workers, given["service"] or Practice.service)
            server = stack.enter_context(PracticeServer(practice))
            target.address = Address(f"tcp://127.0.0.1:{server.port}", "127.0.0.1", server.port)
            target.places = ["127.0.0.1"]
        try:
            reply, seconds = first_contact(target)
        except NoAnswerError as error:
            raise click.ClickException(str(error)) from error
        if given["seconds"] is None:
            plan = _not_too_long(dataclasses.replace(plan, seconds=round(step_seconds(seconds), 2)))
        _announce(talk, target, plan, practice, reply, seconds)
        began = perf_counter()
        stop = stack.enter_context(_ctrl_c())
        measuring = Run(target, plan, stop)
        _watch(talk, measuring, plan)
        took = perf_counter() - began

    points = merge(measuring.samples)
    verdict = judge(points, plan.heaviest)
    if measuring.ended:
        verdict = cut_short(verdict, measuring.samples)
    found = Found(target, plan, practice, reply, seconds, took, measuring.ended, points, verdict)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
    else:
        _show(talk, found)
    if picture is not None and points:
        _draw(talk, found, picture)
    if measuring.ended:
        talk.print(
            f"Ended early, after {len(measuring.samples)} of at most {plan.most_steps()} steps and {took:.0f} s: "
            f"{_WHY[measuring.ended].format(plan.timeout)}.",
            style="red",
        )
        sys.exit(1)


# What was given


def _address(text: str | None, given: dict[str, Any]) -> Address | None:
    """Refuse what does not go together."""
    if text is None:
        for name in ("send", "until", "expect_bytes", "tls", "ca"):
            if given[name]:
                raise click.UsageError(
                    f"--{name.replace('_', '-')} is for a server of yours, and no address is given: tcp://host:port "
                    "or unix:/path"
                )
        return None
    try:
        address = Address.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'ADDRESS'") from None
    for name in ("workers", "service"):
        if given[name] is not None:
            raise click.UsageError(f"--{name} is for the practice server, which runs where no address is given")
    if given["send"] is None:
        raise click.UsageError(r"--send is missing: what is a request? For instance --send 'PING\r\n' --until '\r\n'")
    if given["until"] is None and given["expect_bytes"] is None:
        raise click.UsageError("where does a reply end? Give --until or --expect-bytes")
    if given["until"] is not None and given["expect_bytes"] is not None:
        raise click.UsageError("--until and --expect-bytes both say where a reply ends: give one of them")
    if given["ca"] is not None and not given["tls"]:
        raise click.UsageError("--ca is of no use without --tls")
    if given["tls"] and address.path:
        raise click.UsageError("--tls is for tcp://host:port, not for a Unix socket")
    return address


def _plan(given: dict[str, Any]) -> Plan:
    most = given["most"]
    greenlets = given["greenlets"] or (most // 4, 2 * most)
    if max(greenlets) < most:
        raise click.UsageError(
            f"{max(greenlets)} greenlets cannot use a pool of --max {most}: give more --greenlets, or a smaller --max"
        )
    _refuse_too_few_descriptors(most)
    return _not_too_long(
        Plan(
            most=most,
            greenlets=tuple(greenlets),
            seconds=given["seconds"] or Plan.seconds,
            repeats=given["repeats"],
            requests=given["requests"],
            timeout=given["timeout"],
            seed=given["seed"],
        )
    )


def _not_too_long(plan: Plan) -> Plan:
    if plan.longest() > LONGEST:
        raise click.UsageError(
            f"{plan.most_steps()} steps of {plan.seconds:g} s, each with as much warming up, may take "
            f"{plan.longest() / 60:.0f} minutes, and {LONGEST / 60:.0f} are the limit: give a smaller --seconds, "
            "--repeats or --max, or fewer --greenlets"
        )
    return plan


def _refuse_too_few_descriptors(most: int) -> None:
    try:
        import resource
    except ImportError:
        return  # not a Unix
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and most + SPARE > limit:
        raise click.UsageError(
            f"--max {most} needs {most + SPARE} descriptors, and this process may have {limit} (ulimit -n)"
        )


def _refuse_picture(picture: Path | None) -> None:
    """Before the load, not after."""
    if picture is None:
        return
    if picture.suffix not in FORMATS:
        raise click.BadParameter(f"{str(picture)!r} must end in .svg or .png", param_hint="'--picture'")
    if not picture.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(picture.parent)!r}", param_hint="'--picture'")
    if "matplotlib" in sys.modules:
        missing = sys.modules["matplotlib"] is None
    else:
        missing = importlib.util.find_spec("matplotlib") is None
    if missing:
        raise click.UsageError(
            '--picture needs matplotlib, and it is not there. Install it with:\n    pip install "gsocketpool[cli]"'
        )


def _target(where: Address | None, given: dict[str, Any]) -> Target:
    if where is None:
        return Target(Address(""), PRACTICE, timeout=given["timeout"])
    try:
        tls = ssl.create_default_context(cafile=given["ca"]) if given["tls"] else None
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{given['ca']!r} has no certificates ({error})", param_hint="'--ca'") from None
    try:
        places = where.resolve()
    except (OSError, UnicodeError) as error:
        raise click.ClickException(f"{where.text} cannot be reached: {where.host!r} is not known ({error}).") from None
    request = Request(given["send"], given["until"], given["expect_bytes"] or 0)
    return Target(where, request, places, tls, given["timeout"])


def _ask_first(where: Address, places: list[str], plan: Plan, yes: bool) -> None:
    """Nothing has been sent so far but the look-up of the name."""
    if yes or is_here(places):
        return
    which = where.host if places == [where.host] else f"{where.host} ({', '.join(places)})"
    what = (
        f"{which} is not this machine. It would get load: up to {plan.most} connections, and as many requests as "
        f"{plan.heaviest} greenlets can send."
    )
    if not sys.stdin.isatty():
        raise click.UsageError(f"{what} Nobody can be asked whether that is wanted: give --yes if it is.")
    click.echo(what, err=True)
    if not click.confirm("Do that only to a server that you may put under load. Go on?", err=True):
        raise click.ClickException("Nothing was sent.")


@contextmanager
def _no_log() -> Iterator[None]:
    """The pool says what becomes of each connection; here the table does, and tracebacks would hide it."""
    logger = logging.getLogger("gsocketpool")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C was pressed. The second time it does what it always did."""
    pressed = False

    def press(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    # Not an exception, which would come up in whichever greenlet runs.
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


# What is shown


@dataclass(frozen=True)
class Found:
    """All that there is to show."""

    target: Target
    plan: Plan
    practice: Practice | None
    reply: bytes
    request_seconds: float
    took: float
    ended: str | None
    points: list[Point]
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        """For machines. Times are seconds, rates are requests a second."""
        verdict = self.verdict
        return {
            "gsocketpool": __version__,
            "address": self.target.address.text,
            "practice": self.practice and dataclasses.asdict(self.practice),
            "send": _text(self.target.request.send),
            "reply": _text(self.reply),
            "request_seconds": self.request_seconds,
            "plan": dataclasses.asdict(self.plan),
            "took": self.took,
            "done": self.ended is None,
            "ended": self.ended,
            "points": [
                dataclasses.asdict(p) | {"rate": p.rate, "spread": p.spread, "failing": p.failing} for p in self.points
            ],
            "verdict": dataclasses.asdict(verdict)
            | {"recommended": verdict.knee, "agrees": verdict.agrees if verdict.knee else None},
            "words": words(verdict, self.plan),
            "check": check_words(verdict, self.points),
        }


def _text(data: bytes) -> str:
    return data.decode("ascii", "backslashreplace")


def _announce(
    talk: Console, target: Target, plan: Plan, practice: Practice | None, reply: bytes, seconds: float
) -> None:
    name = target.address.text
    if practice:
        name = f"a practice server of {practice.workers} workers, {practice.service * 1000:g} ms a request"
    talk.print(
        f"Measuring {name}. It answers {shorten(target.request.send)} with {shorten(reply)}, in "
        f"{seconds * 1000:.2f} ms where nobody else asks.",
        markup=False,
    )
    greenlets = " and ".join(map(str, sorted(set(plan.greenlets))))
    longest = plan.longest() + 2 * plan.seconds + plan.timeout + 1
    talk.print(
        f"Pools of 1 to {plan.most} connections, {greenlets} greenlets, at most {plan.most_steps()} steps of "
        f"{plan.seconds:g} s and as much warming up: done in {math.ceil(longest)} s at the latest (seed {plan.seed}). "
        "Ctrl-C shows what there is by then."
    )
    talk.print()


def _watch(talk: Console, measuring: Run, plan: Plan) -> None:
    """Run it. The bar moves between two steps, so that it takes no time from one that is measured."""
    bar = talk.is_terminal and not talk.is_dumb_terminal
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=talk,
        auto_refresh=False,
        transient=True,
        disable=not bar,
    ) as progress:
        task = progress.add_task("", total=plan.most_steps())
        quarter = 1
        for step in chain(measuring, [None]):
            done = len(measuring.samples)
            what = f"a pool of {step.size}, {step.greenlets} greenlets" if step else ""
            progress.update(task, completed=done, description=what, refresh=True)
            while not bar and done * 4 >= plan.most_steps() * quarter:
                talk.print(f"{quarter * 25:3} % of the steps are done", markup=False)
                quarter += 1
    if quarter > 1:
        talk.print()


def _show(talk: Console, found: Found) -> None:
    for greenlets in sorted({p.greenlets for p in found.points}):
        talk.print(_table(found.points, greenlets, found.verdict))
        talk.print()
    for number, sentence in enumerate(words(found.verdict, found.plan)):
        talk.print(sentence, markup=False, style="bold green" if found.verdict.knee and number < 2 else None)
    for sentence in check_words(found.verdict, found.points):
        talk.print(sentence, markup=False)


def _table(points: Iterable[Point], greenlets: int, verdict: Verdict) -> Table:
    """What so many greenlets measured, a row for each size of the pool."""
    shown = sorted((p for p in points if p.greenlets == greenlets), key=lambda point: point.size)
    errors = any(p.failed for p in shown)
    table = Table(
        title=f"{greenlets:,} greenlets; times in milliseconds",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for name in ("pool\nsize", "requests\na second", "latency\np50", "\np99", "wait\np50", "\np99"):
        table.add_column(name, justify="right")
    if errors:
        table.add_column("failed", justify="right")
    table.add_column()
    for p in shown:
        knee = (p.size, p.greenlets) == (verdict.knee, verdict.greenlets)
        times = (p.in_use_p50, p.in_use_p99, p.wait_p50, p.wait_p99)
        cells = [f"{1000 * each:,.2f}" if p.requests else "-" for each in times]
        if errors:
            cells.append(f"{p.failed:,}")
        table.add_row(
            f"{p.size:,}",
            f"{p.rate:,.0f}",
            *cells,
            "<- the knee" if knee else counted(p.errors),
            style="bold green" if knee else "red" if p.failing else None,
        )
    return table


def _draw(talk: Console, found: Found, picture: Path) -> None:
    from gsocketpool.cli import charts

    name = found.target.address.text
    if found.practice:
        name = f"practice server, {found.practice.workers} workers"
    try:
        charts.draw(found.points, found.verdict, picture, name)
    except OSError as error:
        raise click.ClickException(f"the picture cannot be written: {error}") from None
    talk.print(f"The picture is in {picture}.", markup=False, soft_wrap=True)
