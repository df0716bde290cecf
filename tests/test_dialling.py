"""When an acquire dials, when it waits, when it gives up; and whom a dial serves in the end."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent.event import Event
from gevent.lock import Semaphore

from gsocketpool import Pool, PoolClosedError, PoolError, PoolExhaustedError, TcpConnection
from tests.conftest import Crashed, Logged
from tests.dials import BOUND, Attempt, Dials, Held, nobody_else_runs
from tests.servers import LineEchoServer, Server, refused_port, swallow


@pytest.fixture
def server() -> Iterator[LineEchoServer]:
    with LineEchoServer() as server:
        yield server


@pytest.fixture
def dials(server: LineEchoServer) -> Dials:
    return Dials(server)


def line_pool(server: Server, kind: type[TcpConnection] = TcpConnection, **options: Any) -> Pool[TcpConnection]:
    return Pool(kind, {"host": "127.0.0.1", "port": server.port}, **options)


# How long an acquire takes: timeout=None


@pytest.mark.parametrize("options", [{}, {"acquire_timeout": 0.0}, {"acquire_timeout": 0.01}])
def test_without_a_limit_an_acquire_waits_until_it_is_served(server: LineEchoServer, options: dict[str, Any]) -> None:
    with line_pool(server, max_connections=1, **options) as pool:
        held = pool.acquire(timeout=None)
        patient = Attempt(pool.acquire, retry=0, timeout=None)
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0.05)
        assert not patient.ready()
        pool.release(held)
        assert patient.result() is held
        pool.release(held)


def test_without_a_limit_a_dial_is_waited_for(dials: Dials) -> None:
    with dials.pool(max_connections=2, acquire_timeout=0.0) as pool:
        patient = Attempt(pool.acquire, timeout=None)
        dials.wait(1)
        impatient = Attempt(pool.acquire, timeout=0.02)
        assert isinstance(impatient.result(), PoolExhaustedError)
        assert not patient.ready()
        dials[0].go_on()
        assert patient.result() is dials[0]
        dials.wait(2)
        dials[1].go_on()
        pool.release(dials[0])


# timeout=0

AT_ONCE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "timeout=0": ({}, {"timeout": 0}),
    "timeout=0.0": ({"acquire_timeout": 5}, {"timeout": 0.0}),
    "acquire_timeout=0": ({"acquire_timeout": 0}, {}),
}


@pytest.mark.parametrize("how", AT_ONCE)
@pytest.mark.parametrize("order", ["lifo", "fifo"])
@pytest.mark.parametrize("check_after_idle", [0, 0.5, None])
@pytest.mark.parametrize("cold", [False, True])
def test_with_no_time_what_idles_is_lent_and_nobody_else_runs(
    server: LineEchoServer, how: str, order: str, check_after_idle: float | None, cold: bool
) -> None:
    settings, timeout = AT_ONCE[how]
    with line_pool(server, initial_connections=1, order=order, check_after_idle=check_after_idle, **settings) as pool:
        if cold:
            pool.cool(0.0)
        with nobody_else_runs():
            connection = pool.acquire(**timeout)
            pool.release(connection)
            with pool.connection(**timeout) as again:
                assert again is connection


@pytest.mark.parametrize("how", AT_ONCE)
def test_with_no_time_nothing_is_dialled_though_there_is_room(server: LineEchoServer, how: str) -> None:
    settings, timeout = AT_ONCE[how]
    with line_pool(server, **settings) as pool:
        with nobody_else_runs():
            with pytest.raises(PoolExhaustedError):
                pool.acquire(**timeout)
            with pytest.raises(PoolExhaustedError), pool.connection(**timeout):
                pass
        stats = pool.stats()
        assert (stats.opening, stats.waiting, stats.exhausted) == (0, 0, 2)
        gevent.sleep(0)
        assert (pool.total, server.accepted) == (0, 0)


@pytest.mark.parametrize("how", AT_ONCE)
def test_with_no_time_a_full_pool_raises_and_nobody_else_runs(server: LineEchoServer, how: str) -> None:
    settings, timeout = AT_ONCE[how]
    with line_pool(server, max_connections=1, initial_connections=1, **settings) as pool, pool.connection():
        with nobody_else_runs(), pytest.raises(PoolExhaustedError):
            pool.acquire(**timeout)
        assert pool.waiting == 0


@pytest.mark.parametrize("healthy", [0, 1])
def test_with_no_time_what_idles_dead_is_passed_over_and_nobody_else_runs(server: LineEchoServer, healthy: int) -> None:
    with line_pool(server, initial_connections=3, check_after_idle=0) as pool:
        connections = [pool.acquire() for _ in range(3)]
        for connection in connections:
            pool.release(connection)
        for connection in connections[healthy:]:
            connection.socket.shutdown(2)
        with nobody_else_runs():
            if healthy:
                assert pool.acquire(timeout=0) is connections[0]
            else:
                with pytest.raises(PoolExhaustedError):
                    pool.acquire(timeout=0)
        assert pool.stats().closed["stale"] == 3 - healthy
        if healthy:
            pool.release(connections[0])


# A number of seconds


def bounded(how: str, dials: Dials, **options: Any) -> tuple[Pool[Held], Callable[[], object]]:
    """A pool, and an acquire with very little time."""
    pool = dials.pool(**options, acquire_timeout=0.02 if how == "acquire_timeout" else 1000)

    def by_with(**timeout: float) -> None:
        with pool.connection(**timeout):
            pass

    ways: dict[str, Callable[[], object]] = {
        "timeout": lambda: pool.acquire(timeout=0.02),
        "acquire_timeout": pool.acquire,
        "connection": lambda: by_with(timeout=0.02),
    }
    return pool, ways[how]


@pytest.mark.parametrize("how", ["timeout", "acquire_timeout", "connection"])
def test_g7_the_time_for_an_acquire_covers_its_dial_which_is_left_alone(dials: Dials, how: str) -> None:
    pool, acquire = bounded(how, dials)
    with pool:
        with pytest.raises(PoolExhaustedError) as raised:
            acquire()
        assert raised.value.waited >= 0.02
        assert raised.value.stats is not None
        assert (raised.value.stats.opening, raised.value.stats.waiting) == (1, 0)
        dials.wait(1)
        dials[0].go_on()
        assert (pool.idle, pool.stats().opened) == (1, 1)
        with pool.connection() as connection:
            assert connection is dials[0]
        dials.wait(1)


@pytest.mark.parametrize("how", ["timeout", "acquire_timeout", "connection"])
def test_g7_the_time_for_an_acquire_covers_the_wait_for_a_place(dials: Dials, how: str) -> None:
    pool, acquire = bounded(how, dials, max_connections=1)
    with pool:
        holder = Attempt(pool.acquire, timeout=None)
        dials.wait(1)
        dials[0].go_on()
        held = holder.result()
        with pytest.raises(PoolExhaustedError) as raised:
            acquire()
        assert raised.value.waited >= 0.02
        pool.release(held)


def test_g7_a_check_that_takes_all_the_time_leaves_none_to_dial(dials: Dials) -> None:
    checking, may_answer = Event(), Event()

    class SlowToCheck(Held):
        def check(self) -> bool:
            checking.set()
            assert may_answer.wait(BOUND)
            return False

    with Pool(SlowToCheck, {"dials": dials}, max_connections=1, check_after_idle=0) as pool:
        first = Attempt(pool.acquire, timeout=None)
        dials.wait(1)
        dials[0].go_on()
        pool.release(first.result())
        borrower = Attempt(pool.acquire, timeout=0.02)
        assert checking.is_set()
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0.03)  # begun later than the borrower, and with more time
        may_answer.set()
        error = borrower.result()
        assert isinstance(error, PoolExhaustedError)
        assert error.waited >= 0.02
        dials.wait(1)


def test_a_limit_of_its_own_outdoes_that_of_the_pool(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1, acquire_timeout=1000) as pool, pool.connection():
        with pytest.raises(PoolExhaustedError) as raised:
            pool.acquire(timeout=0.01)
        assert raised.value.waited >= 0.01


def test_where_the_pool_has_a_limit_retries_mean_nothing(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1, acquire_timeout=1000) as pool:
        held = pool.acquire()
        waiter = Attempt(pool.acquire, 0)
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0.01)
        assert not waiter.ready()
        pool.release(held)
        assert waiter.result() is held
        pool.release(held)


# The rule of 0.1.6


def test_by_the_rule_of_0_1_6_a_dial_may_take_longer_than_the_wait_for_a_place(dials: Dials) -> None:
    with dials.pool() as pool:
        borrower = Attempt(pool.acquire, 1)
        dials.wait(1)
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0.15)  # begun later than the borrower's tenth of a second, and it ends later
        assert not borrower.ready()
        dials[0].go_on()
        assert borrower.result() is dials[0]
        dials.wait(2)
        dials[1].go_on()
        pool.release(dials[0])


def test_by_the_rule_of_0_1_6_a_dial_may_take_longer_than_the_default_second(dials: Dials) -> None:
    with dials.pool(max_connections=2) as pool:
        borrower = Attempt(pool.acquire)
        dials.wait(1)
        clock = Attempt(pool.acquire, timeout=1.05)
        assert isinstance(clock.result(), PoolExhaustedError)
        assert not borrower.ready()
        dials[0].go_on()
        assert borrower.result() is dials[0]
        dials.wait(2)
        dials[1].go_on()
        pool.release(dials[0])


def test_by_the_rule_of_0_1_6_no_retries_are_time_enough_to_dial_where_there_is_room(dials: Dials) -> None:
    with dials.pool(max_connections=2) as pool:
        first, second = Attempt(pool.acquire, retry=0), Attempt(pool.acquire, retry=3, retried=7)
        dials.wait(2)
        third = Attempt(pool.acquire, retry=0)
        assert isinstance(third.result(), PoolExhaustedError)  # those two have the places
        for dial in dials:
            dial.go_on()
        assert {id(first.result()), id(second.result())} == {id(dial) for dial in dials}
        with nobody_else_runs(), pytest.raises(PoolExhaustedError):
            pool.acquire(retry=0)
        for dial in dials:
            pool.release(dial)


def test_by_the_rule_of_0_1_6_who_has_a_place_may_also_wait_for_others_to_dial_first(dials: Dials) -> None:
    with dials.pool(max_connections=3, max_connecting=1) as pool:
        borrowers = [Attempt(pool.acquire, retry=0) for _ in range(4)]
        assert isinstance(borrowers.pop().result(), PoolExhaustedError)
        for number, borrower in enumerate(borrowers):
            dials.wait(number + 1)
            assert not borrower.ready()
            dials[number].go_on()
            assert borrower.result() is dials[number]
        for dial in dials:
            pool.release(dial)


def test_by_the_rule_of_0_1_6_who_waited_for_a_place_and_got_one_may_dial_as_long_as_it_takes(dials: Dials) -> None:
    with dials.pool(max_connections=1) as pool:
        holder = Attempt(pool.acquire)
        dials.wait(1)
        dials[0].go_on()
        held = holder.result()
        borrower = Attempt(pool.acquire, retry=4)
        pool.drop(held)
        dials.wait(2)
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0.45)
        assert not borrower.ready()
        dials[1].go_on()
        assert borrower.result() is dials[1]
        pool.release(dials[1])


def test_by_the_rule_of_0_1_6_a_stale_connection_costs_who_has_no_retries_nothing_where_there_is_room(
    dials: Dials,
) -> None:
    with dials.pool(max_connections=2, check_after_idle=0) as pool:
        first = Attempt(pool.acquire)
        dials.wait(1)
        dials[0].go_on()
        pool.release(first.result())
        dials[0].socket.shutdown(2)
        second = Attempt(pool.acquire, retry=0)
        dials.wait(2)
        dials[1].go_on()
        assert second.result() is dials[1]
        pool.release(dials[1])


# Dials are the pool's own


@pytest.mark.parametrize("interruption", [gevent.GreenletExit(), gevent.Timeout(), RuntimeError("odd")])
def test_a_borrower_who_is_interrupted_leaves_his_dial_to_the_next(
    dials: Dials, interruption: BaseException, crashed: Crashed
) -> None:
    with dials.pool(max_connections=1) as pool:
        borrower = Attempt(pool.acquire)
        dials.wait(1)
        borrower.greenlet.kill(interruption)
        assert crashed.take() in ([], [interruption])
        assert (pool.waiting, pool.stats().opening) == (0, 1)
        following = Attempt(pool.acquire, timeout=None)
        dials[0].go_on()
        assert following.result() is dials[0]
        dials.wait(1)
        assert pool.stats().acquired == 1
        pool.release(dials[0])


def test_a_dial_that_nobody_waits_for_any_more_serves_who_waits_now(dials: Dials) -> None:
    with dials.pool(max_connections=1) as pool:
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0.01)
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(2)]
        dials.wait(1)
        dials[0].go_on()
        assert waiters[0].result() is dials[0]
        assert not waiters[1].ready()
        pool.release(dials[0])
        assert waiters[1].result() is dials[0]
        pool.release(dials[0])


def test_a_waiter_takes_what_is_given_back_if_that_comes_before_his_dial(dials: Dials) -> None:
    with dials.pool(max_connections=2) as pool:
        holder = Attempt(pool.acquire)
        dials.wait(1)
        dials[0].go_on()
        held = holder.result()
        waiter = Attempt(pool.acquire, timeout=None)
        dials.wait(2)
        pool.release(held)
        assert waiter.result() is held
        dials[1].go_on()
        assert (pool.idle, pool.in_use, pool.waiting) == (1, 1, 0)
        pool.release(held)


def test_a_waiter_takes_what_is_newly_opened_if_that_comes_before_anything_is_given_back(dials: Dials) -> None:
    with dials.pool(max_connections=2) as pool:
        holder = Attempt(pool.acquire)
        dials.wait(1)
        dials[0].go_on()
        held = holder.result()
        waiter = Attempt(pool.acquire, timeout=None)
        dials.wait(2)
        dials[1].go_on()
        assert waiter.result() is dials[1]
        pool.release(held)
        pool.release(dials[1])


def test_g5_the_dial_that_ends_first_serves_the_waiter_who_came_first(dials: Dials) -> None:
    with dials.pool() as pool:
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(3)]
        dials.wait(3)
        for number, ends in enumerate([2, 0, 1]):
            dials[ends].go_on()
            assert waiters[number].result() is dials[ends]
        for dial in dials:
            pool.release(dial)


# Dials that fail


def test_the_error_of_a_dial_is_raised_in_the_borrower_for_whom_it_was_made_and_in_nobody_else(dials: Dials) -> None:
    with dials.pool() as pool:
        borrowers = [Attempt(pool.acquire, timeout=None) for _ in range(3)]
        dials.wait(3)
        error = OSError("this one's")
        dials[1].go_on(error)
        assert borrowers[1].result() is error
        gevent.sleep(0)
        assert not borrowers[0].ready()
        assert not borrowers[2].ready()
        dials[0].go_on()
        dials[2].go_on()
        assert [borrowers[0].result(), borrowers[2].result()] == [dials[0], dials[2]]
        stats = pool.stats()
        assert (stats.open_failures, stats.opened, stats.exhausted) == (1, 2, 0)
        pool.release(dials[0])
        pool.release(dials[2])


def test_a_dial_that_fails_hands_its_place_to_the_next_in_the_queue(dials: Dials) -> None:
    with dials.pool(max_connections=1) as pool:
        unlucky, lucky = Attempt(pool.acquire, timeout=None), Attempt(pool.acquire, timeout=None)
        dials.wait(1)
        dials[0].go_on(OSError("no"))
        assert isinstance(unlucky.result(), OSError)
        dials.wait(2)
        dials[1].go_on()
        assert lucky.result() is dials[1]
        pool.release(dials[1])


def test_a_dial_that_fails_after_its_borrower_was_served_is_logged_and_raised_in_nobody(
    dials: Dials, logged: Logged
) -> None:
    with dials.pool(max_connections=2, name="orders") as pool:
        holder = Attempt(pool.acquire)
        dials.wait(1)
        dials[0].go_on()
        first, second = Attempt(pool.acquire, timeout=None), Attempt(pool.acquire, timeout=None)
        dials.wait(2)
        pool.release(holder.result())
        assert first.result() is dials[0]
        dials[1].go_on(OSError("too late to matter"))
        [record] = logged.take(1)
        assert "'orders'" in record.getMessage()
        assert "too late to matter" in record.getMessage()
        dials.wait(3)  # for the second one, to whom the first one's dial had been left
        assert not second.ready()
        dials[2].go_on()
        assert second.result() is dials[2]
        pool.release(dials[0])
        pool.release(dials[2])


def test_who_gave_his_dial_to_somebody_before_him_dials_anew_when_the_other_dial_fails(
    dials: Dials, logged: Logged
) -> None:
    with dials.pool(max_connections=2) as pool:
        first, second = Attempt(pool.acquire, timeout=None), Attempt(pool.acquire, timeout=None)
        dials.wait(2)
        dials[1].go_on()
        assert first.result() is dials[1]
        dials[0].go_on(OSError("for the first one, who needs it no more"))
        assert len(logged.take()) == 1
        dials.wait(3)
        assert not second.ready()
        dials[2].go_on()
        assert second.result() is dials[2]
        pool.release(dials[1])
        pool.release(dials[2])


@pytest.mark.parametrize("somebody_waits", [True, False])
def test_the_last_connect_error_is_told_to_who_finds_no_connection(
    dials: Dials, logged: Logged, somebody_waits: bool
) -> None:
    error = ConnectionRefusedError("the database is away")
    with dials.pool(max_connections=1) as pool:
        with pytest.raises(PoolExhaustedError) as raised:
            pool.acquire(timeout=0)
        assert raised.value.last_error is None
        assert "connect error" not in str(raised.value)

        borrower = Attempt(pool.acquire, timeout=None if somebody_waits else 0.01)
        dials.wait(1)
        if not somebody_waits:
            assert isinstance(borrower.result(), PoolExhaustedError)
        dials[0].go_on(error)
        assert (borrower.result() is error) is somebody_waits
        assert len(logged.take()) == (0 if somebody_waits else 1)

        with pytest.raises(PoolExhaustedError, match="ConnectionRefusedError.*the database is away") as raised:
            pool.acquire(timeout=0)
        # One like it, without the frames in which it was raised.
        assert repr(raised.value.last_error) == repr(error)
        assert raised.value.last_error is not error


def test_a_real_refusal_is_raised_as_it_is_and_kept() -> None:
    with Pool(TcpConnection, {"host": "127.0.0.1", "port": refused_port()}, max_connections=1) as pool:
        with pytest.raises(ConnectionRefusedError) as refused:
            pool.acquire()
        with pytest.raises(PoolExhaustedError) as raised:
            pool.acquire(timeout=0)
        kept = raised.value.last_error
        assert isinstance(kept, ConnectionRefusedError)
        assert (kept.args, kept.errno, kept.__traceback__) == (refused.value.args, refused.value.errno, None)
        assert pool.total == 0


def test_g9_a_pool_whose_last_dial_failed_is_collected_at_once() -> None:
    pool: Pool[TcpConnection] = Pool(TcpConnection, {"host": "127.0.0.1", "port": refused_port()}, max_connections=1)
    gc.disable()
    try:
        with pytest.raises(ConnectionRefusedError):
            pool.acquire()
        gone = weakref.ref(pool)
        del pool
        with gevent.Timeout(BOUND):
            while gone() is not None:  # what was woken holds it until it has run
                gevent.sleep(0)
    finally:
        gc.enable()


# max_connecting


class Receptionist(Server):
    """Greets its clients, each when the test says so, and counts those that wait for it."""

    def __init__(self) -> None:
        super().__init__(self._receive)
        self.may_greet = Semaphore(0)
        self.standing = 0
        self.most_standing = 0

    def _receive(self, sock: Any) -> None:
        self.standing += 1
        self.most_standing = max(self.most_standing, self.standing)
        self.may_greet.acquire()
        self.standing -= 1
        sock.sendall(b"hello\n")
        swallow(sock)


class Guest(TcpConnection):
    def open(self) -> None:
        super().open()
        self.recv_until(b"\n")


@pytest.mark.parametrize(("options", "at_once"), [({}, 8), ({"max_connecting": 3}, 3), ({"max_connecting": 1}, 1)])
def test_no_more_dials_than_max_connecting_run_at_once_as_the_server_sees_them(
    options: dict[str, int], at_once: int
) -> None:
    with Receptionist() as server, line_pool(server, Guest, max_connections=12, **options) as pool:
        borrowers = [Attempt(pool.acquire, timeout=None) for _ in range(12)]
        for served in range(12):
            server.wait_accepted(min(served + at_once, 12))
            assert pool.stats().opening == min(at_once, 12 - served)
            server.may_greet.release()
            borrowers[served].result()
        assert (server.most_standing, server.accepted) == (at_once, 12)
        for borrower in borrowers:
            pool.release(borrower.result())


def test_waiters_beyond_max_connecting_are_served_by_what_is_given_back_too(dials: Dials) -> None:
    with dials.pool(max_connections=10, max_connecting=1) as pool:
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(3)]
        dials.wait(1)
        dials[0].go_on()
        pool.release(waiters[0].result())
        assert waiters[1].result() is dials[0]
        pool.release(dials[0])
        assert waiters[2].result() is dials[0]
        dials.wait(2)  # begun for who is served by now; it goes idle
        dials[1].go_on()
        pool.release(dials[0])
        assert pool.idle == 2
        dials.wait(2)


# max_waiting


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_more_waiters_than_max_waiting_fail_at_once(server: LineEchoServer, limit: int) -> None:
    with line_pool(server, max_connections=1, initial_connections=1, max_waiting=limit) as pool:
        held = pool.acquire()
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(limit)]
        assert pool.waiting == limit
        for timeout in (None, 1000, 0):
            with (
                nobody_else_runs(),
                pytest.raises(
                    PoolExhaustedError, match=rf"{limit} others waiting; as many wait as max_waiting={limit} allows"
                ),
            ):
                pool.acquire(timeout=timeout)
        with nobody_else_runs(), pytest.raises(PoolExhaustedError), pool.connection():
            pass
        assert (pool.stats().exhausted, pool.waiting) == (4, limit)
        pool.release(held)
        for waiter in waiters:
            assert waiter.result() is held
            pool.release(held)
        with pool.connection() as connection:
            assert connection is held


def test_who_leaves_the_queue_makes_room_in_it(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1, max_waiting=1) as pool:
        held = pool.acquire()
        with pytest.raises(PoolExhaustedError) as raised:
            pool.acquire(timeout=0.01)
        assert raised.value.waited >= 0.01
        killed = Attempt(pool.acquire, timeout=None)
        killed.greenlet.kill()
        waiter = Attempt(pool.acquire, timeout=None)
        assert pool.waiting == 1
        pool.release(held)
        assert waiter.result() is held
        pool.release(held)


@pytest.mark.parametrize("limit", [0, 2])
def test_waiters_for_whom_there_is_room_to_dial_do_not_count(dials: Dials, limit: int) -> None:
    with dials.pool(max_connections=3, max_connecting=1, max_waiting=limit) as pool:
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(3 + limit)]
        assert pool.waiting == 3 + limit
        with pytest.raises(PoolExhaustedError, match=f"max_waiting={limit}"):
            pool.acquire(timeout=None)
        for number in range(3):
            dials.wait(number + 1)
            dials[number].go_on()
            assert waiters[number].result() is dials[number]
        for waiter in waiters[3:]:
            pool.release(dials[0])
            assert waiter.result() is dials[0]
        for dial in dials:
            pool.release(dial)


# Many


def test_g5_a_thousand_greenlets_are_served_by_ten_connections_in_the_order_in_which_they_came(
    server: LineEchoServer,
) -> None:
    came: list[int] = []
    served: list[int] = []
    using = most = 0

    def borrow(number: int) -> None:
        nonlocal using, most
        came.append(number)
        with pool.connection(timeout=None) as connection:
            served.append(number)
            using += 1
            most = max(most, using)
            connection.send(b"%d\n" % number)
            assert connection.recv_until(b"\n") == b"%d" % number
            using -= 1

    with line_pool(server, max_connections=10) as pool:
        greenlets = [gevent.spawn(borrow, number) for number in range(1000)]
        gevent.joinall(greenlets, timeout=4 * BOUND, raise_error=True)
        assert len(served) == 1000
        assert served == came
        assert (most, server.most, server.accepted) == (10, 10, 10)
        stats = pool.stats()
        assert (stats.acquired, stats.opened, stats.idle, stats.waiting) == (1000, 10, 10, 0)


# Initial connections


def test_initial_connections_are_opened_side_by_side() -> None:
    with Receptionist() as server:
        maker = Attempt(line_pool, server, Guest, initial_connections=8)
        server.wait_accepted(8)  # before any of them is open
        assert not maker.ready()
        for _ in range(8):
            server.may_greet.release()
        with maker.result() as pool:
            stats = pool.stats()
            assert (stats.idle, stats.opened, stats.opening, stats.acquired) == (8, 8, 0, 0)
            assert server.accepted == 8


def test_initial_connections_too_are_opened_no_more_than_max_connecting_at_once() -> None:
    with Receptionist() as server:
        maker = Attempt(line_pool, server, Guest, initial_connections=5, max_connecting=2)
        for opened in range(5):
            server.wait_accepted(min(opened + 2, 5))
            server.may_greet.release()
        with maker.result() as pool:
            assert (pool.idle, server.accepted, server.most_standing) == (5, 5, 2)


def test_an_initial_connection_that_fails_closes_the_others_and_is_raised_as_it_is(dials: Dials) -> None:
    maker = Attempt(dials.pool, initial_connections=3)
    dials.wait(3)
    dials[0].go_on()
    dials.server.wait_accepted(1)
    assert dials.server.open == 1
    error = OSError("the second one")
    dials[1].go_on(error)
    assert maker.result() is error
    assert not dials[0].is_connected()
    dials[2].go_on()  # too late: it was under way when the other one failed
    dials.server.wait_open(0)
    dials.wait(3)
    assert not dials[2].is_connected()


def test_after_an_initial_connection_failed_no_more_are_begun(dials: Dials) -> None:
    maker = Attempt(dials.pool, initial_connections=10, max_connecting=2)
    dials.wait(2)
    dials[0].go_on(OSError("no"))
    assert isinstance(maker.result(), OSError)
    dials[1].go_on()
    dials.server.wait_open(0)
    dials.wait(2)


def test_a_pool_whose_making_is_interrupted_closes_what_it_opened(dials: Dials) -> None:
    maker = Attempt(dials.pool, initial_connections=2)
    dials.wait(2)
    dials[0].go_on()
    maker.greenlet.kill()
    assert isinstance(maker.result(), gevent.GreenletExit)
    dials[1].go_on()
    dials.server.wait_open(0)
    assert [dial.is_connected() for dial in dials] == [False, False]


def test_what_was_opened_at_first_is_lent_before_anything_is_dialled(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=2) as pool:
        borrowed = [pool.acquire() for _ in range(2)]
        server.wait_accepted(2)
        assert pool.stats().opened == 2
        borrowed.append(pool.acquire())
        assert pool.stats().opened == 3
        for connection in borrowed:
            pool.release(connection)


# Another thread


@pytest.mark.parametrize("room", [True, False])
def test_to_wait_in_another_thread_is_a_clear_error_that_costs_nothing(server: LineEchoServer, room: bool) -> None:
    with line_pool(server, max_connections=2 if room else 1, name="orders") as pool, pool.connection():

        def elsewhere() -> BaseException | None:
            try:
                pool.acquire(timeout=None)
            except PoolError as error:
                return error
            finally:
                gevent.get_hub().destroy(destroy_loop=True)
            return None

        error = gevent.get_hub().threadpool.apply(elsewhere)
        assert type(error) is PoolError
        assert "'orders'" in str(error)
        assert "another thread" in str(error)
        assert "make one in each" in str(error)
        assert pool.waiting == 0
        if room:
            with pool.connection(timeout=BOUND) as connection:  # the dial that was begun is of use to somebody here
                assert connection.is_connected()
        assert pool.faults() == []


# What is said when there is none


def test_the_error_says_how_many_are_in_use_waiting_and_dialling_and_how_long_this_one_waited(dials: Dials) -> None:
    with dials.pool(max_connections=3, max_connecting=1, name="orders") as pool:
        holders = [Attempt(pool.acquire, timeout=None) for _ in range(2)]
        for number in range(2):
            dials.wait(number + 1)
            dials[number].go_on()
            holders[number].result()
        others = [Attempt(pool.acquire, timeout=None) for _ in range(4)]
        dials.wait(3)
        with pytest.raises(PoolExhaustedError) as raised:
            pool.acquire(timeout=0.02)
        error = raised.value
        for fact in ("'orders'", "2 of at most 3 in use", "0 idle", "1 opening", "4 others waiting"):
            assert fact in str(error)
        assert 0.02 <= error.waited < BOUND
        said = re.search(r"after ([0-9.]+) s", str(error))
        assert said is not None
        assert float(said[1]) == pytest.approx(error.waited, abs=0.001)
        assert isinstance(error, PoolError)
        stats = error.stats
        assert stats is not None
        assert (stats.in_use, stats.opening, stats.waiting, stats.exhausted) == (2, 1, 4, 1)
        pool.close()
        assert all(isinstance(other.result(), PoolClosedError) for other in others)
        dials[2].go_on()
        for dial in dials[:2]:
            pool.release(dial)


def test_without_a_name_a_pool_is_called_after_its_factory(server: LineEchoServer) -> None:
    class Special(Pool[TcpConnection]):
        pass

    pool = Special(TcpConnection, {"host": "127.0.0.1", "port": server.port})
    with pytest.raises(PoolExhaustedError, match="Special of TcpConnection"):
        pool.acquire(timeout=0)
    pool.close()
