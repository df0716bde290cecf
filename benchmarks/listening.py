"""What listeners cost, beside a pool without any: what nobody hears costs nothing, loans that are heard do."""

from __future__ import annotations

import functools
import time
import timeit
from collections.abc import Callable
from typing import Any

import gevent

from benchmarks import measure as m
from benchmarks.fakes import Fake
from benchmarks.pair import PAIR, WITH
from benchmarks.peer import Built, Peer
from gsocketpool import Listener, Pool

CONNECTIONS = 10


class OfSockets(Listener):
    """Hears of opens and closes."""

    def opened(self, pool: Any, connection: Any, seconds: float) -> None:
        """Do nothing."""

    def closed(self, pool: Any, connection: Any, reason: str) -> None:
        """Do nothing."""


class OfLoans(Listener):
    """Hears of loans."""

    def borrowed(self, pool: Any, connection: Any, waited: float) -> None:
        """Do nothing."""

    def returned(self, pool: Any, connection: Any, held: float) -> None:
        """Do nothing."""


def prometheus(histograms: bool) -> Listener:
    """Write to a registry that nobody else has."""
    from prometheus_client import CollectorRegistry

    from gsocketpool.metrics import Prometheus

    return Prometheus(CollectorRegistry(), histograms)


def opentelemetry(histograms: bool) -> Listener:
    """Write to a provider of the SDK."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    from gsocketpool.metrics import OpenTelemetry

    return OpenTelemetry(MeterProvider([InMemoryMetricReader()]), histograms)


def _pool(listener: Callable[[], Listener] | None, factory: Callable[[], Any], size: int) -> Built:
    listeners = [] if listener is None else [listener()]
    pool: Any = Pool(factory, max_connections=size, name="benchmark", listeners=listeners)
    return Built(pool, pool.acquire, pool.release, pool.connection)


def _peer(title: str, listener: Callable[[], Listener] | None, distribution: str | None = None) -> Peer:
    return Peer(title, functools.partial(_pool, listener), distribution)


PEERS = {
    "none": _peer("no listener", None),
    "sockets": _peer("a listener of opens and closes", OfSockets),
    "prometheus": _peer("Prometheus", functools.partial(prometheus, False), "prometheus-client"),
    "opentelemetry": _peer("OpenTelemetry", functools.partial(opentelemetry, False), "opentelemetry-sdk"),
    "loans": _peer("a listener of loans that does nothing", OfLoans),
    "prometheus timed": _peer("Prometheus, histograms=True", functools.partial(prometheus, True), "prometheus-client"),
    "opentelemetry timed": _peer(
        "OpenTelemetry, histograms=True", functools.partial(opentelemetry, True), "opentelemetry-sdk"
    ),
}

STATEMENTS = {"pair": PAIR["ours"], "with": WITH["ours"]}


def measure(peer: str, shape: str, seconds: float, greenlets: int, turns: int) -> m.Result:
    """Nanoseconds of processor time for one loan."""
    if shape == "contended":
        return {"ns": _contended(PEERS[peer].build(Fake, CONNECTIONS), greenlets, turns)}
    make = {"make": lambda: PEERS[peer].build(Fake, 1).pool}
    timer = timeit.Timer(STATEMENTS[shape], "pool = make()", timer=time.process_time, globals=make)
    number = 1000
    number = max(number, int(number * seconds / timer.timeit(number)))
    return {"ns": timer.timeit(number) / number * 1e9}


def _contended(built: Built, greenlets: int, turns: int) -> float:
    connection, sleep = built.connection, gevent.sleep

    def borrower() -> None:
        for _ in range(turns):
            with connection():
                sleep(0)

    borrowers = [gevent.spawn(borrower) for _ in range(greenlets)]
    began = time.process_time()
    gevent.joinall(borrowers, raise_error=True)
    return (time.process_time() - began) / (greenlets * turns) * 1e9


def report(run: m.Run) -> None:
    """Print the table."""
    names = run.available(PEERS, PEERS)
    seconds, greenlets, turns = (0.005, 50, 5) if run.quick else (0.1, 500, 20)
    common = {"case": "listening", "seconds": seconds, "greenlets": greenlets, "turns": turns}
    shapes = (*STATEMENTS, "contended")
    results = run.side_by_side(
        {(name, shape): {**common, "peer": name, "shape": shape} for name in names for shape in shapes},
        processes=5,
        rounds=3,
    )

    def figures(name: str, shape: str) -> list[str]:
        found, base = results[name, shape], results["none", shape]
        return [f"{m.median(found, 'ns'):,.0f}", f"{m.ratio(found, base, 'ns'):.2f}"]

    print(
        f"nanoseconds for one loan; contended: a with block, {greenlets} greenlets, {CONNECTIONS} connections, "
        f"{turns} turns each\n"
    )
    head = [column for shape in shapes for column in (shape, "x none")]
    rows = [[PEERS[name].title, *(each for shape in shapes for each in figures(name, shape))] for name in names]
    print(m.table(["listener", *head], rows))
    for name in ("sockets", "prometheus", "opentelemetry"):
        for shape in STATEMENTS:
            if name in names:
                times = m.ratio(results[name, shape], results["none", shape], "ns")
                run.target(f"{shape}, {PEERS[name].title}, x no listener's", times, at_most=1.05)
