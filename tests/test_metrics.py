"""What Prometheus and OpenTelemetry are shown of pools: by a real scrape over HTTP, by real readers, against what was
done."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.event import Event
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.semconv._incubating.attributes import db_attributes
from opentelemetry.semconv._incubating.metrics import db_metrics
from prometheus_client import CollectorRegistry, Gauge, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families

import gsocketpool.asyncio
import gsocketpool.eventlet
import gsocketpool.threading
from benchmarks import listening
from gsocketpool import (
    BreakerOpenError,
    Budget,
    Listener,
    Pool,
    PoolExhaustedError,
    PoolGroup,
    TcpConnection,
    metrics,
    wrap,
)
from gsocketpool.core import REASONS
from gsocketpool.metrics import BUCKETS, OpenTelemetry, Prometheus
from tests.conformance.server import EchoServer
from tests.conftest import Logged
from tests.servers import refused_port

ROOT = Path(__file__).resolve().parent.parent

#: Seconds after which what a test waits for is taken not to come.
BOUND = 20.0


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with EchoServer() as server:
        yield server


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def provider(reader: InMemoryMetricReader) -> Iterator[MeterProvider]:
    provider = MeterProvider([reader], shutdown_on_exit=False)
    yield provider
    provider.shutdown()


Options = Mapping[str, Any]


def at(server: EchoServer) -> Options:
    return {"host": server.host, "port": server.port, "timeout": BOUND}


def ask(pool: Any, text: bytes = b"hello\n", **options: Any) -> None:
    with pool.connection(**options) as conn:
        conn.send(text)
        assert conn.recv_until(b"\n") == text.rstrip(b"\n")


def wait_until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + BOUND
    while not happened():
        assert time.monotonic() < deadline, f"it has not happened in {BOUND} s"
        gevent.sleep(0.005)


def wait_until_gone(ref: weakref.ref[Any]) -> None:
    def gone() -> bool:
        gc.collect()
        return ref() is None

    wait_until(gone)


class Figures(dict[tuple[str, frozenset[tuple[str, str]]], Any]):
    """What was read, by the name and the labels."""

    def put(self, name: str, labels: Mapping[str, Any], value: Any) -> None:
        key = name, frozenset(labels.items())
        assert key not in self, f"twice: {key}"
        self[key] = value

    def of(self, name: str, **labels: str) -> Any:
        return self[name, frozenset(labels.items())]

    def by(self, label: str, name: str, **labels: str) -> dict[str, Any]:
        """All of one name that differ in one label only."""
        found = {}
        for (each, pairs), value in self.items():
            rest = dict(pairs)
            key = rest.pop(label, None)
            if each == name and key is not None and rest == labels:
                found[key] = value
        return found

    @property
    def pools(self) -> set[str]:
        """Of which there is more than a histogram, which stays."""
        return {
            value
            for name, pairs in self
            for label, value in pairs
            if label in ("pool", POOL) and not re.search(TIMED, name)
        }


POOL = "db.client.connection.pool.name"
TIMED = r"_seconds_(bucket|count|sum)$"


def parsed(text: str) -> Figures:
    figures = Figures()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith("_created"):  # prometheus-client says of each histogram when it was made
                figures.put(sample.name, sample.labels, sample.value)
    return figures


def scraped(registry: CollectorRegistry) -> Figures:
    return parsed(generate_latest(registry).decode())


def collected(reader: InMemoryMetricReader) -> Figures:
    return figures_of(reader.get_metrics_data())


def figures_of(data: MetricsData | None) -> Figures:
    figures = Figures()
    for resource in data.resource_metrics if data else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    figures.put(metric.name, dict(point.attributes or {}), getattr(point, "value", point))
    return figures


def reasons(**counts: int) -> dict[str, int]:
    return {**dict.fromkeys(REASONS, 0), **counts}


class Scraped:
    """A server of prometheus-client's own, in a thread of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def __enter__(self) -> Scraped:
        self._server, self._thread = start_http_server(0, "127.0.0.1", self._registry)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def get(self, query: str = "") -> Figures:
        url = f"http://127.0.0.1:{self._server.server_port}/metrics{query}"
        with urllib.request.urlopen(url, timeout=BOUND) as answer:
            return parsed(answer.read().decode())


# Prometheus


def test_a_scrape_shows_what_the_pool_has_done_and_is_doing(server: EchoServer, registry: CollectorRegistry) -> None:
    with (
        Scraped(registry) as prometheus,
        Pool(TcpConnection, at(server), max_connections=2, name="orders", listeners=[Prometheus(registry)]) as pool,
    ):
        for _ in range(3):
            ask(pool)
        with pool.connection():
            figures = prometheus.get()
            assert figures.by("state", "gsocketpool_connections", pool="orders") == {
                "idle": 0,
                "used": 1,
                "opening": 0,
            }
            with pool.connection():
                with pytest.raises(PoolExhaustedError):
                    pool.acquire(timeout=0)
                waiter = gevent.spawn(pool.acquire, timeout=BOUND)
                wait_until(lambda: pool.waiting)
                figures = prometheus.get()
                assert figures.by("state", "gsocketpool_connections", pool="orders") == {
                    "idle": 0,
                    "used": 2,
                    "opening": 0,
                }
                assert figures.of("gsocketpool_waiting", pool="orders") == 1
        pool.release(waiter.get())
        figures = prometheus.get()
        assert figures.by("state", "gsocketpool_connections", pool="orders") == {"idle": 2, "used": 0, "opening": 0}
        assert figures.of("gsocketpool_connections_max", pool="orders") == 2
        assert figures.of("gsocketpool_waiting", pool="orders") == 0
        assert figures.of("gsocketpool_acquired_total", pool="orders") == 6
        assert figures.of("gsocketpool_opened_total", pool="orders") == 2
        assert figures.of("gsocketpool_open_failures_total", pool="orders") == 0
        assert figures.of("gsocketpool_exhausted_total", pool="orders") == 1
        assert figures.by("reason", "gsocketpool_closed_total", pool="orders") == reasons()
        assert figures.by("state", "gsocketpool_breaker", pool="orders") == {"closed": 1, "open": 0, "half-open": 0}
        assert prometheus.get("?name[]=gsocketpool_waiting") == {
            ("gsocketpool_waiting", frozenset({("pool", "orders")})): 0
        }


def test_dials_that_failed_and_the_breaker_are_shown(registry: CollectorRegistry, logged: Logged) -> None:
    options = {"host": "127.0.0.1", "port": refused_port()}
    listener = Prometheus(registry)
    with Pool(TcpConnection, options, breaker=2, backoff=(60, 60), name="down", listeners=[listener]) as pool:
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                pool.acquire(timeout=BOUND)
        with pytest.raises(BreakerOpenError):
            pool.acquire(timeout=BOUND)
        figures = scraped(registry)
        assert figures.of("gsocketpool_open_failures_total", pool="down") == 2
        assert figures.of("gsocketpool_exhausted_total", pool="down") == 1
        assert figures.by("state", "gsocketpool_breaker", pool="down") == {"closed": 0, "open": 1, "half-open": 0}
        (record,) = logged.take(1)
        assert "2 dials in a row have failed" in record.getMessage()


def test_a_dial_under_way_is_shown(registry: CollectorRegistry) -> None:
    class Slow(TcpConnection):
        def open(self) -> None:
            dialled.set()
            go_on.wait(BOUND)
            super().open()

    dialled, go_on = Event(), Event()
    with EchoServer() as server, Pool(Slow, at(server), name="slow", listeners=[Prometheus(registry)]) as pool:
        borrower = gevent.spawn(ask, pool)
        assert dialled.wait(BOUND)
        figures = scraped(registry)
        assert figures.by("state", "gsocketpool_connections", pool="slow") == {"idle": 0, "used": 0, "opening": 1}
        assert figures.of("gsocketpool_waiting", pool="slow") == 1
        go_on.set()
        borrower.get(timeout=BOUND)
        assert scraped(registry).of("gsocketpool_connections", pool="slow", state="opening") == 0


class Unwilling(TcpConnection):
    """Fails its check."""

    def check(self) -> bool:
        return False


class Old(TcpConnection):
    def is_expired(self) -> bool:
        return True


def by_lifetime(pool: Pool[Any]) -> None:
    ask(pool)
    pool.drop_expired()


def by_idling(pool: Pool[Any]) -> None:
    ask(pool)
    wait_until(lambda: pool.stats().closed["idle"])


def by_a_check(pool: Pool[Any]) -> None:
    ask(pool)
    with pytest.raises(PoolExhaustedError):
        pool.acquire(timeout=0)


def by_an_error(pool: Pool[Any]) -> None:
    with pytest.raises(ZeroDivisionError), pool.connection():
        raise ZeroDivisionError


def by_hand(pool: Pool[Any]) -> None:
    pool.drop(pool.acquire())


def by_clearing(pool: Pool[Any]) -> None:
    ask(pool)
    pool.clear()


def by_shrinking(pool: Pool[Any]) -> None:
    with pool.connection(), pool.connection():
        pool.resize(1)


def by_the_end(pool: Pool[Any]) -> None:
    ask(pool)
    pool.close()


@pytest.mark.parametrize(
    ("reason", "close", "factory", "options"),
    [
        ("expired", by_lifetime, Old, {}),
        ("expired", ask, TcpConnection, {"max_uses": 1}),
        ("idle", by_idling, TcpConnection, {"idle_timeout": 0.05}),
        ("stale", by_a_check, Unwilling, {"check_after_idle": 0}),
        ("discarded", by_an_error, TcpConnection, {}),
        ("dropped", by_hand, TcpConnection, {}),
        ("cleared", by_clearing, TcpConnection, {}),
        ("shrunk", by_shrinking, TcpConnection, {}),
        ("closed", by_the_end, TcpConnection, {}),
    ],
)
def test_closes_are_counted_by_reason(
    server: EchoServer,
    registry: CollectorRegistry,
    provider: MeterProvider,
    reader: InMemoryMetricReader,
    reason: str,
    close: Callable[[Pool[Any]], None],
    factory: Any,
    options: Options,
) -> None:
    listeners = [Prometheus(registry), OpenTelemetry(provider)]
    with Pool(factory, at(server), max_connections=2, name="shop", listeners=listeners, **options) as pool:
        close(pool)
        expected = reasons(**{reason: 1})
        assert scraped(registry).by("reason", "gsocketpool_closed_total", pool="shop") == expected
        found = collected(reader).by("gsocketpool.close.reason", "gsocketpool.connection.closed", **{POOL: "shop"})
        assert found == expected


def test_what_a_budget_evicts_and_what_is_reclaimed_is_counted(
    server: EchoServer, registry: CollectorRegistry, logged: Logged
) -> None:
    listener = Prometheus(registry)
    budget = Budget(1)
    one = Pool(TcpConnection, at(server), budget=budget, name="one", listeners=[listener])
    other = Pool(TcpConnection, at(server), budget=budget, name="other", reclaim=True, listeners=[listener])
    with one, other:
        ask(one)
        gevent.spawn(other.acquire, timeout=BOUND).join(BOUND)
        wait_until(lambda: other.stats().closed["reclaimed"])
        figures = scraped(registry)
        assert figures.by("reason", "gsocketpool_closed_total", pool="one") == reasons(evicted=1)
        assert figures.by("reason", "gsocketpool_closed_total", pool="other") == reasons(reclaimed=1)
    assert "ended without releasing" in logged.take(1)[0].getMessage()


def test_histograms_hold_each_wait_use_and_dial(server: EchoServer, registry: CollectorRegistry) -> None:
    with (
        Scraped(registry) as prometheus,
        Pool(
            TcpConnection,
            at(server),
            max_connections=1,
            name="timed",
            listeners=[Prometheus(registry, histograms=True)],
        ) as pool,
    ):
        began = time.perf_counter()
        for _ in range(4):
            ask(pool)
        waiters = []
        with pool.connection():
            waiters += [gevent.spawn(ask, pool) for _ in range(2)]
            wait_until(lambda: pool.waiting == 2)
            gevent.sleep(0.02)
        gevent.joinall(waiters, timeout=BOUND, raise_error=True)
        took = time.perf_counter() - began
        figures = prometheus.get()
        for name, count in (("wait", 7), ("use", 7), ("dial", 1)):
            name = f"gsocketpool_{name}_seconds"
            assert figures.of(f"{name}_count", pool="timed") == count
            buckets = figures.by("le", f"{name}_bucket", pool="timed")
            assert [float(bound) for bound in buckets] == [*BUCKETS, float("inf")]
            assert sorted(buckets.values()) == [*buckets.values()], "they are cumulative"
            assert buckets["+Inf"] == count
        assert 0.02 <= figures.of("gsocketpool_use_seconds_sum", pool="timed") <= took
        assert 0.04 <= figures.of("gsocketpool_wait_seconds_sum", pool="timed") <= 2 * took
        waits = figures.by("le", "gsocketpool_wait_seconds_bucket", pool="timed")
        assert waits["0.01"] <= 5, "two have waited for longer"
        assert 0 < figures.of("gsocketpool_dial_seconds_sum", pool="timed") <= took


def test_without_histograms_the_pool_keeps_to_its_fast_lanes_and_nothing_is_timed(
    server: EchoServer, registry: CollectorRegistry, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    listeners = [Prometheus(registry), OpenTelemetry(provider)]
    with Pool(TcpConnection, at(server), name="plain", listeners=listeners) as pool:
        ask(pool)
        assert pool._lane_out is pool._warm
        assert pool._lane_with is pool._warm
        assert pool._lane_in
        assert not [name for name, _ in scraped(registry) if "seconds" in name]
        assert not [name for name, _ in collected(reader) if "time" in name.rpartition(".")[2].split("_")]


@pytest.mark.parametrize("exporter", [Prometheus, OpenTelemetry])
def test_the_class_says_whether_loans_are_heard(exporter: Any) -> None:
    where: Any = CollectorRegistry() if exporter is Prometheus else MeterProvider(shutdown_on_exit=False)
    plain, timed = exporter(where), exporter(where, histograms=True)
    for event in ("borrowed", "returned", "opened"):
        assert getattr(type(plain), event) is getattr(Listener, event)
        assert getattr(type(timed), event) is not getattr(Listener, event)
    assert isinstance(timed, exporter)
    assert type(timed).__name__ == exporter.__name__
    if where is not None and exporter is OpenTelemetry:
        where.shutdown()


def test_a_subclass_hears_what_it_wants_beside(server: EchoServer, registry: CollectorRegistry) -> None:
    class Counting(Prometheus):
        def __init__(self, histograms: bool) -> None:
            self.borrowings = self.opens = 0
            super().__init__(registry, histograms)

        def borrowed(self, pool: Any, connection: Any, waited: float) -> None:
            self.borrowings += 1
            super().borrowed(pool, connection, waited)

        def opened(self, pool: Any, connection: Any, seconds: float) -> None:
            self.opens += 1

    for histograms in (False, True):
        listener = Counting(histograms)
        with Pool(TcpConnection, at(server), name=f"{histograms}", listeners=[listener]) as pool:
            ask(pool)
            assert (listener.borrowings, listener.opens) == (1, 1)
            figures = scraped(registry)
            if histograms:
                assert figures.of("gsocketpool_wait_seconds_count", pool="True") == 1
                assert figures.of("gsocketpool_use_seconds_count", pool="True") == 1
                assert figures.of("gsocketpool_dial_seconds_count", pool="True") == 0
            else:
                assert ("gsocketpool_wait_seconds_count", frozenset({("pool", "False")})) not in figures


# OpenTelemetry


def test_the_names_and_units_are_those_of_the_semantic_conventions(
    server: EchoServer, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    name = {POOL: "TcpConnection"}
    with Pool(TcpConnection, at(server), listeners=[OpenTelemetry(provider, histograms=True)]) as pool:
        ask(pool)
        data = reader.get_metrics_data()
    assert data is not None
    (scope,) = data.resource_metrics[0].scope_metrics
    assert (scope.scope.name, scope.scope.version) == ("gsocketpool", gsocketpool.__version__)
    found = {metric.name: metric for metric in scope.metrics}
    prefix = "DB_CLIENT_CONNECTION_"
    names = {value for name, value in vars(db_metrics).items() if name.startswith(prefix)}
    assert {name for name in found if not name.startswith("gsocketpool.")} == names
    meter = (other := MeterProvider([theirs := InMemoryMetricReader()], shutdown_on_exit=False)).get_meter("theirs")
    for each in sorted(names):
        instrument = getattr(db_metrics, f"create_{each.replace('.', '_')}")(meter)
        (instrument.record if hasattr(instrument, "record") else instrument.add)(1)
    expected = theirs.get_metrics_data()
    other.shutdown()
    assert expected is not None
    for metric in expected.resource_metrics[0].scope_metrics[0].metrics:
        ours = found[metric.name]
        assert ours.unit == metric.unit, metric.name
        assert type(ours.data) is type(metric.data), metric.name
        assert getattr(ours.data, "is_monotonic", None) is getattr(metric.data, "is_monotonic", None), metric.name
    attributes = {key for _, pairs in figures_of(data) for key, _ in pairs if not key.startswith("gsocketpool.")}
    assert attributes == {db_attributes.DB_CLIENT_CONNECTION_POOL_NAME, db_attributes.DB_CLIENT_CONNECTION_STATE}
    states = {state.value for state in db_attributes.DbClientConnectionStateValues}
    figures = figures_of(data).by(db_attributes.DB_CLIENT_CONNECTION_STATE, "db.client.connection.count", **name)
    assert {*figures} == states


def test_a_reader_of_opentelemetry_collects_what_the_pool_has_done_and_is_doing(
    server: EchoServer, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    name = {POOL: "orders"}
    with Pool(
        TcpConnection,
        at(server),
        max_connections=3,
        min_idle=1,
        name="orders",
        listeners=[OpenTelemetry(provider, histograms=True)],
    ) as pool:
        pool.wait_ready(BOUND)
        for _ in range(3):
            ask(pool)
        lent = [pool.acquire(timeout=BOUND) for _ in range(3)]
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0)
        waiter = gevent.spawn(pool.acquire, timeout=BOUND)
        wait_until(lambda: pool.waiting)
        figures = collected(reader)
        assert figures.by("db.client.connection.state", "db.client.connection.count", **name) == {"idle": 0, "used": 3}
        assert figures.of("db.client.connection.pending_requests", **name) == 1
        assert figures.of("db.client.connection.max", **name) == 3
        assert figures.of("db.client.connection.idle.max", **name) == 3
        assert figures.of("db.client.connection.idle.min", **name) == 1
        assert figures.of("db.client.connection.timeouts", **name) == 1
        assert figures.of("gsocketpool.connection.opening", **name) == 0
        assert figures.of("gsocketpool.connection.opened", **name) == 3
        assert figures.of("gsocketpool.connection.acquired", **name) == 6
        assert figures.of("gsocketpool.connection.open_failures", **name) == 0
        states = figures.by("gsocketpool.breaker.state", "gsocketpool.breaker", **name)
        assert states == {"closed": 1, "open": 0, "half-open": 0}
        assert figures.of("db.client.connection.wait_time", **name).count == 6
        assert figures.of("db.client.connection.use_time", **name).count == 3
        assert figures.of("db.client.connection.create_time", **name).count == 3
        assert figures.of("db.client.connection.create_time", **name).explicit_bounds == BUCKETS
        for conn in lent:
            pool.release(conn)
        pool.release(waiter.get())
        figures = collected(reader)
        assert figures.by("db.client.connection.state", "db.client.connection.count", **name) == {"idle": 3, "used": 0}
        assert figures.of("db.client.connection.use_time", **name).count == 7


class Kept(MetricExporter):
    """Exports into a list."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[MetricsData] = []
        self.come = threading.Event()

    def export(self, metrics_data: MetricsData, timeout_millis: float = 0, **_: Any) -> MetricExportResult:
        self.batches.append(metrics_data)
        self.come.set()
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 0, **_: Any) -> None:
        pass


def test_a_periodic_exporter_exports_from_a_thread_of_its_own(server: EchoServer) -> None:
    exporter = Kept()
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=20)
    provider = MeterProvider([reader], shutdown_on_exit=False)
    try:
        with Pool(TcpConnection, at(server), name="pushed", listeners=[OpenTelemetry(provider)]) as pool:
            for _ in range(5):
                ask(pool)
            exporter.come.clear()
            assert exporter.come.wait(BOUND)
            exporter.come.clear()
            assert exporter.come.wait(BOUND)
            figures = figures_of(exporter.batches[-1])
            assert figures.of("gsocketpool.connection.acquired", **{POOL: "pushed"}) == 5
            assert figures.of("gsocketpool.connection.opened", **{POOL: "pushed"}) == 1
    finally:
        provider.shutdown()


def in_a_process(code: str, *arguments: str) -> str:
    """What it prints; it has to end well, and say nothing else."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.strip()


GLOBAL = """
import sys
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from gsocketpool.metrics import OpenTelemetry
from gsocketpool.threading import Pool, TcpConnection

reader = InMemoryMetricReader()
provider = MeterProvider([reader])
make = [
    lambda: metrics.set_meter_provider(provider),
    lambda: Pool(TcpConnection, name="before", listeners=[OpenTelemetry(histograms=True)]),
    lambda: Pool(TcpConnection, name="after", listeners=[OpenTelemetry(histograms=True)]),
    lambda: Pool(TcpConnection, name="given", listeners=[OpenTelemetry(provider, histograms=True)]),
]
pools = [make[int(step)]() for step in sys.argv[1]]
(scope,) = reader.get_metrics_data().resource_metrics[0].scope_metrics
names = [metric.name for metric in scope.metrics]
assert len(names) == len(set(names)), names
found = [metric for metric in scope.metrics if metric.name == "db.client.connection.max"]
print(sorted(point.attributes["db.client.connection.pool.name"] for point in found[0].data.data_points))
"""


@pytest.mark.parametrize("order", ["1023", "0123", "3012", "1032", "0321"])
def test_the_global_provider_may_be_set_before_or_after_and_be_given_too(order: str) -> None:
    assert in_a_process(GLOBAL, order) == "['after', 'before', 'given']"


def test_without_a_provider_a_pool_works_all_the_same() -> None:
    code = """
from gsocketpool import metrics
from gsocketpool.threading import Pool, wrap
with Pool(wrap(object, close=lambda it: None), listeners=[metrics.OpenTelemetry(histograms=True)]) as pool:
    with pool.connection():
        print(pool.stats().opened)
"""
    assert in_a_process(code) == "1"


# Which pools, under which names


def test_a_pool_without_a_name_goes_by_that_of_its_factory(server: EchoServer, registry: CollectorRegistry) -> None:
    with Pool(TcpConnection, at(server), listeners=[Prometheus(registry)]):
        assert scraped(registry).pools == {"TcpConnection"}


def test_pools_of_one_name_are_added_up(server: EchoServer, registry: CollectorRegistry) -> None:
    one = Pool(TcpConnection, at(server), max_connections=2, name="twin", listeners=[Prometheus(registry)])
    other = Pool(TcpConnection, at(server), max_connections=3, name="twin", listeners=[Prometheus(registry)])
    with one, other:
        ask(one)
        ask(other)
        with one.connection():
            figures = scraped(registry)
            assert figures.of("gsocketpool_connections_max", pool="twin") == 5
            assert figures.of("gsocketpool_acquired_total", pool="twin") == 3
            assert figures.of("gsocketpool_connections", pool="twin", state="used") == 1
            assert figures.of("gsocketpool_connections", pool="twin", state="idle") == 1
            assert figures.of("gsocketpool_breaker", pool="twin", state="closed") == 2


def test_one_listener_serves_many_pools_and_many_listeners_of_a_pool_count_once(
    server: EchoServer, registry: CollectorRegistry
) -> None:
    listener = Prometheus(registry)
    one = Pool(TcpConnection, at(server), name="one", listeners=[listener, Prometheus(registry)])
    other = Pool(TcpConnection, at(server), name="other", listeners=[listener])
    with one, other:
        ask(one)
        figures = scraped(registry)
        assert figures.of("gsocketpool_acquired_total", pool="one") == 1
        assert figures.of("gsocketpool_acquired_total", pool="other") == 0


def test_a_pool_may_be_shown_in_two_registries_and_to_both_at_once(
    server: EchoServer, registry: CollectorRegistry, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    second = CollectorRegistry()
    listeners = [Prometheus(registry), Prometheus(second, histograms=True), OpenTelemetry(provider)]
    with Pool(TcpConnection, at(server), name="seen", listeners=listeners) as pool:
        ask(pool)
        for figures in (scraped(registry), scraped(second)):
            assert figures.of("gsocketpool_acquired_total", pool="seen") == 1
        assert ("gsocketpool_use_seconds_count", frozenset({("pool", "seen")})) not in scraped(registry)
        assert scraped(second).of("gsocketpool_use_seconds_count", pool="seen") == 1
        assert collected(reader).of("gsocketpool.connection.acquired", **{POOL: "seen"}) == 1


def test_each_endpoint_of_a_group_is_shown_by_itself(server: EchoServer, registry: CollectorRegistry) -> None:
    with (
        EchoServer() as second,
        PoolGroup(TcpConnection, name="shards", listeners=[Prometheus(registry, histograms=True)]) as group,
    ):
        for each, times in ((server, 2), (second, 3)):
            for _ in range(times):
                with group.connection(host=each.host, port=each.port) as conn:
                    conn.send(b"hello\n")
                    conn.recv_until(b"\n")
        figures = scraped(registry)
        names = {server: f"shards 127.0.0.1:{server.port}", second: f"shards 127.0.0.1:{second.port}"}
        assert figures.pools == {*names.values()}
        for each, times in ((server, 2), (second, 3)):
            assert figures.of("gsocketpool_acquired_total", pool=names[each]) == times
            assert figures.of("gsocketpool_use_seconds_count", pool=names[each]) == times
            assert figures.of("gsocketpool_connections", pool=names[each], state="idle") == 1


def test_a_pool_of_threads_is_shown_while_many_threads_use_it(server: EchoServer, registry: CollectorRegistry) -> None:
    threads, turns = 8, 50
    listener = Prometheus(registry, histograms=True)
    with (
        Scraped(registry) as prometheus,
        gsocketpool.threading.Pool(
            gsocketpool.threading.TcpConnection, at(server), max_connections=3, name="threads", listeners=[listener]
        ) as pool,
    ):
        acquired = 0

        def work() -> None:
            for _ in range(turns):
                ask(pool, timeout=BOUND)

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            figures = prometheus.get()
            assert figures.of("gsocketpool_connections", pool="threads", state="used") <= 3
            assert figures.of("gsocketpool_acquired_total", pool="threads") >= acquired
            acquired = figures.of("gsocketpool_acquired_total", pool="threads")
        for worker in workers:
            worker.join()
        wait_until(lambda: not pool.stats().opening)  # for somebody who was served before
        figures = prometheus.get()
        assert figures.of("gsocketpool_acquired_total", pool="threads") == threads * turns
        assert figures.of("gsocketpool_wait_seconds_count", pool="threads") == threads * turns
        assert figures.of("gsocketpool_use_seconds_count", pool="threads") == threads * turns
        assert figures.of("gsocketpool_opened_total", pool="threads") == pool.stats().opened


def test_a_pool_of_threads_and_a_reader_that_collects_meanwhile_do_not_wait_for_each_other(
    server: EchoServer, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    threads, turns = 4, 50
    with gsocketpool.threading.Pool(
        gsocketpool.threading.TcpConnection,
        at(server),
        max_connections=2,
        max_uses=5,
        name="threads",
        listeners=[OpenTelemetry(provider, histograms=True)],
    ) as pool:

        def work() -> None:
            for _ in range(turns):
                ask(pool, timeout=BOUND)

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            collected(reader)
        for worker in workers:
            worker.join()
        wait_until(lambda: not pool.stats().opening)
        figures = collected(reader)
        assert figures.of("db.client.connection.use_time", **{POOL: "threads"}).count == threads * turns
        assert figures.of("gsocketpool.connection.acquired", **{POOL: "threads"}) == threads * turns
        assert figures.of("gsocketpool.connection.opened", **{POOL: "threads"}) == pool.stats().opened >= 40


def test_a_pool_of_asyncio_is_shown_from_another_thread(server: EchoServer, registry: CollectorRegistry) -> None:
    async def main() -> Figures:
        async with gsocketpool.asyncio.Pool(
            gsocketpool.asyncio.TcpConnection,
            at(server),
            max_connections=2,
            name="loop",
            listeners=[Prometheus(registry, histograms=True)],
        ) as pool:

            async def work() -> None:
                async with pool.connection(timeout=BOUND) as conn:
                    await conn.send(b"hello\n")
                    await conn.recv_until(b"\n")

            await asyncio.gather(*(work() for _ in range(20)))
            async with pool.connection():
                return await asyncio.get_running_loop().run_in_executor(None, prometheus.get)

    with Scraped(registry) as prometheus:
        figures = asyncio.run(main())
    assert figures.by("state", "gsocketpool_connections", pool="loop") == {"idle": 1, "used": 1, "opening": 0}
    assert figures.of("gsocketpool_acquired_total", pool="loop") == 21
    assert figures.of("gsocketpool_wait_seconds_count", pool="loop") == 21
    assert figures.of("gsocketpool_use_seconds_count", pool="loop") == 20
    assert figures.of("gsocketpool_opened_total", pool="loop") == 2


def test_a_pool_of_eventlet_is_shown_from_another_thread(server: EchoServer, registry: CollectorRegistry) -> None:
    with (
        Scraped(registry) as prometheus,
        gsocketpool.eventlet.Pool(
            gsocketpool.eventlet.TcpConnection, at(server), name="green", listeners=[Prometheus(registry, True)]
        ) as pool,
    ):
        ask(pool)
        figures = prometheus.get()
        assert figures.of("gsocketpool_acquired_total", pool="green") == 1
        assert figures.of("gsocketpool_use_seconds_count", pool="green") == 1


def test_no_total_goes_back_while_greenlets_work_and_another_thread_looks(
    server: EchoServer, registry: CollectorRegistry
) -> None:
    interval = sys.getswitchinterval()
    listener = Prometheus(registry)
    done = threading.Event()
    errors: list[str] = []
    looks = 0

    def look() -> None:
        nonlocal looks
        before = Figures()
        while not done.is_set():
            figures = scraped(registry)
            looks += 1
            for key, value in figures.items():
                if value < 0 or (key[0].endswith("_total") and value < before.get(key, 0)):
                    errors.append(f"{key}: {before.get(key)} and then {value}")
            before = figures

    def work() -> None:
        for _ in range(100):
            with pool.connection(timeout=BOUND):
                gevent.sleep(0)

    watcher = threading.Thread(target=look)
    sys.setswitchinterval(1e-5)
    try:
        with Pool(
            TcpConnection, at(server), max_connections=30, max_uses=7, check_after_idle=0.02, listeners=[listener]
        ) as pool:
            watcher.start()
            gevent.joinall([gevent.spawn(work) for _ in range(50)], timeout=2 * BOUND, raise_error=True)
            done.set()
            watcher.join()
            assert scraped(registry).of("gsocketpool_acquired_total", pool="TcpConnection") == 5000
    finally:
        done.set()
        sys.setswitchinterval(interval)
    assert errors == []
    assert looks


# What is gone


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "forgotten"])
def test_a_pool_that_nobody_refers_to_is_shown_no_longer_and_its_totals_go_on_under_its_name(
    server: EchoServer,
    registry: CollectorRegistry,
    provider: MeterProvider,
    reader: InMemoryMetricReader,
    closes: bool,
) -> None:
    listeners = [Prometheus(registry, histograms=True), OpenTelemetry(provider)]
    pool: Pool[TcpConnection] | None
    for generation in range(1, 4):
        pool = Pool(TcpConnection, at(server), name="again", listeners=listeners)
        for _ in range(5):
            ask(pool)
        figures = scraped(registry)
        assert figures.of("gsocketpool_acquired_total", pool="again") == 5 * generation
        assert figures.of("gsocketpool_wait_seconds_count", pool="again") == 5 * generation
        assert figures.of("gsocketpool_opened_total", pool="again") == generation
        assert figures.of("gsocketpool_closed_total", pool="again", reason="closed") == generation - 1
        assert figures.of("gsocketpool_connections", pool="again", state="idle") == 1
        assert figures.of("gsocketpool_connections_max", pool="again") == 200
        assert collected(reader).of("gsocketpool.connection.acquired", **{POOL: "again"}) == 5 * generation
        ref = weakref.ref(pool)
        if closes:
            pool.close()
        pool = None
        wait_until_gone(ref)
        wait_until(lambda: server.serving == 0)
        assert scraped(registry).pools == set()
        assert collected(reader).pools == set()


@pytest.mark.parametrize("in_a_circle", [False, True])
def test_what_a_pool_had_done_since_the_last_scrape_is_not_lost_with_it(
    registry: CollectorRegistry, in_a_circle: bool
) -> None:
    class Mine(Pool[object]):
        circle: object = None

    closed: list[object] = []
    things = wrap(object, close=closed.append)
    listener = Prometheus(registry)
    pool = Mine(things, name="brief", listeners=[listener])
    for _ in range(7):
        with pool.connection():
            pass
    if in_a_circle:
        pool.circle = pool  # the collector takes it for gone before it has closed itself
    ref = weakref.ref(pool)
    del pool
    wait_until_gone(ref)
    assert closed == [] or not in_a_circle
    wait_until(lambda: closed)
    gevent.sleep(0)  # it is said after that
    with Pool(things, name="brief", listeners=[listener]):
        figures = scraped(registry)
        assert figures.of("gsocketpool_acquired_total", pool="brief") == 7
        assert figures.of("gsocketpool_closed_total", pool="brief", reason="closed") == 1


def test_a_closed_pool_that_is_still_at_hand_shows_its_totals_and_no_room(
    server: EchoServer, registry: CollectorRegistry
) -> None:
    pool = Pool(TcpConnection, at(server), name="shut", listeners=[Prometheus(registry)])
    ask(pool)
    pool.close()
    figures = scraped(registry)
    assert figures.of("gsocketpool_connections_max", pool="shut") == 0
    assert figures.of("gsocketpool_closed_total", pool="shut", reason="closed") == 1
    assert figures.by("state", "gsocketpool_breaker", pool="shut") == {"closed": 0, "open": 0, "half-open": 0}


def test_pools_that_come_and_go_leave_one_row_for_each_name(
    server: EchoServer, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "GRACE", 0.0)
    listener = Prometheus(registry, histograms=True)
    book = listener._book
    for _ in range(100):
        with Pool(TcpConnection, at(server), name="many", listeners=[listener]) as pool:
            ask(pool)
    ref = weakref.ref(pool)
    del pool
    wait_until_gone(ref)
    assert len(book._seen) < 60, "though nobody has looked"
    assert scraped(registry).pools == set()
    assert (book._seen, book.found) == ([], {})
    assert [*book._gone] == ["many"]
    with Pool(TcpConnection, at(server), name="many", listeners=[listener]):
        figures = scraped(registry)
        assert figures.of("gsocketpool_acquired_total", pool="many") == 100
        assert figures.of("gsocketpool_closed_total", pool="many", reason="closed") == 100
        assert figures.of("gsocketpool_use_seconds_count", pool="many") == 100


def test_only_so_many_names_are_kept_that_no_pool_has(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "GRACE", 0.0)
    monkeypatch.setattr(metrics, "MOST_GONE", 3)
    listener = Prometheus(registry, histograms=True)
    kept = Pool(TcpConnection, name="0", listeners=[listener])
    for name in ("0", "1", "2", "3", "4"):
        pool = Pool(TcpConnection, name=name, listeners=[listener])
        pool.close()
        ref = weakref.ref(pool)
        del pool
        wait_until_gone(ref)
        assert scraped(registry).pools == {"0"}
    book = listener._book
    assert [*book._gone] == ["0", "3", "4"], "a name that a pool has is kept"
    assert {*scraped(registry).by("pool", "gsocketpool_wait_seconds_count")} == {"0", "3", "4"}
    kept.close()


def test_a_registry_and_a_provider_that_nobody_refers_to_are_collected(server: EchoServer) -> None:
    registry = CollectorRegistry()
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    with Pool(
        TcpConnection, at(server), listeners=[Prometheus(registry, True), OpenTelemetry(provider, histograms=True)]
    ) as pool:
        ask(pool)
        scraped(registry)
        collected(reader)
    provider.shutdown()
    refs: list[weakref.ref[Any]] = [weakref.ref(registry), weakref.ref(provider), weakref.ref(pool)]
    del registry, provider, pool, reader
    for ref in refs:
        wait_until_gone(ref)


# What is refused, what is missing


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Prometheus(histograms=1), TypeError, "histograms must be True or False, not 1"),  # type: ignore[arg-type]
        (lambda: OpenTelemetry(histograms="no"), TypeError, "histograms must be True or False, not 'no'"),  # type: ignore[arg-type]
        (
            lambda: Prometheus("default"),  # type: ignore[arg-type]
            TypeError,
            "registry must be a prometheus_client.CollectorRegistry or None, not 'default'",
        ),
        (
            lambda: OpenTelemetry(7),  # type: ignore[arg-type]
            TypeError,
            "meter_provider must be an opentelemetry.metrics.MeterProvider or None, not 7",
        ),
    ],
)
def test_bad_input_is_refused_by_name(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == text


def test_a_registry_that_has_something_else_of_a_name_refuses_and_goes_on(registry: CollectorRegistry) -> None:
    Gauge("gsocketpool_waiting", "Somebody else's.", registry=registry).set(3)
    for _ in range(2):
        with pytest.raises(ValueError, match="gsocketpool_waiting"):
            Prometheus(registry)
    assert scraped(registry).of("gsocketpool_waiting") == 3


WITHOUT = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from gsocketpool import metrics
assert not {"prometheus_client", "opentelemetry", "gevent"} & {*sys.modules}
from gsocketpool.threading import Pool, wrap
for make in (metrics.Prometheus, metrics.OpenTelemetry):
    try:
        with Pool(wrap(object, close=lambda it: None), listeners=[make()]) as pool, pool.connection():
            print("fine")
    except ImportError as error:
        print(error.name, "|", error)
"""


def test_what_is_not_installed_is_said_with_the_line_that_installs_it_and_the_other_one_works() -> None:
    no_prometheus = (
        "prometheus_client | gsocketpool.metrics.Prometheus cannot import prometheus_client (No module named "
        "'prometheus_client'): pip install \"gsocketpool[prometheus]\""
    )
    no_otel = (
        "opentelemetry.metrics | gsocketpool.metrics.OpenTelemetry cannot import opentelemetry.metrics (No module "
        "named 'opentelemetry'): pip install \"gsocketpool[otel]\""
    )
    assert in_a_process(WITHOUT, "prometheus_client").splitlines() == [no_prometheus, "fine"]
    assert in_a_process(WITHOUT, "opentelemetry").splitlines() == ["fine", no_otel]
    assert in_a_process(WITHOUT, "opentelemetry", "prometheus_client").splitlines() == [no_prometheus, no_otel]


# Forks


FORK = """
import json, os, sys, threading, warnings
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest
from gsocketpool import metrics
from gsocketpool.threading import Pool, TcpConnection

port = int(sys.argv[1])
registry, reader = CollectorRegistry(), InMemoryMetricReader()
provider = MeterProvider([reader])
listeners = [metrics.Prometheus(registry, histograms=True), metrics.OpenTelemetry(provider)]
pool = Pool(TcpConnection, {"host": "127.0.0.1", "port": port, "timeout": 20}, name="forked", listeners=listeners)

def ask():
    with pool.connection(timeout=20) as conn:
        conn.send(b"hello\\n")
        conn.recv_until(b"\\n")

def figures():
    wanted = ("gsocketpool_acquired_total", "gsocketpool_opened_total", "gsocketpool_use_seconds_count")
    text = generate_latest(registry).decode()
    found = {line.partition("{")[0]: float(line.split()[-1]) for line in text.splitlines() if line.startswith(wanted)}
    data = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    found["otel"] = [metric.data.data_points[0].value for metric in data if metric.name.endswith(".acquired")][0]
    return [found[name] for name in (*wanted, "otel")]

ask()
# Another thread is in the middle of an observation, and of a scrape, when the process is forked.
held, go_on = threading.Event(), threading.Event()
locks = [each._lock for each in metrics._locked]
def hold():
    for lock in locks:
        lock.acquire()
    held.set()
    go_on.wait(20)
    for lock in locks:
        lock.release()
holder = threading.Thread(target=hold)
holder.start()
held.wait(20)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    child = os.fork()
if child == 0:
    ask()
    ask()
    print(json.dumps(["child", *figures()]), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
go_on.set()
holder.join()
ask()
print(json.dumps(["parent", *figures()]))
pool.close()
"""


def test_after_a_fork_both_sides_count_on_from_where_they_were(server: EchoServer) -> None:
    lines = [json.loads(line) for line in in_a_process(FORK, str(server.port)).splitlines()]
    assert lines == [["child", 3, 2, 3, 3], ["parent", 2, 1, 2, 2]]


def test_a_scrape_in_the_middle_of_the_making_of_a_pool_does_no_harm(
    server: EchoServer, registry: CollectorRegistry
) -> None:
    class Scraping(Listener):
        def attached(self, pool: Any) -> None:
            figures.append(scraped(registry))

    figures: list[Figures] = []
    with closing(Pool(TcpConnection, at(server), name="new", listeners=[Prometheus(registry), Scraping()])):
        assert figures[0].of("gsocketpool_connections", pool="new", state="idle") == 0


PATCHED = """
from gevent import monkey
monkey.patch_all()
import json, sys, threading, urllib.request
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, PeriodicExportingMetricReader
from prometheus_client import CollectorRegistry, start_http_server
from gsocketpool import Pool, TcpConnection
from gsocketpool.metrics import OpenTelemetry, Prometheus

class Kept(MetricExporter):
    def export(self, metrics_data, timeout_millis=0, **_):
        kept.append(metrics_data)
        come.set()
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis=0):
        return True

    def shutdown(self, timeout_millis=0, **_):
        pass

kept, come = [], threading.Event()
provider = MeterProvider([PeriodicExportingMetricReader(Kept(), export_interval_millis=10)])
registry = CollectorRegistry()
http, thread = start_http_server(0, "127.0.0.1", registry)
options = {"host": "127.0.0.1", "port": int(sys.argv[1]), "timeout": 20}
listeners = [Prometheus(registry, histograms=True), OpenTelemetry(provider, histograms=True)]
with Pool(TcpConnection, options, name="patched", listeners=listeners) as pool:
    for _ in range(3):
        with pool.connection() as conn:
            conn.send(b"hello\\n")
            conn.recv_until(b"\\n")
    for _ in range(2):
        come.clear()
        assert come.wait(20)
    with urllib.request.urlopen(f"http://127.0.0.1:{http.server_port}/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
provider.shutdown()
http.shutdown()
http.server_close()
print([line for line in lines if "acquired_total{" in line or "wait_seconds_count{" in line])
scope = kept[-1].resource_metrics[0].scope_metrics[0]
print([metric.data.data_points[0].value for metric in scope.metrics if metric.name.endswith(".acquired")])
"""


def test_in_a_patched_program_both_work_in_greenlets(server: EchoServer) -> None:
    assert in_a_process(PATCHED, str(server.port)).splitlines() == [
        """['gsocketpool_acquired_total{pool="patched"} 3.0', 'gsocketpool_wait_seconds_count{pool="patched"} 3.0']""",
        "[3]",
    ]


def test_the_page_names_all_that_is_shown_and_nothing_else(
    server: EchoServer, registry: CollectorRegistry, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    listeners = [Prometheus(registry, histograms=True), OpenTelemetry(provider, histograms=True)]
    with Pool(TcpConnection, at(server), listeners=listeners) as pool:
        ask(pool)
        shown = {*scraped(registry), *collected(reader)}
    names = {re.sub(r"(?<=_seconds)_(bucket|count|sum)$", "", name) for name, _ in shown}
    labels = {label for _, pairs in shown for label, _ in pairs if "." in label}
    page = (ROOT / "docs" / "howto" / "metrics.rst").read_text(encoding="utf-8")
    table = page.partition("\nWhat there is\n")[2].partition("\nHistograms\n")[0]
    written = {*re.findall(r"``((?:gsocketpool_|gsocketpool\.|db\.client\.)[\w.]+)``", table)}
    assert written == names | labels
    for name in re.findall(r"\bgsocketpool_\w+", page):
        assert re.sub(r"(?<=_seconds)_(bucket|count|sum)$", "", name) in names | {"gsocketpool_acquired"}, name


def test_a_quick_run_of_the_benchmark_has_a_row_for_each_listener() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "listening"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("COV")},
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert done.returncode == 0, done.stderr
    for peer in listening.PEERS.values():
        assert re.search(rf"^{re.escape(peer.title)}  +[\d,]+  +[\d.]+ ", done.stdout, re.MULTILINE), peer.title


def test_a_loan_that_is_taken_back_since_the_check_failed_makes_no_total_fall(
    server: EchoServer, registry: CollectorRegistry
) -> None:
    class Doubtful(TcpConnection):
        def check(self) -> bool:
            seen.append(scraped(registry).of("gsocketpool_acquired_total", pool="shop"))
            return False

    seen: list[float] = []
    with Pool(Doubtful, at(server), check_after_idle=0, name="shop", listeners=[Prometheus(registry)]) as pool:
        ask(pool)
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0)
        assert (pool.stats().acquired, seen) == (1, [2])
        assert scraped(registry).of("gsocketpool_acquired_total", pool="shop") == 2
        for expected in (2, 3):
            ask(pool)
            pool.clear()
            assert scraped(registry).of("gsocketpool_acquired_total", pool="shop") == expected


# What an attack has found


def test_what_a_pool_had_done_is_not_lost_with_it_though_nothing_of_it_was_open(
    registry: CollectorRegistry, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    def refuse() -> str:
        raise ConnectionRefusedError("nobody there")

    def use_up() -> weakref.ref[Any]:
        pool = Pool(things, name="used up", max_uses=1, listeners=listeners)
        for _ in range(7):
            with pool.connection():
                pass
        wait_until(lambda: pool.total == 0)
        return weakref.ref(pool)  # it is not closed

    listeners = [Prometheus(registry), OpenTelemetry(provider)]
    refused = Pool(wrap(refuse, close=print), name="refused", listeners=listeners)
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            refused.acquire()
    refused.close()
    ref = weakref.ref(refused)
    del refused
    wait_until_gone(ref)
    things = wrap(object, close=lambda _: None)
    wait_until_gone(use_up())
    gevent.sleep(0)
    again = [Pool(things, name=name, listeners=listeners) for name in ("refused", "used up")]
    figures, points = scraped(registry), collected(reader)
    assert figures.of("gsocketpool_open_failures_total", pool="refused") == 3
    assert figures.of("gsocketpool_acquired_total", pool="used up") == 7
    assert figures.of("gsocketpool_closed_total", pool="used up", reason="expired") == 7
    assert points.of("gsocketpool.connection.acquired", **{POOL: "used up"}) == 7
    for pool in again:
        pool.close()


def test_what_an_endpoint_had_done_is_not_lost_when_it_is_forgotten(
    server: EchoServer, registry: CollectorRegistry
) -> None:
    group = PoolGroup(
        TcpConnection,
        name="shards",
        idle_timeout=0.02,
        forget_after=0.02,
        max_uses=1,
        listeners=[Prometheus(registry)],
    )
    with group:
        for times in range(1, 4):
            with group.connection(**at(server)) as conn:
                conn.send(b"hello\n")
                conn.recv_until(b"\n")
            name = f"shards 127.0.0.1:{server.port}"
            wait_until(lambda: not group.pools)
            with group.connection(**at(server)):
                figures = scraped(registry)
            assert figures.of("gsocketpool_acquired_total", pool=name) == 2 * times
            wait_until(lambda: not group.pools)


def test_odd_names_are_shown_and_spoil_no_scrape(
    registry: CollectorRegistry, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    listeners = [Prometheus(registry, histograms=True), OpenTelemetry(provider)]
    things = wrap(object, close=lambda _: None)
    names = {
        "\udcff": "\\udcff",
        'a"} 1\nevil 1\n': 'a"} 1\nevil 1\n',
        "\\": "\\",
        "a\rb\0": "a\rb\0",
        "{é☃}": "{é☃}",
        "long" * 1000: "long" * 1000,
    }
    pools = [Pool(things, name=name, listeners=listeners) for name in names]
    for pool in pools:
        with pool.connection():
            pass
    with PoolGroup(TcpConnection, listeners=listeners) as group:
        kept = group.pool(path=b"/tmp/\xff.sock")
        figures, points = scraped(registry), collected(reader)
        assert points.pools == {*names.values(), "/tmp/\\udcff.sock"}
        for name in names.values():
            assert figures.of("gsocketpool_acquired_total", pool=name) == 1
            assert figures.of("gsocketpool_wait_seconds_count", pool=name) == 1
        assert figures.pools == points.pools
        assert all(name.encode() for name in points.pools)
        del kept
    for pool in pools:
        pool.close()


def test_of_two_listeners_that_time_a_pool_for_one_registry_one_counts(
    server: EchoServer, registry: CollectorRegistry
) -> None:
    listeners = [Prometheus(registry), *(Prometheus(registry, histograms=True) for _ in range(2))]
    with Pool(TcpConnection, at(server), name="twice", listeners=listeners) as pool:
        for _ in range(3):
            ask(pool)
        figures = scraped(registry)
        for what, count in (("wait", 3), ("use", 3), ("dial", 1)):
            assert figures.of(f"gsocketpool_{what}_seconds_count", pool="twice") == count
        assert figures.of("gsocketpool_acquired_total", pool="twice") == 3


def test_a_subclass_that_shows_only_some_pools_fails_for_none(server: EchoServer, registry: CollectorRegistry) -> None:
    class Choosy(Prometheus):
        def attached(self, pool: Any) -> None:
            if "shown" in repr(pool):
                super().attached(pool)

    listener = Choosy(registry, histograms=True)
    with (
        Pool(TcpConnection, at(server), name="shown", listeners=[listener]) as shown,
        Pool(TcpConnection, at(server), name="other", listeners=[listener]) as other,
    ):
        ask(shown)
        ask(other)
        assert scraped(registry).pools == {"shown"}
        assert scraped(registry).of("gsocketpool_use_seconds_count", pool="shown") == 1
