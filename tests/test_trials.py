"""What people who tried to break the pool have found: each once, so that it stays found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent.event import Event

from gsocketpool import Pool, PoolExhaustedError, TcpConnection, wrap
from gsocketpool.driver import LAST_MOMENT
from tests.conftest import Logged
from tests.dials import BOUND, Attempt
from tests.lines import Line, borrow, give_back, line_pool
from tests.servers import LineEchoServer


@pytest.fixture
def server() -> Iterator[LineEchoServer]:
    with LineEchoServer() as server:
        yield server


def until(what: str, happened: Callable[[], bool]) -> None:
    """Wait until something has happened, and let everybody else run meanwhile."""
    with gevent.Timeout(BOUND, AssertionError(f"{what}: it has not come to that in {BOUND:g} s")):
        while not happened():
            gevent.sleep(0.001)


@contextmanager
def filtered(judge: Any) -> Iterator[None]:
    """Have each record under ``gsocketpool`` pass by this filter."""
    logger = logging.getLogger("gsocketpool")
    logger.addFilter(judge)
    try:
        yield
    finally:
        logger.removeFilter(judge)


def noting(limits: list[Any]) -> type[Pool[Any]]:
    """A pool that notes for how long, at most, whoever stands still is to stand still."""

    class Noting(Pool[Any]):
        pass

    def park(pool: Any, place: Any, limit: float | None) -> None:
        limits.append(limit)
        Pool._park(pool, place, limit)

    Noting._park = park  # type: ignore[method-assign, assignment]
    return Noting


def test_g12_a_log_filter_that_raises_ends_neither_the_upkeep_nor_a_reclaim(server: LineEchoServer) -> None:
    seen: list[str] = []

    def judge(record: logging.LogRecord) -> bool:
        seen.append(record.getMessage())
        raise ValueError("no records today")

    with filtered(judge), line_pool(server, min_idle=2, leak_threshold=0.02, reclaim=True, max_connections=3) as pool:
        pool.wait_ready(BOUND)
        gevent.spawn(pool.acquire).join()
        until("what it had is taken back", lambda: pool.stats().closed["reclaimed"] == 1)
        line = pool.acquire()
        until("the leak is reported", lambda: any("has held a connection" in text for text in seen))
        pool.release(line)
        pool.clear()
        until("the stock is there again", lambda: pool.idle == 2)
        assert pool.faults() == []


def test_g4_a_borrower_who_is_killed_while_its_leak_is_logged_costs_no_slot(server: LineEchoServer) -> None:
    talking, go_on = Event(), Event()

    def judge(record: logging.LogRecord) -> bool:
        if "came back" in record.getMessage():
            talking.set()
            go_on.wait(BOUND)
        return False

    with filtered(judge), line_pool(server, leak_threshold=0.02, max_connections=1) as pool:
        held = Event()

        def borrower() -> None:
            with pool.connection():
                held.wait(BOUND)

        job = gevent.spawn(borrower)
        until("it is reported", lambda: any(m.loan and m.loan.reported for m in pool._members.values()))
        held.set()
        assert talking.wait(BOUND)
        job.kill()
        give_back(pool, borrow(pool, 1))
        go_on.set()


def test_g4_what_could_not_be_closed_for_the_depth_of_the_recursion_is_closed_at_a_tick(server: LineEchoServer) -> None:
    class Deep(Pool[Line]):
        deep = False

    def spawn(pool: Any, job: Any, *args: object) -> object:
        if pool.deep:
            raise RecursionError("too deep")
        return Pool._spawn(pool, job, *args)

    Deep._spawn = spawn  # type: ignore[method-assign, assignment]
    with Deep(Line, {"host": "127.0.0.1", "port": server.port}, max_connections=1, check_after_idle=0.04) as pool:
        line = pool.acquire()
        pool.deep = True
        with pytest.raises(RecursionError):
            pool.drop(line)
        assert pool.total == 1
        pool.deep = False
        until("it is closed", lambda: pool.total == 0)
        assert not line.is_connected()
        give_back(pool, borrow(pool, 1))


def test_g7_who_is_granted_a_dead_connection_during_pauses_waits_no_longer_than_he_said(server: LineEchoServer) -> None:
    limits: list[float] = []
    options = {"host": "127.0.0.1", "port": server.port}
    with noting(limits)(Line, options, max_connections=1, check_after_idle=0) as pool:
        [line] = borrow(pool, 1)
        give_back(pool, [line])
        line.healthy = False
        pool.pause()
        limits.clear()
        waiter = Attempt(pool.acquire, timeout=0.4)
        began = monotonic()
        gevent.sleep(0.3)
        left = began + 0.4 - monotonic()
        pool.resume()
        pool.pause()
        error = waiter.result()
        assert isinstance(error, PoolExhaustedError)
        assert [limit for limit in limits[1:] if limit > left] == []  # not 0.4 again
        pool.resume()


def test_g11_closing_with_a_timeout_takes_a_moment_more_than_that_though_close_hangs(
    server: LineEchoServer, logged: Logged
) -> None:
    lines: list[Line] = []
    limits: list[float] = []
    may_close = Event()

    class Hanging(Line):
        def open(self) -> None:
            super().open()
            lines.append(self)

        def close(self) -> None:
            may_close.wait()
            raise OSError("it took too long")

    pool = noting(limits)(Hanging, {"host": "127.0.0.1", "port": server.port})
    pool.close_grace = 3 * BOUND  # type: ignore[misc]
    borrow(pool, 2)
    pool.release(lines[0])
    limits.clear()
    pool.close(0.1)
    assert pool.total == 2  # it has waited for neither, idle or lent
    assert sum(limits) < 0.1 + 1.5 * LAST_MOMENT
    may_close.set()
    assert len(logged.take(2)) == 2
    assert pool.total == 0
    for line in lines:
        TcpConnection.close(line)


def test_a_wrap_without_a_check_is_not_watched_and_one_whose_check_looks_at_nothing_is_not_asked_for_ever(
    server: LineEchoServer,
) -> None:
    asked: list[object] = []

    def connect() -> Any:
        return gevent.socket.create_connection(("127.0.0.1", server.port))

    def check(connection: Any) -> bool:
        asked.append(connection)
        return True

    with (
        Pool(wrap(connect), initial_connections=1, check_after_idle=0.04) as blind,
        Pool(wrap(connect, check=check), initial_connections=1, check_after_idle=0.04) as pool,
    ):
        (member,) = pool._members.values()
        until("it is watched", lambda: member.watch is not None)
        server.hang_up()
        until("it has been asked often enough", lambda: len(asked) > 3)
        gevent.sleep(0.1)
        assert len(asked) == 4
        assert [m.watch for m in blind._members.values()] == [None]


def test_a_closed_pool_can_be_cleared_while_somebody_was_granted(server: LineEchoServer, logged: Logged) -> None:
    pool = line_pool(server, max_connections=1)
    [line] = borrow(pool, 1)
    waiter = Attempt(pool.acquire, timeout=None)
    pool.release(line)
    pool.close()
    pool.clear()
    assert waiter.result() is line
    pool.release(line)
    pool.close(BOUND)
    assert pool.total == 0
