"""What holds for every test: it leaves no greenlet, no thread, no descriptor, no log record and no traceback behind.

A test that expects the pool to log a warning, or a greenlet to die of an error, asks for `logged` or `crashed` and
takes what it expects; whatever nobody took fails the test.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import random
import re
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import gevent
import gevent.socket
import greenlet
import pytest
import uvloop
from gevent.hub import Hub
from hypothesis import HealthCheck, settings

from .peers import Nginx, Postgres, Valkey, peer_folder

SEED = int(os.environ.get("GSOCKETPOOL_SEED", "20170411"))

#: Seconds that what a test started has to come to its end after the test.
SETTLE = 10.0

#: The names of threads that may outlive a test: those that do the pools' jobs are kept for the next pool.
KEPT_THREADS = ("gsocketpool",)

#: What may say that something has gone wrong.
LOGGERS = [logging.getLogger(name) for name in ("gsocketpool", "asyncio")]

settings.register_profile(
    "gsocketpool",
    # The same examples in every run; no deadline, since a shared machine may stop for a while at any place.
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("gsocketpool")


def pytest_configure() -> None:
    # A shell that runs this in the background ignores Ctrl-C, and so would whatever the tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors, since tests wait more than they work."""
    return min((os.cpu_count() or 1) + 1, 4)


def pytest_report_header() -> str:
    return f"random seed: {SEED} (set GSOCKETPOOL_SEED for another), gevent {gevent.__version__}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Else a test has another name in each process, and `rng` another seed.
    for item in items:
        if _ADDRESS.search(item.nodeid):
            raise pytest.UsageError(f"there is an address in the name {item.nodeid!r}: use `ids=shown` of conftest.py")
    # The longest ones first, so that no process is still busy with one when all others have nothing left to do.
    items.sort(key=lambda item: "test_soak" not in item.nodeid)


_ADDRESS = re.compile(r" at 0x[0-9a-f]+", re.IGNORECASE)


def shown(value: object) -> str:
    """What a parametrized test is named after: the value's repr, the same in every process."""
    return _ADDRESS.sub("", repr(value))


def pytest_collection_finish() -> None:
    # What gevent makes once and keeps: its hub and the threads that resolve names; and uvloop, a pipe for signals.
    gevent.socket.getaddrinfo("127.0.0.1", 80)
    uvloop.new_event_loop().close()
    _freeze()


def _freeze() -> None:
    """Take what there is off the collector's lists, so that it takes no time to look through them after each test.

    Done again now and then, since pytest keeps something of each test.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that differ between tests and are the same in every run with the same seed."""
    return random.Random(f"{SEED}:{request.node.nodeid}")


class Logged(logging.Handler):
    """Takes down what is logged under ``gsocketpool`` and ``asyncio`` at WARNING and above, from whichever thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    def take(self, count: int | None = None, timeout: float = 10.0) -> list[logging.LogRecord]:
        """Return the records so far, in order, and forget them: the test expected them.

        :param count: wait until there are so many, in gevent's way, and fail if there are not exactly so many.
        :param timeout: seconds to wait for them.
        """
        deadline = time.monotonic() + timeout
        while len(self._records) < (count or 0) and time.monotonic() < deadline:
            gevent.sleep(0.001)
        taken = self._records[:]
        del self._records[: len(taken)]  # none that a thread has added meanwhile
        if count is not None:
            assert len(taken) == count, f"{count} log records expected, got {[r.getMessage() for r in taken]}"
        return taken


class Crashed:
    """Takes down the errors that greenlets and callbacks die of, which gevent's hub would print to stderr."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._errors: list[tuple[object, BaseException]] = []

    def handle_error(
        self,
        context: object,
        type: type[BaseException] | None,
        value: BaseException | str | None,
        tb: TracebackType | None,
    ) -> None:
        kind, error, tb = self._hub._normalize_exception(type, value, tb)  # type: ignore[attr-defined]
        if context is None or issubclass(kind, (*self._hub.SYSTEM_ERROR, pytest.fail.Exception)):
            # A signal's handler raised: Ctrl-C, or a test's time limit, which may well have hit another greenlet. It
            # ends the test, so it goes on in the main greenlet.
            self._hub.handle_system_error(kind, error, tb)
        elif not issubclass(kind, self._hub.NOT_ERROR):
            self._errors.append((context, error))

    def take(self) -> list[BaseException]:
        """Return the errors so far and forget them: the test expected them."""
        taken, self._errors = [error for _, error in self._errors], []
        return taken

    def report(self) -> list[str]:
        return [f"{context!r} died of\n{''.join(traceback.format_exception(e))}" for context, e in self._errors]


#: Those that earlier tests left behind and were blamed for.
_known: weakref.WeakSet[Any] = weakref.WeakSet()


def _new_greenlets() -> list[greenlet.greenlet]:
    """Live greenlets of this thread, but for the main one, the hubs, and those that an earlier test was blamed for."""
    current = greenlet.getcurrent()
    main = _root(current)
    hub = getattr(_eventlet_hub(), "greenlet", None)
    return [
        g
        for g in gc.get_objects()
        if issubclass(type(g), greenlet.greenlet)
        # True while it runs or waits: not yet once it is made, no longer once it has ended.
        and g
        and g is not current
        and g is not main
        and g is not hub
        and not isinstance(g, Hub)
        and g not in _known
        and _root(g) is main
    ]


def _root(g: greenlet.greenlet) -> greenlet.greenlet:
    while g.parent is not None:
        g = g.parent
    return g


def _eventlet_hub() -> Any:
    """The hub that eventlet has made for this thread, if a test has used it. Like gevent's, it stays."""
    hubs = sys.modules.get("eventlet.hubs")
    return hubs and getattr(hubs._threadlocal, "hub", None)


def _kept_descriptors() -> Iterator[int]:
    """What eventlet, and gsocketpool for it, make once in a thread and keep."""
    if (hub := _eventlet_hub()) is not None:
        yield hub.poll.fileno()
    local = getattr(sys.modules.get("gsocketpool.eventlet"), "_local", None)
    if (home := getattr(local, "home", None)) is not None:
        for end in home._bell:
            yield end.fileno()


def _new_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    return [
        thread
        for thread in threading.enumerate()
        if thread not in before
        and thread not in _known
        and not thread.name.startswith(KEPT_THREADS)
        # A dummy stands for a thread that Python did not start, for ever.
        and not isinstance(thread, threading._DummyThread)
    ]


def _descriptors() -> dict[str, str]:
    """Open descriptors and what they lead to."""
    folder = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    found = {}
    for name in os.listdir(folder):
        try:
            found[name] = os.readlink(f"{folder}/{name}")
        except OSError:
            # The one that listdir itself had open; and on systems without /proc the links say nothing.
            found[name] = ""
    for kept in _kept_descriptors():
        found.pop(str(kept), None)
    return {fd: target for fd, target in found.items() if target or folder == "/dev/fd"}


class Left(NamedTuple):
    """What a test has left behind so far."""

    greenlets: list[greenlet.greenlet]
    threads: list[threading.Thread]
    descriptors: list[tuple[str, str]]


def _left_behind(descriptors: dict[str, str], threads: set[threading.Thread]) -> Left:
    """
    :param descriptors: those that there were before.
    :param threads: likewise.
    """
    return Left(_new_greenlets(), _new_threads(threads), sorted(_descriptors().items() - descriptors.items()))


def _stack(frame: FrameType | None) -> str:
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


_tests = itertools.count(1)
_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_failed] = True
    return report


@pytest.fixture(autouse=True)
def _observed(request: pytest.FixtureRequest) -> Iterator[tuple[Logged, Crashed]]:
    """Fail a test that leaves anything behind. Made before and torn down after every other fixture of the test."""
    hub = gevent.get_hub()
    logged, crashed = Logged(), Crashed(hub)
    for logger in LOGGERS:
        logger.addHandler(logged)
    hub.handle_error = crashed.handle_error  # type: ignore[method-assign]
    descriptors, threads = _descriptors(), set(threading.enumerate())

    yield logged, crashed

    # A test that has failed may be forgiven for what it left behind; its traceback still holds most of it.
    failed = request.node.stash.get(_failed, False)
    deadline = time.monotonic() + (0 if failed else SETTLE)
    pause = 0.0
    while True:
        left = _left_behind(descriptors, threads)
        if not any(left) or time.monotonic() >= deadline:
            break
        del left  # or what sits in a circle would never be collected
        gevent.sleep(pause)
        if _eventlet_hub() is not None:
            sys.modules["eventlet"].sleep(0)
        gc.collect()
        pause = min(pause * 2 or 0.001, 0.1)
    for logger in LOGGERS:
        logger.removeHandler(logged)
    del hub.handle_error
    words = [f"a greenlet that still lives: {g!r}\n{_stack(g.gr_frame)}" for g in left.greenlets]
    running = sys._current_frames() if left.threads else {}
    words += [f"a thread that still runs: {t!r}\n{_stack(running.get(t.ident or 0))}" for t in left.threads]
    words += [f"an open descriptor: {fd} -> {target}" for fd, target in left.descriptors]
    words += [f"a log record: {r.levelname} {r.name}: {r.getMessage()}" for r in logged.take()]
    words += crashed.report()
    _known.update([*left.greenlets, *left.threads])
    if next(_tests) % 20 == 0:
        _freeze()
    if words and not failed:
        pytest.fail("the test left behind:\n" + "\n".join(words), pytrace=False)


@pytest.fixture
def logged(_observed: tuple[Logged, Crashed]) -> Logged:
    """What is logged under ``gsocketpool`` at WARNING and above; take what the test expects."""
    return _observed[0]


@pytest.fixture
def crashed(_observed: tuple[Logged, Crashed]) -> Crashed:
    """The errors that greenlets died of, which gevent would have printed; take what the test expects."""
    return _observed[1]


# Real servers, one of each for the whole run, started when a test first asks for it; a test finds it without clients.


@pytest.fixture(scope="session")
def _peers() -> Iterator[Path]:
    with peer_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def _valkey(_peers: Path) -> Iterator[Valkey]:
    with Valkey(_peers) as server:
        yield server


@pytest.fixture(scope="session")
def _postgres(_peers: Path) -> Iterator[Postgres]:
    with Postgres(_peers) as server:
        yield server


@pytest.fixture(scope="session")
def _nginx(_peers: Path) -> Iterator[Nginx]:
    with Nginx(_peers) as server:
        yield server


@pytest.fixture
def valkey(_valkey: Valkey) -> Valkey:
    """A Valkey server."""
    _valkey.recover()
    return _valkey


@pytest.fixture
def postgres(_postgres: Postgres) -> Postgres:
    """A PostgreSQL server."""
    _postgres.recover()
    return _postgres


@pytest.fixture
def nginx(_nginx: Nginx) -> Nginx:
    """An nginx server, over TCP and TLS."""
    _nginx.recover()
    return _nginx
