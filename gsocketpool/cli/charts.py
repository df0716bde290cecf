"""The picture of ``python -m gsocketpool size``: throughput and times against the pool's size. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from gsocketpool.cli.sizing import Point, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FORMATS", "draw"]

#: What a picture may end with.
FORMATS: Final = (".svg", ".png")

#: Told apart by the colour-blind too, and by their dashes in print.
_BLUE, _ORANGE, _GREEN, _GREY, _BLACK = "#0b5fa5", "#c2500a", "#1b7f4d", "#6b6b6b", "#202020"
_LOOKS: Final[Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    # Text stays text: it can be searched, read aloud and tested.
    "svg.fonttype": "none",
    # The same figures give the same file.
    "svg.hashsalt": "gsocketpool",
}
#: Shorter times are drawn as this one: the axis is logarithmic. Milliseconds.
_SHORTEST: Final = 0.01
#: Sizes nearer to each other than this factor share one label.
_APART: Final = 1.2


def draw(points: Iterable[Point], verdict: Verdict, file: Path, title: str) -> None:
    """Draw the measurements that the verdict is about.

    :param file: where to; its suffix is one of :data:`FORMATS`.
    :param title: what was measured.
    :raises OSError: it cannot be written.
    """
    measured = (p for p in points if p.greenlets == verdict.greenlets and p.requests and not p.failing)
    shown = sorted(measured, key=lambda point: point.size)
    with matplotlib.rc_context(_LOOKS):
        figure = Figure(figsize=(7.2, 7.4), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True)
        figure.suptitle(f"{title}, {verdict.greenlets:,} greenlets", fontsize=12)
        _throughput(above, shown, verdict)
        _times(below, shown)
        _sizes(below, [p.size for p in shown])
        if verdict.knee is not None:
            for axes in above, below:
                axes.axvline(verdict.knee, color=_BLACK, linestyle=(0, (5, 3)), linewidth=1.3, zorder=1)
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        figure.savefig(file, dpi=150, format=file.suffix[1:], metadata=metadata)


def _throughput(axes: Axes, points: list[Point], verdict: Verdict) -> None:
    sizes = [p.size for p in points]
    if points and verdict.in_use:
        # Up to where it leaves the others behind; in small steps, since it is no straight line on a logarithmic axis.
        share = max(1.0, 1.12 * verdict.needed / sizes[0]) ** (1 / 50)
        ideal = [sizes[0] * share**n for n in range(51)]
        axes.plot(
            ideal,
            [size / verdict.in_use for size in ideal],
            color=_GREY,
            linestyle=":",
            label="if each connection added as much as the first",
        )
    axes.plot(
        [p.size for p in points for _ in p.rates],
        [rate for p in points for rate in p.rates],
        color=_BLUE,
        linestyle="",
        marker=".",
        alpha=0.45,
        label="each run",
    )
    axes.plot(sizes, [p.rate for p in points], color=_BLUE, marker="o", markersize=5, label="throughput (median)")
    axes.set_ylim(0, 1.35 * max((p.rate for p in points), default=1.0))
    axes.set_ylabel("requests a second")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.legend(loc="lower right")
    if verdict.knee is None:
        _say(axes, "no knee found", 0, "axes fraction")
    else:
        _say(axes, f"knee: {verdict.knee:,}", verdict.knee, "data")


def _say(axes: Axes, what: str, x: float, of: str) -> None:
    axes.annotate(
        what,
        (x, 1),
        (6, -4),
        xycoords=(of, "axes fraction"),
        textcoords="offset points",
        color=_BLACK,
        fontweight="bold",
        va="top",
    )


def _times(axes: Axes, points: list[Point]) -> None:
    sizes = [p.size for p in points]
    for label, colour, dashes, marker, times in (
        ("wait for a connection, p50", _ORANGE, "-", "s", [p.wait_p50 for p in points]),
        ("wait for a connection, p99", _ORANGE, "--", "s", [p.wait_p99 for p in points]),
        ("latency of the server, p50", _GREEN, "-", "o", [p.in_use_p50 for p in points]),
        ("latency of the server, p99", _GREEN, "--", "o", [p.in_use_p99 for p in points]),
    ):
        axes.plot(
            sizes,
            [max(each * 1000, _SHORTEST) for each in times],
            color=colour,
            linestyle=dashes,
            marker=marker,
            markersize=4,
            markerfacecolor="white" if dashes == "--" else colour,
            label=label,
        )
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(loc="best", fontsize=10)


def _sizes(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    labelled: list[int] = []
    for size in sizes:
        if not labelled or size >= _APART * labelled[-1]:
            labelled.append(size)
    axes.xaxis.set_major_locator(FixedLocator(labelled))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("connections in the pool (max_connections)")
