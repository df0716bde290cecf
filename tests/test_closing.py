"""The end of a pool: what idles is closed now, what is borrowed as it returns, what is being opened as it is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent.event import Event

from gsocketpool import ConnectionNotFoundError, Pool, PoolClosedError, PoolError, PoolExhaustedError, TcpConnection
from tests.conftest import Crashed, Logged, shown
from tests.dials import BOUND, Attempt, Dials, nobody_else_runs
from tests.servers import LineEchoServer, Server


@pytest.fixture
def server() -> Iterator[LineEchoServer]:
    with LineEchoServer() as server:
        yield server


@pytest.fixture
def dials(server: LineEchoServer) -> Dials:
    return Dials(server)


class SlowToClose(TcpConnection):
    """Its close waits until the test lets it go on."""

    closing: list[SlowToClose]
    may_close: Event

    def close(self) -> None:
        self.closing.append(self)
        assert self.may_close.wait(BOUND)
        super().close()


@pytest.fixture
def slow() -> type[SlowToClose]:
    return type("SlowToClose", (SlowToClose,), {"closing": [], "may_close": Event()})


def line_pool(server: Server, kind: type[TcpConnection] = TcpConnection, **options: Any) -> Pool[TcpConnection]:
    return Pool(kind, {"host": "127.0.0.1", "port": server.port}, **options)


def ask(connection: TcpConnection, text: str) -> str:
    connection.send(text.encode() + b"\n")
    return connection.recv_until(b"\n").decode()


# What close() does


def test_a_pool_that_was_never_used_can_be_closed_and_closed_again() -> None:
    pool = Pool(TcpConnection, {"host": "127.0.0.1", "port": 1})
    assert not pool.closed
    with nobody_else_runs():
        for _ in range(3):
            pool.close()
    assert pool.closed
    assert "closed" in repr(pool)


def test_what_idles_is_closed_before_close_returns(server: LineEchoServer) -> None:
    pool = line_pool(server, initial_connections=3)
    connections = [pool.acquire() for _ in range(3)]
    for connection in connections[:2]:
        pool.release(connection)
    pool.cool(0.0)
    pool.close()
    assert [connection.is_connected() for connection in connections] == [False, False, True]
    assert (pool.size, pool.idle, pool.in_use, pool.total) == (1, 0, 1, 1)
    assert pool.stats().closed["closed"] == 2
    pool.release(connections[2])
    server.wait_open(0)
    assert (pool.total, pool.stats().closed["closed"]) == (0, 3)


def test_idle_connections_are_closed_side_by_side(server: LineEchoServer, slow: type[SlowToClose]) -> None:
    pool = line_pool(server, slow, initial_connections=5)
    closing = Attempt(pool.close)
    gevent.sleep(0)
    assert len(slow.closing) == 5  # before any of them is closed
    assert not closing.ready()
    assert (pool.closed, pool.size, pool.total) == (True, 0, 5)
    slow.may_close.set()
    closing.result()
    assert pool.total == 0


def test_closing_twice_at_once_closes_every_connection_once(server: LineEchoServer, slow: type[SlowToClose]) -> None:
    pool = line_pool(server, slow, initial_connections=3)
    closing = [Attempt(pool.close) for _ in range(3)]
    slow.may_close.set()
    for one in closing:
        assert one.result() is None
    server.wait_open(0)
    assert (len(slow.closing), len(set(map(id, slow.closing)))) == (3, 3)
    pool.close()
    assert len(slow.closing) == 3


def test_who_is_killed_while_he_closes_the_pool_has_closed_it_all_the_same(
    server: LineEchoServer, slow: type[SlowToClose]
) -> None:
    pool = line_pool(server, slow, initial_connections=3)
    closing = Attempt(pool.close)
    closing.greenlet.kill()
    slow.may_close.set()
    server.wait_open(0)
    assert (pool.closed, pool.total) == (True, 0)


def test_a_close_that_fails_is_logged_and_the_others_are_closed(server: LineEchoServer, logged: Logged) -> None:
    class Bad(TcpConnection):
        def close(self) -> None:
            super().close()
            raise RuntimeError("no good bye")

    pool = line_pool(server, Bad, initial_connections=3, name="orders")
    pool.close()
    for record in logged.take(3):
        assert "'orders'" in record.getMessage()
        assert "no good bye" in record.getMessage()
    server.wait_open(0)
    assert pool.total == 0


# Borrowed connections


def by_release(pool: Pool[TcpConnection], server: Server) -> None:
    connection = pool.acquire()
    pool.close()
    assert ask(connection, "still mine") == "still mine"
    pool.release(connection)
    with pytest.raises(ConnectionNotFoundError):
        pool.release(connection)


def by_leaving_the_block(pool: Pool[TcpConnection], server: Server) -> None:
    with pool.connection() as connection:
        pool.close()
        assert ask(connection, "still mine") == "still mine"


def fail(pool: Pool[TcpConnection], error: Exception) -> None:
    with pool.connection():
        pool.close()
        raise error


def by_failing(pool: Pool[TcpConnection], server: Server) -> None:
    with pytest.raises(ValueError, match="discards"):
        fail(pool, ValueError("discards"))


def by_failing_with_what_discards_nothing(pool: Pool[TcpConnection], server: Server) -> None:
    with pytest.raises(KeyError, match="discards nothing"):
        fail(pool, KeyError("discards nothing"))


def by_drop(pool: Pool[TcpConnection], server: Server) -> None:
    connection = pool.acquire()
    pool.close()
    pool.drop(connection)
    assert not connection.is_connected()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (by_release, "closed"),
        (by_leaving_the_block, "closed"),
        (by_failing, "discarded"),
        (by_failing_with_what_discards_nothing, "closed"),
        (by_drop, "dropped"),
    ],
)
def test_what_is_borrowed_is_usable_to_the_end_and_closed_as_it_returns(
    server: LineEchoServer, how: Callable[[Pool[TcpConnection], Server], None], reason: str
) -> None:
    pool = line_pool(server, discard_on=ValueError)
    how(pool, server)
    server.wait_open(0)
    gevent.sleep(0)
    stats = pool.stats()
    assert {name: count for name, count in stats.closed.items() if count} == {reason: 1}
    assert (pool.total, pool.faults()) == (0, [])


def test_what_is_being_reset_when_the_pool_is_closed_is_closed(server: LineEchoServer) -> None:
    resetting, may_end = Event(), Event()

    class Resetting(TcpConnection):
        def reset(self) -> None:
            resetting.set()
            assert may_end.wait(BOUND)

    pool = line_pool(server, Resetting)
    connection = pool.acquire()
    releasing = Attempt(pool.release, connection)
    assert resetting.is_set()
    pool.close()
    assert connection.is_connected()
    may_end.set()
    assert releasing.result() is None
    server.wait_open(0)
    assert pool.stats().closed["closed"] == 1


def test_what_the_reaper_looks_at_when_the_pool_is_closed_is_closed(server: LineEchoServer) -> None:
    asked, may_say = Event(), Event()

    class SlowToSay(TcpConnection):
        def is_expired(self) -> bool:
            asked.set()
            assert may_say.wait(BOUND)
            return False

    pool = line_pool(server, SlowToSay, initial_connections=2)
    reaping = Attempt(pool.drop_expired)
    assert asked.is_set()
    pool.close()
    assert (pool.size, server.open) == (1, 1)
    may_say.set()
    assert reaping.result() is None
    server.wait_open(0)
    gevent.sleep(0)
    assert (pool.total, pool.stats().closed["closed"]) == (0, 2)


# Waiters


@pytest.mark.parametrize("name", ["orders", None])
def test_whoever_waits_is_told_that_the_pool_was_closed(server: LineEchoServer, name: str | None) -> None:
    pool = line_pool(server, max_connections=1, name=name, acquire_timeout=1000)
    held = pool.acquire()

    def by_with(**timeout: Any) -> None:
        with pool.connection(**timeout):
            pass

    waiters = [
        Attempt(pool.acquire),
        Attempt(pool.acquire, timeout=None),
        Attempt(pool.acquire, timeout=1000),
        Attempt(pool.acquire, retry=1000),
        Attempt(by_with),
        Attempt(by_with, timeout=1000),
    ]
    assert pool.waiting == len(waiters)
    pool.close()
    assert pool.waiting == 0
    for waiter in waiters:
        error = waiter.result()
        assert isinstance(error, PoolClosedError)
        assert not isinstance(error, PoolExhaustedError)
        assert isinstance(error, PoolError)
        assert ("'orders'" if name else "Pool of TcpConnection") in str(error)
        assert "closed" in str(error)
    assert pool.stats().exhausted == 0
    pool.release(held)


def test_a_waiter_who_was_granted_a_connection_before_the_close_may_use_it(server: LineEchoServer) -> None:
    pool = line_pool(server, max_connections=1)
    held = pool.acquire()
    waiter = Attempt(pool.acquire, timeout=None)
    pool.release(held)
    pool.close()  # before he ran
    assert waiter.result() is held
    assert ask(held, "mine") == "mine"
    pool.release(held)
    server.wait_open(0)


def test_a_waiter_whose_granted_connection_is_dropped_after_the_close_is_told_so(server: LineEchoServer) -> None:
    pool = line_pool(server, max_connections=1)
    held = pool.acquire()
    waiter = Attempt(pool.acquire, timeout=None)
    dropping = gevent.spawn(pool.drop, held)  # runs before the waiter, who is woken after it
    pool.release(held)
    pool.close()
    assert isinstance(waiter.result(), PoolClosedError)
    dropping.get(timeout=BOUND)
    server.wait_open(0)
    assert (pool.total, pool.faults()) == (0, [])


def test_a_waiter_who_was_killed_with_a_grant_in_his_hand_leaves_nothing_open(server: LineEchoServer) -> None:
    pool = line_pool(server, max_connections=1)
    held = pool.acquire()
    waiter = Attempt(pool.acquire, timeout=None)
    waiter.greenlet.kill(block=False)
    pool.release(held)
    pool.close()
    server.wait_open(0)
    assert (pool.total, pool.stats().acquired) == (0, 1)


# Dials


def test_dials_that_end_later_are_closed(dials: Dials) -> None:
    pool = dials.pool()
    borrowers = [Attempt(pool.acquire, timeout=None) for _ in range(2)]
    dials.wait(2)
    with nobody_else_runs():
        pool.close()  # nothing idles, so there is nothing to wait for
    for borrower in borrowers:
        assert isinstance(borrower.result(), PoolClosedError)
    assert pool.stats().opening == 2
    for dial in dials:
        dial.go_on()
    dials.server.wait_open(0)
    gevent.sleep(0)
    stats = pool.stats()
    assert (stats.opened, stats.closed["closed"], stats.acquired, stats.size) == (2, 2, 0, 0)
    assert pool.total == 0


def test_a_dial_that_fails_after_the_close_is_logged_once(dials: Dials, logged: Logged) -> None:
    pool = dials.pool(name="orders")
    borrower = Attempt(pool.acquire, timeout=None)
    dials.wait(1)
    pool.close()
    assert isinstance(borrower.result(), PoolClosedError)
    dials[0].go_on(OSError("too late"))
    [record] = logged.take(1)
    assert "'orders'" in record.getMessage()
    assert "too late" in record.getMessage()
    assert (pool.total, pool.stats().open_failures) == (0, 1)


def test_a_closed_pool_dials_no_more(dials: Dials) -> None:
    pool = dials.pool(max_connections=5, max_connecting=1)
    borrowers = [Attempt(pool.acquire, timeout=None) for _ in range(3)]
    dials.wait(1)
    pool.close()
    dials[0].go_on()
    for borrower in borrowers:
        assert isinstance(borrower.result(), PoolClosedError)
    dials.server.wait_open(0)
    dials.wait(1)
    assert dials.server.accepted == 1


# Afterwards


def test_nothing_can_be_borrowed_from_a_closed_pool_and_nothing_is_waited_for(server: LineEchoServer) -> None:
    pool = line_pool(server, initial_connections=1, max_connections=1, name="orders", acquire_timeout=1000)
    pool.close()
    with nobody_else_runs():
        for options in ({}, {"timeout": None}, {"timeout": 0}, {"timeout": 1000}):
            with pytest.raises(PoolClosedError, match="'orders' is closed"):
                pool.acquire(**options)
            with pytest.raises(PoolClosedError, match="'orders' is closed"), pool.connection(**options):
                pass
        with pytest.raises(PoolClosedError):
            pool.acquire(0)
    stats = pool.stats()
    assert (stats.acquired, stats.exhausted, stats.opened) == (0, 0, 1)
    assert server.accepted == 1


def test_what_is_asked_of_a_closed_pool_beside_that_is_answered(server: LineEchoServer) -> None:
    pool = line_pool(server, initial_connections=1)
    connection = pool.acquire()
    pool.release(connection)
    pool.close()
    pool.drop_expired()
    for forget in (pool.release, pool.drop):
        with pytest.raises(ConnectionNotFoundError):
            forget(connection)
    assert (pool.size, pool.idle, pool.in_use, pool.waiting) == (0, 0, 0, 0)
    assert pool.stats().closed["closed"] == 1


# The pool as a block


def test_a_pool_is_closed_at_the_end_of_its_block(server: LineEchoServer) -> None:
    pool = line_pool(server, initial_connections=2)
    with pool as the_same:
        assert the_same is pool
        with pool.connection() as connection:
            assert ask(connection, "open") == "open"
        assert not pool.closed
    assert pool.closed
    assert not connection.is_connected()
    server.wait_open(0)


@pytest.mark.parametrize("error", [ValueError(), gevent.GreenletExit(), gevent.Timeout()], ids=shown)
def test_a_pool_is_closed_too_when_its_block_fails_and_the_error_goes_on(
    server: LineEchoServer, error: BaseException
) -> None:
    with pytest.raises(type(error)) as raised, line_pool(server, initial_connections=2) as pool:
        raise error
    assert raised.value is error
    assert pool.closed
    server.wait_open(0)


def test_a_pool_may_be_closed_inside_its_block(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=1) as pool:
        pool.close()
        with pytest.raises(PoolClosedError):
            pool.acquire()


def test_who_waits_when_the_block_of_the_pool_ends_is_told(server: LineEchoServer, crashed: Crashed) -> None:
    with line_pool(server, max_connections=1) as pool:
        held = pool.acquire()
        waiter = gevent.spawn(pool.acquire, timeout=None)
        gevent.sleep(0)
    waiter.join(BOUND)
    assert [type(error) for error in crashed.take()] == [PoolClosedError]
    pool.release(held)


def test_a_closed_pool_leaves_no_greenlet_of_its_upkeep(server: LineEchoServer) -> None:
    """That no greenlet is left is asked after every test; here, that close() itself waits for none of them."""
    pool = line_pool(server, check_after_idle=1000, reap_interval=1000)
    gevent.sleep(0)  # so that both are asleep for a thousand seconds
    with nobody_else_runs():
        pool.close()
