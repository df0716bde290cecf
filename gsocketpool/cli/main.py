"""The commands: a pool at work, and (in :mod:`gsocketpool.cli.size`) how large one should be."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from gsocketpool import __version__
from gsocketpool.cli.demo import THINKING, Demo, Plan, Report, quantile
from gsocketpool.cli.size import size

__all__ = ["main"]

#: Seconds between two looks at the progress.
REFRESH = 0.1


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Without a command, the demo runs.",
)
@click.version_option(__version__, prog_name="gsocketpool")
@click.pass_context
def main(context: click.Context) -> None:
    """gsocketpool, a connection pool for gevent."""
    if context.invoked_subcommand is None:
        context.invoke(demo)


@main.command()
@click.option("--requests", type=click.IntRange(min=100), default=Plan.requests, show_default=True, help="To be sent.")
@click.option(
    "--greenlets", type=click.IntRange(min=2), default=Plan.greenlets, show_default=True, help="That send them."
)
@click.option(
    "--connections", type=click.IntRange(min=1), default=Plan.connections, show_default=True, help="That they share."
)
@click.option("--seed", type=int, default=Plan.seed, show_default=True, help="Decides who is killed.")
def demo(
    requests: int = Plan.requests,
    greenlets: int = Plan.greenlets,
    connections: int = Plan.connections,
    seed: int = Plan.seed,
) -> None:
    """Many greenlets share few connections to an echo server, and some of them are killed.

    Takes about five seconds. The exit status is 1 if anything came out that a pool must not let happen: a wrong reply,
    an error, a lost slot, a socket too many.
    """
    plan = Plan(requests, greenlets, connections, seed)
    console = Console(highlight=False)
    least, most = (round(seconds * 1000) for seconds in THINKING)
    console.print(
        f"{plan.greenlets:,} greenlets send {plan.requests:,} requests through a pool of {plan.connections:,}, "
        f"to an echo server that thinks {least} to {most} ms. Halfway, some of them are killed (seed {plan.seed})."
    )
    console.print()
    with Demo(plan) as running:
        report = _watch(running, console)
    console.print(_table(report))
    failures = report.failures()
    errors = Console(stderr=True, highlight=False)
    for failure in failures:
        errors.print("FAILED:", failure, style="bold red", markup=False, soft_wrap=True)
    if failures:
        sys.exit(1)
    console.print()
    console.print("The kill cost nobody anything.", style="green")


def _watch(running: Demo, console: Console) -> Report:
    if console.is_terminal and not console.is_dumb_terminal:
        return _watch_bar(running, console)
    quarter = 1
    while not running.wait(REFRESH):
        while running.report.answered * 4 >= running.report.plan.requests * quarter:
            console.print(f"{quarter * 25:3} % of the requests are answered", markup=False)
            quarter += 1
    console.print()
    return running.finish()


def _watch_bar(running: Demo, console: Console) -> Report:
    # Refreshed from here, not by rich's thread, which would compete with the work that is shown.
    with Progress(
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        console=console,
        auto_refresh=False,
        transient=True,
    ) as progress:
        task: TaskID = progress.add_task("", total=running.report.plan.requests)
        done = False
        while not done:
            done = running.wait(REFRESH)
            report, pool = running.report, running.pool
            killed = report.killed_working + report.killed_waiting
            progress.update(
                task,
                completed=report.answered,
                description=f"{pool.in_use} in use, {pool.waiting} waiting" + (f", {killed} killed" if killed else ""),
                refresh=True,
            )
        return running.finish()


def _table(report: Report) -> Table:
    plan = report.plan
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right", style="bold")
    table.add_column()

    def row(name: str, figure: str, remark: str = "", bad: bool = False) -> None:
        table.add_row(name, figure, remark, style="red" if bad else None)

    row(
        "requests",
        f"{plan.requests:,}",
        "all answered" if report.answered == plan.requests else f"{report.answered:,} answered rightly",
        bad=report.answered != plan.requests,
    )
    row(
        "throughput", f"{len(report.latencies) / report.seconds:,.0f}", f"requests a second, for {report.seconds:.1f} s"
    )
    row("latency p50", _ms(quantile(report.latencies, 0.5)), "from request to reply")
    row("latency p99", _ms(quantile(report.latencies, 0.99)))
    row("usual wait", _ms(quantile(report.waits, 0.5)), "for a connection (p50)")
    row("longest wait", _ms(max(report.waits, default=0)))
    row("opened", f"{report.opened:,}", "connections")
    row("reused", f"{report.reused:,}", "times")
    row(
        "most at once",
        f"{report.most_sockets:,}",
        f"sockets that the server saw; the cap is {plan.connections:,}",
        bad=report.most_sockets > plan.connections,
    )
    table.add_section()
    row(
        "killed",
        f"{report.killed_working:,}",
        f"in the middle of a request, and {report.killed_waiting:,} in the queue",
    )
    row("wrong replies", f"{report.wrong:,}", bad=report.wrong > 0)
    row("errors", f"{len(report.errors):,}", bad=bool(report.errors))
    row(
        "slots lost",
        f"{report.slots_lost:,}",
        f"{report.served_at_once:,} borrowers were then served at once",
        bad=report.slots_lost != 0,
    )
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


main.add_command(size)
