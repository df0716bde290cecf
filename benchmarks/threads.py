"""Threads: what one acquire and release cost, and what it takes when many threads want few connections."""

from __future__ import annotations

import functools
import importlib
import queue
import threading
import time
import timeit
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import measure as m
from benchmarks import runtimes
from benchmarks.fakes import Fake
from benchmarks.peer import ENDPOINT, PATIENCE, Built, Peer, connpool, generic_connection_pool, opened, sqlalchemy

THREADS = 32
CONNECTIONS = 4


class Floor:
    """The least that a fair pool can do with threads: a lock around a stack of idle connections and a queue of waiters.

    Each waits for a lock of its own. It knows no timeout, and loses a connection if a waiter is interrupted.
    """

    def __init__(self, factory: Callable[[], Any], size: int) -> None:
        self.idle = [opened(factory) for _ in range(size)]
        self.waiters: deque[list[Any]] = deque()
        self._lock = threading.Lock()

    def acquire(self) -> Any:
        """Take an idle connection, or wait for one."""
        with self._lock:
            if self.idle:
                return self.idle.pop()
            gate = threading.Lock()
            gate.acquire()
            waiter = [gate, None]
            self.waiters.append(waiter)
        gate.acquire()
        return waiter[1]

    def release(self, connection: Any) -> None:
        """Hand the connection to whoever waits longest, or keep it."""
        with self._lock:
            if not self.waiters:
                self.idle.append(connection)
                return
            waiter = self.waiters.popleft()
        waiter[1] = connection
        waiter[0].release()


class PsycopgFake(runtimes.PsycopgFacts, Fake):
    """A connection to nowhere that psycopg_pool can lend."""

    @classmethod
    def connect(cls, conninfo: str = "", **options: Any) -> Any:
        """Make one."""
        return opened(cls)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _floor(factory: Callable[[], Any], size: int) -> Built:
    floor = Floor(factory, size)
    return Built.without_block(floor, floor.acquire, floor.release)


def _queue(make: Callable[[], Any], factory: Callable[[], Any], size: int) -> Built:
    connections = make()
    for _ in range(size):
        connections.put(opened(factory))
    return Built.without_block(connections, connections.get, connections.put)


def _psycopg_pool(factory: Callable[[], Any], size: int) -> Built:
    make: Any = importlib.import_module("psycopg_pool").ConnectionPool
    pool = make(connection_class=PsycopgFake, min_size=size, max_size=size, timeout=PATIENCE, open=True)
    pool.wait()
    return Built(pool, pool.getconn, pool.putconn, pool.connection)


def _gsocketpool(factory: Callable[[], Any], size: int, timeout: Any = ...) -> Built:
    from gsocketpool.threading import Pool

    pool: Any = Pool(factory, max_connections=size, name="benchmark")
    if timeout is ...:
        return Built(pool, pool.acquire, pool.release, pool.connection)
    return Built(pool, lambda: pool.acquire(timeout=timeout), pool.release, lambda: pool.connection(timeout))


#: By the names that the cases use. The first three are no pools, but what one could be made of.
PEERS = {
    "floor": Peer("floor", _floor),
    "lifo": Peer("queue.LifoQueue", functools.partial(_queue, queue.LifoQueue)),
    "simple": Peer("queue.SimpleQueue", functools.partial(_queue, queue.SimpleQueue)),
    "sqlalchemy": Peer("SQLAlchemy QueuePool", sqlalchemy, "SQLAlchemy"),
    "generic-connection-pool": Peer("generic-connection-pool", generic_connection_pool, "generic-connection-pool"),
    "connpool": Peer("connpool", connpool, "connpool"),
    "psycopg_pool": Peer("psycopg_pool, with fakes", _psycopg_pool, "psycopg-pool"),
    "ours": Peer("gsocketpool", _gsocketpool),
    "ours, for ever": Peer("gsocketpool, timeout=None", functools.partial(_gsocketpool, timeout=None)),
}
NO_POOLS = ("floor", "lifo", "simple")

#: What is timed, in each pool's own words. ``pool`` is a local name.
PAIR = {
    "floor": "connection = pool.acquire(); pool.release(connection)",
    "lifo": "connection = pool.get(); pool.put(connection)",
    "simple": "connection = pool.get(); pool.put(connection)",
    "sqlalchemy": "connection = pool.connect(); connection.close()",
    "generic-connection-pool": f"connection = pool.acquire({ENDPOINT!r}); pool.release(connection, {ENDPOINT!r})",
    "connpool": "connection = pool.acquire(); pool.release(connection)",
    "psycopg_pool": "connection = pool.getconn(); pool.putconn(connection)",
    "ours": "connection = pool.acquire(); pool.release(connection)",
}
WITH = {
    "generic-connection-pool": f"with pool.connection({ENDPOINT!r}) as connection: pass",
    "connpool": "with pool.connection() as connection: pass",
    "psycopg_pool": "with pool.connection() as connection: pass",
    "ours": "with pool.connection() as connection: pass",
}


def measure(peer: str, statement: str = "", seconds: float = 0.0, turns: int = 0, hold: float = 0.0) -> m.Result:
    """Time a statement if there is one, else let the threads take turns."""
    with _ready(peer, 1 if statement else CONNECTIONS) as built:
        return _time(built, statement, seconds) if statement else _take_turns(built, turns, hold)


@contextmanager
def _ready(peer: str, size: int) -> Iterator[Built]:
    built = PEERS[peer].build(Fake, size)
    yield built
    if peer in ("psycopg_pool", "ours", "ours, for ever"):
        built.pool.close()  # they have threads


def _time(built: Built, statement: str, seconds: float) -> m.Result:
    timer = timeit.Timer(statement, "pool = it", timer=time.process_time, globals={"it": built.pool})
    number = 1000
    number = max(number, int(number * seconds / timer.timeit(number)))
    return {"ns": timer.timeit(number) / number * 1e9}


def _take_turns(built: Built, turns: int, hold: float) -> m.Result:
    acquire, release, sleep, clock = built.acquire, built.release, time.sleep, time.perf_counter
    waits: list[float] = []
    # One supply for all, so that all of them want a connection to the end, however unequally the turns are dealt out.
    supply = iter(range(THREADS * turns))
    ready = threading.Barrier(THREADS + 1)

    def borrower() -> None:
        ready.wait()
        for _ in supply:
            began = clock()
            connection = acquire()
            waits.append(clock() - began)
            sleep(hold)
            release(connection)

    borrowers = [threading.Thread(target=borrower) for _ in range(THREADS)]
    for each in borrowers:
        each.start()
    ready.wait()
    began = clock()
    for each in borrowers:
        each.join()
    seconds = clock() - began
    assert len(waits) == THREADS * turns
    return runtimes.summary(waits, seconds)


def report(run: m.Run) -> None:
    """Print the tables."""
    names = run.available(PEERS, PEERS)
    seconds = 0.005 if run.quick else 0.1
    pairs = run.side_by_side(
        {
            (way, name): {"case": "threads", "peer": name, "statement": statements[name], "seconds": seconds}
            for name in names
            for way, statements in (("pair", PAIR), ("with", WITH))
            if name in statements
        },
        processes=5,
        rounds=5,
    )
    print("one thread, uncontended\n")
    runtimes.report_pairs(run, "threads", PEERS, pairs, NO_POOLS)
    for hold, what, turns, processes in ((0.0, "lets the others run", 300, 15), (0.001, "sleeps for 1 ms", 50, 7)):
        turns = 10 if run.quick else turns
        print(f"\n{THREADS} threads, {CONNECTIONS} connections, {turns} turns for each to share; who has one {what}\n")
        results = run.side_by_side(
            {name: {"case": "threads", "peer": name, "turns": turns, "hold": hold} for name in names},
            processes=processes,
            apart=True,
        )
        runtimes.report_turns(run, "threads", PEERS, results, NO_POOLS, targets=not hold)
