"""What ``python -m gsocketpool`` shows as tables. Needs rich."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from gsocketpool.cli.demo import Report, quantile
from gsocketpool.cli.sizing import Point, Verdict

__all__ = ["of_points", "of_report"]


def of_report(report: Report) -> Table:
    """The demo's."""
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


def of_points(points: Iterable[Point], greenlets: int, verdict: Verdict) -> Table:
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
        cells = [f"{1000 * each:,.2f}" for each in (p.in_use_p50, p.in_use_p99, p.wait_p50, p.wait_p99)]
        if errors:
            cells.append(f"{p.failed:,}")
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(p.errors.items()))
        table.add_row(
            f"{p.size:,}",
            f"{p.rate:,.0f}",
            *cells,
            "<- the knee" if knee else kinds,
            style="bold green" if knee else "red" if p.failing else None,
        )
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
