"""Exporters of a pool's figures: listeners, for OpenTelemetry and for Prometheus. Importing this loads neither of them.

Gauges and counters are read from `stats()` when somebody collects them, in whichever thread that happens; until then a
pool pays nothing for them. What is measured at each loan, `histograms=True` asks for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from operator import add
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gsocketpool.core import REASONS
from gsocketpool.driver import _name_of
from gsocketpool.events import Listener
from gsocketpool.stats import PoolStats

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from prometheus_client import CollectorRegistry
    from prometheus_client import Histogram as PrometheusHistogram
    from prometheus_client.metrics_core import Metric

__all__ = ["OpenTelemetry", "Prometheus"]

#: Upper bounds of the histograms' buckets, in seconds.
BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

#: What the histograms of wait, use and dial times are about.
DESCRIPTIONS: Final = (
    "Seconds for which a borrower waited for a connection.",
    "Seconds for which a borrower kept a connection.",
    "Seconds that a dial took which succeeded.",
)

#: The states of a breaker, as `PoolStats.breaker` calls them.
BREAKER_STATES: Final = ("closed", "open", "half-open")

#: Seconds that a pool which is gone is kept apart: the last of its closes may still be under way.
GRACE: Final = 60.0

#: The totals of so many names are kept that have no pool any more.
MOST_GONE: Final = 1000

Counts = tuple[int, ...]


def counts_of(stats: PoolStats) -> Counts:
    """What only ever grows, as one row."""
    closed = stats.closed
    return (stats.acquired, stats.opened, stats.open_failures, stats.exhausted, *(closed[reason] for reason in REASONS))


NOTHING: Final[Counts] = (0,) * (4 + len(REASONS))


#: Whatever has a lock that must be a new one in the child of a fork, where whoever held it is gone.
_locked: weakref.WeakSet[Any] = weakref.WeakSet()


#: Held while it is found out who shares what with whom.
_sharing = threading.RLock()


def _renew_locks() -> None:
    global _sharing
    _sharing = threading.RLock()
    for each in _locked:
        each._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class Times(NamedTuple):
    """Who is told what was measured in the pools of one name."""

    wait: Callable[[float], object]
    use: Callable[[float], object]
    dial: Callable[[float], object]


class Seen:
    """What is known of one pool. `shown` is what it had counted when it was last asked, `last` the same when it was
    closed or later."""

    __slots__ = ("gone_since", "key", "last", "name", "ref", "shown", "timer", "times")

    def __init__(self, pool: Any) -> None:
        self.ref = weakref.ref(pool)
        self.key = id(pool)
        name: str = pool._settings.name or _name_of(pool._factory)
        self.name = name.encode(errors="backslashreplace").decode()  # else one odd name would spoil the whole scrape
        self.times: Times | None = None
        self.timer = 0  # whose they are
        self.shown = self.last = NOTHING
        self.gone_since: float | None = None


class Reading:
    """The figures of all pools of one name, added up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.idle = self.used = self.opening = self.waiting = self.max_connections = self.min_idle = 0
        self.breaker = dict.fromkeys(BREAKER_STATES, 0)
        self.counts = NOTHING

    def add(self, stats: PoolStats, min_idle: int, closed: bool) -> None:
        """One pool more."""
        self.idle += stats.idle
        self.used += max(0, stats.in_use)  # read from another thread than the pool's, the figures may not quite agree
        self.opening += stats.opening
        self.waiting += stats.waiting
        if not closed:  # else it opens nothing any more
            self.max_connections += stats.max_connections
            self.min_idle += min_idle
            self.breaker[stats.breaker] += 1

    @property
    def acquired(self) -> int:
        return self.counts[0]

    @property
    def opened(self) -> int:
        return self.counts[1]

    @property
    def open_failures(self) -> int:
        return self.counts[2]

    @property
    def exhausted(self) -> int:
        return self.counts[3]

    @property
    def closed(self) -> dict[str, int]:
        return dict(zip(REASONS, self.counts[4:], strict=True))


class Book:
    """The pools whose figures go to one place.

    The totals of a pool that is gone are kept under its name, so that a counter of that name goes on where it was when
    another pool gets it. No `stats()` is called with the lock held: a pool of threads has a lock of its own.
    """

    def __init__(self, forget: Callable[[str], object] = lambda name: None) -> None:
        """
        :param forget: is told of a name whose totals are not kept any longer.
        """
        self.found: dict[int, Seen] = {}  # by the pool's identity
        self._forget = forget
        self._seen: list[Seen] = []
        self._crowd = 16  # as many may be there before somebody looks who is gone
        self._gone: OrderedDict[str, Counts] = OrderedDict()  # by name; the one that lost a pool last is the last
        # Reentrant, since the collector may run a finalizer of the user's in here, which makes a pool.
        self._lock = threading.RLock()
        _locked.add(self)

    def attach(self, pool: Any, timer: Timed | None) -> None:
        """Show this pool from now on.

        :param timer: who hears what takes time; of several, the first one counts.
        """
        with self._lock:
            if len(self._seen) >= self._crowd:
                self._tidy()
                self._crowd = 2 * len(self._seen) + 16
            seen = self.found.get(id(pool))
            if seen is None or seen.ref() is not pool:
                seen = self.found[id(pool)] = Seen(pool)
                self._seen.append(seen)
            if timer is not None and seen.times is None:
                seen.times, seen.timer = timer._times_for(seen.name), id(timer)

    def times_of(self, pool: Any, timer: Timed) -> Times | None:
        """Who is told what was measured, if it is for this one to tell."""
        seen = self.found.get(id(pool))
        return seen.times if seen is not None and seen.timer == id(timer) else None

    def look_at(self, pool: Any) -> None:
        """It is closed, and may be gone when it is asked next."""
        seen = self.found.get(id(pool))
        if seen is not None:
            seen.last = counts_of(pool.stats())

    def read(self) -> list[Reading]:
        """One reading for each name that a pool has."""
        looks = []
        for seen in list(self._seen):
            pool = seen.ref()
            if pool is not None:
                looks.append((seen, pool.stats(), pool._settings.min_idle, pool.closed))
            del pool
        with self._lock:
            readings: dict[str, Reading] = {}
            for seen, stats, min_idle, closed in looks:
                seen.shown = tuple(map(max, seen.shown, counts_of(stats)))
                readings.setdefault(seen.name, Reading(seen.name)).add(stats, min_idle, closed)
            self._tidy()
            for name, counts in (*self._gone.items(), *((seen.name, seen.shown) for seen in self._seen)):
                if name in readings:
                    readings[name].counts = tuple(map(add, readings[name].counts, counts))
        return list(readings.values())

    def _tidy(self) -> None:
        """Keep of those who are gone what they had counted, and no more."""
        now = monotonic()
        for seen in [seen for seen in self._seen if seen.ref() is None]:
            seen.shown = tuple(map(max, seen.shown, seen.last))
            if seen.gone_since is None:
                seen.gone_since = now
            if now - seen.gone_since >= GRACE:
                self._seen.remove(seen)
                if self.found.get(seen.key) is seen:
                    del self.found[seen.key]
                self._gone[seen.name] = tuple(map(add, self._gone.get(seen.name, NOTHING), seen.shown))
                self._gone.move_to_end(seen.name)
        if len(self._gone) > MOST_GONE:
            there = {seen.name for seen in self._seen}
            for name in [name for name in self._gone if name not in there][: len(self._gone) - MOST_GONE]:
                del self._gone[name]
                self._forget(name)


class Exporter(Listener):
    """What both have in common."""

    _book: Book
    _times_for: Callable[[str], Times]

    def _begin(self, book: Book, times_for: Callable[[str], Times], histograms: bool) -> None:
        self._book = book
        self._times_for = times_for
        if histograms:  # a pool looks at the class for what its listener hears
            kind: Any = type(self)
            self.__class__ = _timed(kind)

    def attached(self, pool: Any) -> None:
        self._book.attach(pool, self if isinstance(self, Timed) else None)

    def detached(self, pool: Any) -> None:
        self._book.look_at(pool)

    def closed(self, pool: Any, connection: Any, reason: str) -> None:
        if pool.closed:
            self._book.look_at(pool)


class Timed(Listener):
    """Hears what takes time."""

    _book: Book
    _times_for: Callable[[str], Times]

    def borrowed(self, pool: Any, connection: Any, waited: float) -> None:
        times = self._book.times_of(pool, self)
        if times is not None:
            times.wait(waited)

    def returned(self, pool: Any, connection: Any, held: float) -> None:
        times = self._book.times_of(pool, self)
        if times is not None:
            times.use(held)

    def opened(self, pool: Any, connection: Any, seconds: float) -> None:
        times = self._book.times_of(pool, self)
        if times is not None:
            times.dial(seconds)


@functools.cache
def _timed(cls: type[Any]) -> type[Any]:
    """That class, and hears what takes time, but for what it hears itself."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, Timed), names)


def _vet(histograms: object) -> None:
    if not isinstance(histograms, bool):
        raise TypeError(f"histograms must be True or False, not {histograms!r}")


def _load(module: str, extra: str, whose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'gsocketpool.metrics.{whose} cannot import {module} ({error}): pip install "gsocketpool[{extra}]"',
            name=module,
        ) from error


class Prometheus(Exporter):
    """Shows pools to Prometheus, through prometheus-client.

    ::

        pool = Pool(..., name="orders", listeners=[Prometheus()])
        prometheus_client.start_http_server(8000)

    All that write to one registry show their pools side by side, whether there is one such listener for all pools or
    one for each. The label ``pool`` is the pool's name, or its factory's; pools of one name are added up.

    :param registry: a ``prometheus_client.CollectorRegistry``; None: the one that ``prometheus_client`` shows unasked.
    :param histograms: whether to measure how long borrowers wait, how long they keep what they borrowed, and how long
        dials take. Each loan then pays for it.
    :raises ImportError: prometheus-client is not installed.
    :raises ValueError: the registry has something else of these names.
    """

    def __init__(self, registry: CollectorRegistry | None = None, histograms: bool = False) -> None:
        client = _load("prometheus_client", "prometheus", "Prometheus")
        _vet(histograms)
        if not isinstance(registry, client.CollectorRegistry | None):
            raise TypeError(f"registry must be a prometheus_client.CollectorRegistry or None, not {registry!r}")
        if registry is None:
            registry = client.REGISTRY
        with _sharing:
            collector = _collectors.get(registry)
            if collector is None:
                collector = _Collector()
                registry.register(collector)
                _collectors[registry] = collector
            if histograms:
                collector.make_histograms(registry)
        self._begin(collector.book, collector.times_for, histograms)


class _Collector:
    """What a registry of Prometheus asks."""

    def __init__(self) -> None:
        self._histograms: list[PrometheusHistogram] = []
        self.book = Book(forget=self._forget)

    def make_histograms(self, registry: CollectorRegistry) -> None:
        """Before any pool is timed; once is enough."""
        from prometheus_client import Histogram

        if not self._histograms:
            self._histograms = [
                Histogram(f"gsocketpool_{name}_seconds", description, ["pool"], registry=registry, buckets=BUCKETS)
                for name, description in zip(("wait", "use", "dial"), DESCRIPTIONS, strict=True)
            ]

    def times_for(self, name: str) -> Times:
        return Times(*(histogram.labels(name).observe for histogram in self._histograms))

    def _forget(self, name: str) -> None:
        for histogram in self._histograms:
            with contextlib.suppress(KeyError):  # it was never timed
                histogram.remove(name)

    def describe(self) -> Iterator[Metric]:
        """What it may answer, without asking the pools."""
        return self._families([])

    def collect(self) -> Iterator[Metric]:
        return self._families(self.book.read())

    def _families(self, readings: list[Reading]) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        connections = GaugeMetricFamily(
            "gsocketpool_connections", "Connections by state: idle, used, opening.", labels=["pool", "state"]
        )
        most = GaugeMetricFamily(
            "gsocketpool_connections_max", "max_connections: most connections at any time.", labels=["pool"]
        )
        waiting = GaugeMetricFamily("gsocketpool_waiting", "Borrowers that wait for a connection.", labels=["pool"])
        breaker = GaugeMetricFamily(
            "gsocketpool_breaker", "Pools whose breaker is in this state.", labels=["pool", "state"]
        )
        acquired = CounterMetricFamily("gsocketpool_acquired", "How often a connection was lent.", labels=["pool"])
        opened = CounterMetricFamily("gsocketpool_opened", "Dials that succeeded.", labels=["pool"])
        failures = CounterMetricFamily("gsocketpool_open_failures", "Dials that failed.", labels=["pool"])
        exhausted = CounterMetricFamily(
            "gsocketpool_exhausted", "How often a borrower was turned away.", labels=["pool"]
        )
        closed = CounterMetricFamily("gsocketpool_closed", "Connections closed, by reason.", labels=["pool", "reason"])
        for reading in readings:
            label = [reading.name]
            for state in ("idle", "used", "opening"):
                connections.add_metric([*label, state], getattr(reading, state))
            most.add_metric(label, reading.max_connections)
            waiting.add_metric(label, reading.waiting)
            for state, pools in reading.breaker.items():
                breaker.add_metric([*label, state], pools)
            acquired.add_metric(label, reading.acquired)
            opened.add_metric(label, reading.opened)
            failures.add_metric(label, reading.open_failures)
            exhausted.add_metric(label, reading.exhausted)
            for reason, count in reading.closed.items():
                closed.add_metric([*label, reason], count)
        yield from (connections, most, waiting, breaker, acquired, opened, failures, exhausted, closed)


class OpenTelemetry(Exporter):
    """Shows pools to OpenTelemetry, through opentelemetry-api: under the names of its semantic conventions for
    connection pools, and what these lack under ``gsocketpool.``.

    ::

        pool = Pool(..., name="orders", listeners=[OpenTelemetry()])

    The attribute ``db.client.connection.pool.name`` is the pool's name, or its factory's; pools of one name are added
    up.

    :param meter_provider: an ``opentelemetry.metrics.MeterProvider``; None: the global one, which may be set later.
    :param histograms: as for :class:`Prometheus`.
    :raises ImportError: opentelemetry-api is not installed.
    """

    def __init__(self, meter_provider: MeterProvider | None = None, histograms: bool = False) -> None:
        metrics = _load("opentelemetry.metrics", "otel", "OpenTelemetry")
        _vet(histograms)
        if not isinstance(meter_provider, metrics.MeterProvider | None):
            raise TypeError(
                f"meter_provider must be an opentelemetry.metrics.MeterProvider or None, not {meter_provider!r}"
            )
        instruments = _instruments_of(meter_provider, metrics.get_meter_provider())
        if histograms:
            instruments.make_histograms()
        self._begin(instruments.book, instruments.times_for, histograms)


POOL: Final = "db.client.connection.pool.name"
STATE: Final = "db.client.connection.state"

Found = Iterable[tuple[int, dict[str, str]]]


def _counted(reading: Reading) -> Found:
    return [(reading.idle, {STATE: "idle"}), (reading.used, {STATE: "used"})]


def _breakers(reading: Reading) -> Found:
    return [(pools, {"gsocketpool.breaker.state": state}) for state, pools in reading.breaker.items()]


def _closed(reading: Reading) -> Found:
    return [(count, {"gsocketpool.close.reason": reason}) for reason, count in reading.closed.items()]


def _one(figure: str) -> Callable[[Reading], Found]:
    return lambda reading: [(getattr(reading, figure), {})]


#: What is no counter is an UpDownCounter, as in the conventions: what all processes have can be added up.
UP_DOWN: Final = (
    ("db.client.connection.count", "{connection}", "Connections in this state.", _counted),
    (
        "db.client.connection.idle.max",
        "{connection}",
        "Most connections that may idle: max_connections.",
        _one("max_connections"),
    ),
    ("db.client.connection.idle.min", "{connection}", "min_idle: as many connections are kept idle.", _one("min_idle")),
    (
        "db.client.connection.max",
        "{connection}",
        "max_connections: most connections at any time.",
        _one("max_connections"),
    ),
    ("db.client.connection.pending_requests", "{request}", "Borrowers that wait for a connection.", _one("waiting")),
    ("gsocketpool.connection.opening", "{connection}", "Dials under way.", _one("opening")),
    ("gsocketpool.breaker", "{pool}", "Pools whose breaker is in this state.", _breakers),
)
COUNTERS: Final = (
    ("db.client.connection.timeouts", "{timeout}", "How often a borrower was turned away.", _one("exhausted")),
    ("gsocketpool.connection.acquired", "{connection}", "How often a connection was lent.", _one("acquired")),
    ("gsocketpool.connection.opened", "{connection}", "Dials that succeeded.", _one("opened")),
    ("gsocketpool.connection.open_failures", "{failure}", "Dials that failed.", _one("open_failures")),
    ("gsocketpool.connection.closed", "{connection}", "Connections closed, by reason.", _closed),
)


class _Instruments:
    """What a meter provider of OpenTelemetry asks, and is told."""

    def __init__(self, meter_provider: MeterProvider) -> None:
        from gsocketpool import __version__

        self.book = Book()
        self._histograms: list[Any] = []
        self._meter = meter_provider.get_meter("gsocketpool", __version__)
        for create, instruments in (
            (self._meter.create_observable_up_down_counter, UP_DOWN),
            (self._meter.create_observable_counter, COUNTERS),
        ):
            for name, unit, description, figures in instruments:
                create(name, [functools.partial(self._observe, figures)], unit, description)

    def make_histograms(self) -> None:
        """Before any pool is timed; once is enough."""
        if not self._histograms:
            self._histograms = [
                self._meter.create_histogram(
                    f"db.client.connection.{name}_time", "s", description, explicit_bucket_boundaries_advisory=BUCKETS
                )
                for name, description in zip(("wait", "use", "create"), DESCRIPTIONS, strict=True)
            ]

    def times_for(self, name: str) -> Times:
        attributes = {POOL: name}
        return Times(*(functools.partial(histogram.record, attributes=attributes) for histogram in self._histograms))

    def _observe(self, figures: Callable[[Reading], Found], options: CallbackOptions) -> Iterator[Observation]:
        from opentelemetry.metrics import Observation

        for reading in self.book.read():
            for value, attributes in figures(reading):
                yield Observation(value, {POOL: reading.name, **attributes})


#: What is there already, for who comes next.
_collectors: weakref.WeakKeyDictionary[CollectorRegistry, _Collector] = weakref.WeakKeyDictionary()
_instruments: weakref.WeakKeyDictionary[MeterProvider, _Instruments] = weakref.WeakKeyDictionary()
_global_instruments: list[_Instruments] = []


def _instruments_of(given: MeterProvider | None, current: MeterProvider) -> _Instruments:
    """One for each provider: a second instrument of a name would not be asked. The global one may be another one by
    and by, and stands in for that until then.

    :param current: the global one.
    """
    provider = current if given is None else given
    with _sharing:
        found = _instruments.get(provider)
        if found is None and provider is current and _global_instruments:
            found = _global_instruments[0]
        if found is None:
            found = _Instruments(provider)
            if provider is current:
                _global_instruments.append(found)
            else:
                _instruments[provider] = found
        return found
