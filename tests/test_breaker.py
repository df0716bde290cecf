"""The breaker: after failed dials in a row nothing is dialled for a while, and one dial tries whether it is over."""

from __future__ import annotations

import gc
import random
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent.event import Event

import gsocketpool
from gsocketpool import (
    BreakerOpenError,
    Pool,
    PoolClosedError,
    PoolExhaustedError,
    PoolGroup,
    TcpConnection,
)
from tests.conftest import Logged
from tests.dials import BOUND, Attempt, Dials, Held, nobody_else_runs
from tests.knife import ASLEEP, WAKING, Knife
from tests.lines import Line
from tests.proxy import Proxy
from tests.servers import BlackHole, LineEchoServer, refused_port

#: A pause that does not end by itself while a test runs, and one that is over in no time.
LONG = (60, 60)
SHORT = (0.01, 0.01)

REFUSED = ConnectionRefusedError("refused, says the test")

#: What the pool may say of dials that fail. What it says when, and how often, has tests of its own.
EXPECTED = re.compile(r"in a row ha(ve|s) failed|a dial (for min_idle=\d+ )?failed|dials? pass")


@pytest.fixture(autouse=True)
def _logs_what_fails(logged: Logged) -> Iterator[None]:
    yield
    REFUSED.__traceback__ = None
    for record in logged.take():
        assert EXPECTED.search(record.getMessage()), record.getMessage()


@pytest.fixture
def server() -> Iterator[LineEchoServer]:
    with LineEchoServer() as server:
        yield server


@pytest.fixture
def proxy(server: LineEchoServer) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", server.port) as proxy:
        yield proxy


@pytest.fixture
def dials(server: LineEchoServer) -> Iterator[Dials]:
    dials = Dials(server)
    yield dials
    for dial in dials:
        dial.close()  # what was lent to the end


class Greeting(Line):
    """Not open before the server has answered: each dial that is made is a connection that the server counts."""

    def __init__(self, host: str, port: int, timeout: float | None = None) -> None:
        super().__init__(host, port)
        self._patience = timeout

    def open(self) -> None:
        super().open()
        try:
            with gevent.Timeout(self._patience, TimeoutError("no greeting")):
                self.ask("hello")
        except BaseException:
            self.close()
            raise


def greeting_pool(server: Any, **options: Any) -> Pool[Greeting]:
    return Pool(Greeting, {"host": "127.0.0.1", "port": server.port}, **{"breaker": 1, "backoff": LONG, **options})


def until(what: str, happened: Callable[[], object]) -> None:
    with gevent.Timeout(BOUND, AssertionError(f"{what}: it has not come to that in {BOUND:g} s")):
        while not happened():
            gevent.sleep(0.001)


def state(pool: Pool[Any]) -> str:
    return pool.stats().breaker


def half_opens(pool: Pool[Any]) -> None:
    """The pause is over by now."""
    assert state(pool) == "open"
    pool._upkeep._trial_at = monotonic()
    pool._upkeep.hurry(pool, 0.0)
    until("the breaker half-opens", lambda: state(pool) != "open")


def fail(pool: Pool[Held], dials: Dials, count: int = 1) -> None:
    """So many borrowers dial one after the other, each in vain."""
    for _ in range(count):
        begun = len(dials)
        borrower = Attempt(pool.acquire, timeout=BOUND)
        dials.wait(begun + 1)
        dials[-1].go_on(REFUSED)
        assert borrower.result() is REFUSED


def serve(pool: Pool[Held], dials: Dials) -> Held:
    """Somebody borrows by a dial that succeeds."""
    begun = len(dials)
    borrower = Attempt(pool.acquire, timeout=BOUND)
    dials.wait(begun + 1)
    dials[-1].go_on()
    connection = borrower.result()
    assert isinstance(connection, Held)
    return connection


def lends(pool: Pool[Any]) -> bool:
    """Whether somebody who asks now is served."""
    try:
        with pool.connection(timeout=BOUND):
            return True
    except (OSError, BreakerOpenError):
        return False


def broken(attempt: Attempt) -> BreakerOpenError:
    error = attempt.result()
    assert isinstance(error, BreakerOpenError), error
    return error


def is_sound(pool: Pool[Any]) -> bool:
    return pool.faults() == []


def discard(pool: Pool[Any], connection: Any) -> None:
    """Give it back in the middle of an error."""
    try:
        raise ValueError
    except ValueError:
        pool.release(connection)


# It opens


@pytest.mark.parametrize("breaker", [1, 2, 5])
def test_it_opens_after_exactly_so_many_failures_in_a_row_as_the_server_counts(proxy: Proxy, breaker: int) -> None:
    proxy.reset()
    with greeting_pool(proxy, breaker=breaker) as pool:
        for number in range(breaker):
            assert state(pool) == "closed"
            error = Attempt(pool.acquire, timeout=BOUND).result()
            assert isinstance(error, OSError), f"dial {number + 1}: {error!r}"
        assert state(pool) == "open"
        for _ in range(20):
            broken(Attempt(pool.acquire, timeout=BOUND))
        assert proxy.accepted == breaker
        assert (pool.stats().open_failures, pool.stats().exhausted) == (breaker, 20)
        assert is_sound(pool)


def test_without_a_breaker_everybody_dials(proxy: Proxy) -> None:
    proxy.reset()
    with greeting_pool(proxy, breaker=None) as pool:
        for _ in range(30):
            assert isinstance(Attempt(pool.acquire, timeout=BOUND).result(), OSError)
        assert (proxy.accepted, state(pool)) == (30, "closed")


def test_a_success_in_between_begins_the_count_anew(dials: Dials) -> None:
    with dials.pool(breaker=3, backoff=LONG) as pool:
        for _ in range(4):
            fail(pool, dials, 2)
            pool.drop(serve(pool, dials))
            assert state(pool) == "closed"
        fail(pool, dials, 3)
        assert state(pool) == "open"


def test_dials_that_fail_side_by_side_all_count(dials: Dials) -> None:
    with dials.pool(breaker=5, max_connecting=8, backoff=LONG) as pool:
        borrowers = [Attempt(pool.acquire, timeout=BOUND) for _ in range(20)]
        dials.wait(8)
        for number in range(4):
            dials[number].go_on(REFUSED)
        dials.wait(12)  # those who still wait are dialled for
        dials[4].go_on(REFUSED)
        assert state(pool) == "open"
        for borrower in borrowers[12:]:  # for whom no dial is under way
            assert broken(borrower).failures == 5
        for number in range(5, 12):
            dials[number].go_on(REFUSED)
        dials.wait(12)
        assert [borrower.result() for borrower in borrowers[:12]] == [REFUSED] * 12
        assert broken(Attempt(pool.acquire)).failures == 12
        assert is_sound(pool)


def test_with_one_dial_at_a_time_those_behind_it_are_told_by_the_last_failure(dials: Dials) -> None:
    with dials.pool(breaker=3, max_connecting=1, backoff=LONG) as pool:
        borrowers = [Attempt(pool.acquire, timeout=None) for _ in range(8)]
        for number in range(3):
            dials.wait(number + 1)
            dials[-1].go_on(REFUSED)
        results = [borrower.result() for borrower in borrowers]
        assert results[:3] == [REFUSED] * 3
        assert [type(result) for result in results[3:]] == [BreakerOpenError] * 5
        dials.wait(3)
        assert pool.stats().exhausted == 5


def test_dials_that_nobody_waits_for_any_more_count_too(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        assert isinstance(Attempt(pool.acquire, timeout=0.001).result(), PoolExhaustedError)
        dials[0].go_on(REFUSED)
        assert state(pool) == "open"


def test_a_killed_dial_counts_as_a_failed_one_and_loses_no_slot(dials: Dials, server: LineEchoServer) -> None:
    with dials.pool(breaker=2, max_connections=1, backoff=LONG) as pool:
        for number in range(2):
            borrower = Attempt(pool.acquire, timeout=BOUND)
            dials.wait(number + 1)
            (dial,) = pool._talking
            dial.kill()  # type: ignore[attr-defined]
            assert "killed" in str(borrower.result())
        assert state(pool) == "open"
        half_opens(pool)
        pool.release(serve(pool, dials))


def test_whatever_makes_the_factory_fail_counts(logged: Logged) -> None:
    class Wrong(TcpConnection):
        def __init__(self) -> None:
            raise KeyError("no such option")

    with Pool(Wrong, breaker=2, backoff=LONG) as pool:
        assert [type(Attempt(pool.acquire).result()) for _ in range(3)] == [KeyError, KeyError, BreakerOpenError]


def test_a_dial_that_could_not_even_begin_is_no_failure_of_the_server(server: LineEchoServer) -> None:
    with greeting_pool(server) as pool:

        def deeper() -> bool:
            try:
                if deeper():
                    return True
            except RecursionError:
                pass
            try:
                pool.release(pool.acquire(timeout=BOUND))
                return True
            except RecursionError:
                return False

        assert deeper()
        assert (state(pool), pool._strikes) == ("closed", 0)
        assert is_sound(pool)


def test_initial_connections_that_fail_raise_their_error_whatever_the_breaker_says() -> None:
    for breaker in (1, 3, 8):
        with pytest.raises(ConnectionRefusedError):
            Pool(
                TcpConnection,
                {"host": "127.0.0.1", "port": refused_port()},
                breaker=breaker,
                initial_connections=8,
                backoff=LONG,
            )


def test_initial_connections_close_what_was_not_open(server: LineEchoServer) -> None:
    with greeting_pool(server, initial_connections=3) as pool:
        assert (state(pool), pool.idle) == ("closed", 3)


# Who is told, and who waits on


def test_who_waits_with_nothing_left_is_told_at_once(dials: Dials) -> None:
    with dials.pool(breaker=1, max_connections=1, backoff=LONG) as pool:
        ways: list[dict[str, Any]] = [{"timeout": None}, {"timeout": BOUND}, {"timeout": BOUND / 2}, {"retry": 100}]
        borrowers = [Attempt(pool.acquire, **way) for way in ways]
        dials.wait(1)
        dials[0].go_on(REFUSED)
        gevent.sleep(0)
        assert all(borrower.ready() for borrower in borrowers)
        assert borrowers[0].result() is REFUSED
        assert [broken(borrower).failures for borrower in borrowers[1:]] == [1, 1, 1]
        assert (pool.waiting, pool.stats().exhausted) == (0, 3)


def test_who_asks_with_nothing_left_is_told_before_anybody_else_runs(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        fail(pool, dials)
        for options in ({}, {"timeout": None}, {"timeout": 0}, {"timeout": 5}, {"retry": 0}, {"retry": 3}):
            with nobody_else_runs(), pytest.raises(BreakerOpenError):
                pool.acquire(**options)
        with nobody_else_runs(), pytest.raises(BreakerOpenError), pool.connection():
            pass


def test_what_idles_is_lent_on_while_it_is_open(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        connection = serve(pool, dials)
        fail(pool, dials)
        pool.release(connection)
        for _ in range(50):
            with nobody_else_runs(), pool.connection(timeout=0) as lent:
                assert lent is connection
        assert state(pool) == "open"


def test_while_connections_are_left_who_waits_is_served_by_their_return_in_order(dials: Dials) -> None:
    with dials.pool(breaker=1, max_connections=5, backoff=LONG) as pool:
        connection = serve(pool, dials)
        fail(pool, dials)
        served: list[int] = []

        def use(number: int) -> None:
            with pool.connection(timeout=None) as lent:
                assert lent is connection
                served.append(number)

        users = [Attempt(use, number) for number in range(20)]
        assert pool.waiting == 20
        assert is_sound(pool)
        pool.release(connection)
        assert [user.result() for user in users] == [None] * 20
        assert served == list(range(20))
        dials.wait(2)
        assert is_sound(pool)


@pytest.mark.parametrize("how", ["dropped", "discarded", "cleared", "used up", "shrunk"])
def test_who_waits_is_told_when_the_last_connection_is_gone(dials: Dials, how: str) -> None:
    with dials.pool(breaker=1, backoff=LONG, max_uses=1 if how == "used up" else None) as pool:
        connection = serve(pool, dials)
        fail(pool, dials)
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(3)]
        if how == "dropped":
            pool.drop(connection)
        elif how == "discarded":
            discard(pool, connection)
        elif how == "cleared":
            # clear() lets a dial pass: it is for the first of them, and when it fails too, the rest wait on.
            pool.clear()
            dials.wait(3)
            dials[-1].go_on(REFUSED)
            assert waiters.pop(0).result() is REFUSED
            assert not any(waiter.ready() for waiter in waiters)
            pool.release(connection)
        elif how == "shrunk":
            pool.resize(1)
            assert not any(waiter.ready() for waiter in waiters)
            pool.drop(connection)
        else:
            pool.release(connection)
        for waiter in waiters:
            broken(waiter)
        assert is_sound(pool)


def test_who_waits_for_the_last_connection_does_not_wait_for_its_close(server: LineEchoServer) -> None:
    may_close = Event()

    class Slow(Held):
        def close(self) -> None:
            may_close.wait(BOUND)
            super().close()

    dials = Dials(server)
    kind: type[Held] = Slow
    with Pool(kind, {"dials": dials}, breaker=1, backoff=LONG, check_after_idle=None) as pool:
        connection = serve(pool, dials)
        fail(pool, dials)
        waiter = Attempt(pool.acquire, timeout=None)
        discard(pool, connection)
        gevent.sleep(0)
        gevent.sleep(0)
        try:
            assert waiter.ready()
            assert is_sound(pool)
        finally:
            may_close.set()
        broken(waiter)
        until("it is closed", lambda: pool.total == 0)


def test_who_meets_the_last_connection_dead_is_told(dials: Dials, server: LineEchoServer) -> None:
    with dials.pool(breaker=1, backoff=LONG, check_after_idle=0) as pool:
        connection = serve(pool, dials)
        fail(pool, dials)
        pool.release(connection)
        server.hang_up()
        broken(Attempt(pool.acquire, timeout=None))
        assert pool.stats().closed["stale"] == 1
        assert is_sound(pool)


def test_whose_dial_is_under_way_when_it_opens_waits_for_it(dials: Dials) -> None:
    with dials.pool(breaker=1, max_connections=3, max_connecting=3, backoff=LONG) as pool:
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(4)]
        dials.wait(3)
        dials[0].go_on(REFUSED)
        assert state(pool) == "open"
        assert waiters[0].result() is REFUSED
        broken(waiters[3])
        dials[1].go_on()
        assert state(pool) == "closed"
        dials[2].go_on()
        assert [waiter.result() for waiter in waiters[1:3]] == dials[1:]


# What it says


def test_the_error_says_how_often_since_when_and_when_next(dials: Dials) -> None:
    before = time.time()
    with dials.pool(name="store", breaker=3, backoff=LONG) as pool:
        fail(pool, dials)
        after = time.time()
        fail(pool, dials, 2)
        error = broken(Attempt(pool.acquire))
        assert isinstance(error, PoolExhaustedError)
        assert error.failures == 3
        assert before <= error.since <= after
        assert 0 < error.retry_after <= 60
        assert error.stats is not None
        assert (error.stats.breaker, error.stats.open_failures, error.stats.exhausted) == ("open", 3, 1)
        assert error.waited >= 0
        assert isinstance(error.last_error, ConnectionRefusedError)
        text = str(error)
        for part in ("Pool 'store'", "3 dials in a row have failed", f"{REFUSED!r}", "breaker=3"):
            assert part in text
        assert time.strftime("%H:%M:%S", time.localtime(error.since)) in text
        seconds = re.search(r"next \w+ is in ([\d.]+) s", text)
        assert seconds is not None
        assert float(seconds[1]) == pytest.approx(error.retry_after, abs=0.01)


def test_one_failure_is_said_in_the_singular(dials: Dials, logged: Logged) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        fail(pool, dials)
        assert "1 dials" not in str(broken(Attempt(pool.acquire)))
        assert "1 dials" not in logged.take(1)[0].getMessage()


def test_who_waited_is_told_how_long(dials: Dials) -> None:
    with dials.pool(breaker=1, max_connections=1, backoff=LONG) as pool:
        Attempt(pool.acquire)
        waiter = Attempt(pool.acquire, timeout=None)
        began = monotonic()
        gevent.sleep(0.02)
        dials[0].go_on(REFUSED)
        assert broken(waiter).waited >= 0.02 > 0
        assert monotonic() - began >= 0.02


def test_who_waits_in_vain_for_a_return_is_told_of_the_breaker(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        connection = serve(pool, dials)
        fail(pool, dials)
        error = Attempt(pool.acquire, timeout=0.01).result()
        assert type(error) is PoolExhaustedError
        assert "in a row" in str(error)
        assert "breaker=1" in str(error)
        pool.release(connection)


def test_while_the_trial_is_under_way_the_error_says_so(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        fail(pool, dials)
        half_opens(pool)
        trying = Attempt(pool.acquire, timeout=None)
        dials.wait(2)
        error = broken(Attempt(pool.acquire, timeout=None))
        assert "under way" in str(error)
        assert error.failures == 1
        dials[1].go_on()
        pool.release(trying.result())


def test_since_when_is_told_from_the_first_failure_of_this_row(dials: Dials) -> None:
    with dials.pool(breaker=2, backoff=LONG) as pool:
        fail(pool, dials)
        pool.drop(serve(pool, dials))
        gevent.sleep(0.01)
        before = time.time()
        fail(pool, dials, 2)
        assert broken(Attempt(pool.acquire)).since >= before
        half_opens(pool)
        fail(pool, dials)
        error = broken(Attempt(pool.acquire))
        assert (error.failures, error.since >= before) == (3, True)


def test_an_error_that_cannot_be_shown_keeps_nobody_waiting(
    dials: Dials, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shy(OSError):
        def __repr__(self) -> str:
            raise ValueError("not shown")

    monkeypatch.setattr("logging.raiseExceptions", False)
    with dials.pool(breaker=1, max_connections=1, backoff=LONG) as pool:
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(3)]
        dials.wait(1)
        dials[0].go_on(Shy())
        assert all(isinstance(waiter.result(), Exception) for waiter in waiters)
    logged.take()


# How long it stays open


def test_each_failed_trial_doubles_the_pause_up_to_the_longest(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=(100, 800)) as pool:
        for bound in (100, 200, 400, 800, 800, 800):
            fail(pool, dials)
            assert bound / 2 - 5 <= broken(Attempt(pool.acquire)).retry_after <= bound
            half_opens(pool)
        pool.drop(serve(pool, dials))
        fail(pool, dials)
        assert 45 <= broken(Attempt(pool.acquire)).retry_after <= 100  # begun anew


@pytest.mark.parametrize("breaker", [2, 5, 10])
def test_the_first_pause_is_backoffs_first_however_many_failures_it_took(dials: Dials, breaker: int) -> None:
    with dials.pool(breaker=breaker, backoff=(100, 10_000)) as pool:
        for bound, count in ((100, breaker), (200, 1), (400, 1)):
            fail(pool, dials, count)
            assert bound / 2 - 5 <= broken(Attempt(pool.acquire)).retry_after <= bound
            half_opens(pool)


def test_dials_that_fail_side_by_side_make_the_pause_no_longer(dials: Dials) -> None:
    with dials.pool(breaker=1, max_connecting=8, backoff=(100, 10_000)) as pool:
        borrowers = [Attempt(pool.acquire) for _ in range(8)]
        dials.wait(8)
        for dial in dials:
            dial.go_on(REFUSED)
        assert [borrower.result() for borrower in borrowers] == [REFUSED] * 8
        assert 45 <= broken(Attempt(pool.acquire)).retry_after <= 100
        half_opens(pool)
        fail(pool, dials)
        assert 95 <= broken(Attempt(pool.acquire)).retry_after <= 200


def test_the_pause_ends_by_itself_and_the_server_is_back(proxy: Proxy) -> None:
    proxy.refuse()
    with greeting_pool(proxy, breaker=2, backoff=SHORT) as pool:
        for _ in range(2):
            assert isinstance(Attempt(pool.acquire).result(), ConnectionRefusedError)
        proxy.forward()
        until("somebody is served", lambda: lends(pool))
        assert (state(pool), proxy.accepted) == ("closed", 1)


def test_it_half_opens_where_the_upkeep_has_nothing_else_to_do(proxy: Proxy) -> None:
    proxy.refuse()
    with greeting_pool(proxy, backoff=SHORT, check_after_idle=None, reap_expired_connections=False) as pool:
        for _ in range(3):
            assert isinstance(Attempt(pool.acquire).result(), ConnectionRefusedError)
            until("it half-opens", lambda: state(pool) == "half-open")
        proxy.forward()
        pool.release(pool.acquire(timeout=BOUND))
        assert state(pool) == "closed"
        assert proxy.accepted == 1


# Half-open


def test_half_open_one_dial_is_made_however_many_ask(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        fail(pool, dials)
        half_opens(pool)
        first, *others = [Attempt(pool.acquire, timeout=None) for _ in range(50)]
        dials.wait(2)
        assert state(pool) == "half-open"
        for other in others:
            assert other.ready()
            broken(other)
        assert not first.ready()
        dials[1].go_on()
        pool.release(first.result())
        assert state(pool) == "closed"


def test_half_open_the_server_sees_one_connection_however_many_ask(proxy: Proxy) -> None:
    proxy.reset()
    with greeting_pool(proxy) as pool:
        assert isinstance(Attempt(pool.acquire).result(), OSError)
        for number in range(5):
            half_opens(pool)
            results = [attempt.result() for attempt in [Attempt(pool.acquire, timeout=None) for _ in range(30)]]
            assert sum(isinstance(result, BreakerOpenError) for result in results) == 29
            assert proxy.accepted == 2 + number
        proxy.forward()
        half_opens(pool)
        pool.release(pool.acquire(timeout=BOUND))
        assert proxy.accepted == 7


def test_a_trial_that_succeeds_serves_everybody_who_waits(dials: Dials) -> None:
    with dials.pool(breaker=1, max_connections=4, backoff=LONG) as pool:
        connection = serve(pool, dials)
        fail(pool, dials)
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(6)]
        half_opens(pool)
        dials.wait(3)
        dials[2].go_on()
        assert waiters[0].result() is dials[2]
        dials.wait(5)  # to the cap
        for dial in dials[3:]:
            dial.go_on()
        assert {waiter.result() for waiter in waiters[1:3]} == set(dials[3:])
        for borrowed, waiter in zip((connection, dials[2], dials[3]), waiters[3:], strict=True):
            pool.release(borrowed)
            assert waiter.result() is borrowed
        assert state(pool) == "closed"
        assert is_sound(pool)


def test_a_trial_that_fails_is_told_to_one_and_the_others_wait_on_for_what_is_lent(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        connection = serve(pool, dials)
        fail(pool, dials)
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(4)]
        for number in range(3):  # it needs no traffic: who waits at the end of the pause is whom the trial is for
            half_opens(pool)
            dials.wait(3 + number)
            assert pool.waiting == 4 - number
            dials[-1].go_on(REFUSED)
            assert waiters[number].result() is REFUSED
            assert state(pool) == "open"
        pool.release(connection)
        assert waiters[3].result() is connection
        assert is_sound(pool)


def test_a_connection_that_comes_back_serves_whom_the_trial_was_for(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        connection = serve(pool, dials)
        fail(pool, dials)
        waiter = Attempt(pool.acquire, timeout=None)
        half_opens(pool)
        dials.wait(3)
        pool.release(connection)
        assert waiter.result() is connection
        dials[2].go_on()
        until("the trial is over", lambda: state(pool) == "closed")
        assert pool.idle == 1


@pytest.mark.parametrize("how", ["killed", "timed out"])
@pytest.mark.parametrize("succeeds", [True, False])
def test_a_trial_outlives_whom_it_was_for_and_another_follows(dials: Dials, how: str, succeeds: bool) -> None:
    with dials.pool(breaker=1, max_connections=1, backoff=LONG) as pool:
        fail(pool, dials)
        half_opens(pool)
        borrower = Attempt(pool.acquire, timeout=0.01 if how == "timed out" else None)
        dials.wait(2)
        if how == "killed":
            borrower.greenlet.kill()
        else:
            assert type(borrower.result()) is PoolExhaustedError
        broken(Attempt(pool.acquire, timeout=None))  # it is still under way
        assert is_sound(pool)
        dials[1].go_on(None if succeeds else REFUSED)
        if succeeds:
            until("it idles", lambda: pool.idle == 1)
            assert pool.acquire(timeout=0) is dials[1]
        else:
            assert state(pool) == "open"
            half_opens(pool)
            assert serve(pool, dials) is dials[2]
        assert state(pool) == "closed"
        assert is_sound(pool)


def test_a_trial_for_somebody_who_is_gone_is_taken_over_by_who_waits(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        connection = serve(pool, dials)
        fail(pool, dials)
        first, second = (Attempt(pool.acquire, timeout=None) for _ in range(2))
        half_opens(pool)
        dials.wait(3)
        first.greenlet.kill()
        dials[2].go_on()
        assert second.result() is dials[2]
        pool.release(connection)


def test_a_trial_that_takes_longer_than_the_pause_is_the_only_one(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=(0.01, BOUND)) as pool:
        fail(pool, dials)
        until("it half-opens", lambda: state(pool) == "half-open")
        trial = Attempt(pool.acquire, timeout=None)
        dials.wait(2)
        for _ in range(10):
            gevent.sleep(0.01)
            broken(Attempt(pool.acquire, timeout=None))
        dials.wait(2)
        dials[1].go_on()
        pool.release(trial.result())


@pytest.mark.parametrize("succeeds", ["first", "second", "neither"])
def test_beside_a_trial_that_hangs_for_longer_than_the_longest_pause_there_is_another(
    dials: Dials, succeeds: str
) -> None:
    with dials.pool(breaker=1, max_connections=2, backoff=(0.02, 0.02)) as pool:
        fail(pool, dials)
        until("it half-opens", lambda: state(pool) == "half-open")
        first = Attempt(pool.acquire, timeout=None)
        dials.wait(2)
        second = Attempt(lambda: until("somebody is served", lambda: lends(pool)))
        until("there is another", lambda: len(dials) == 3)
        gevent.sleep(0.05)
        dials.wait(3)  # as many as may be
        dials[1].go_on(None if succeeds == "first" else REFUSED)
        dials[2].go_on(None if succeeds == "second" else REFUSED)
        if succeeds == "neither":
            until("it half-opens", lambda: state(pool) == "half-open")
            until("there is another", lambda: len(dials) == 4)
        if first.result() is not REFUSED:
            pool.release(first.result())
        gevent.sleep(0)
        for dial in dials[3:]:  # what the second has begun since
            dial.go_on()
        assert second.result() is None
        assert succeeds == "first" or state(pool) == "closed"  # else the other one failed later than that
        assert is_sound(pool)


def test_a_trial_that_is_killed_is_followed_by_another(dials: Dials) -> None:
    with dials.pool(breaker=1, max_connections=1, backoff=LONG) as pool:
        fail(pool, dials)
        for _ in range(3):
            half_opens(pool)
            begun = len(dials)
            borrower = Attempt(pool.acquire, timeout=None)
            dials.wait(begun + 1)
            (dial,) = pool._talking
            dial.kill()  # type: ignore[attr-defined]
            assert "killed" in str(borrower.result())
        half_opens(pool)
        pool.release(serve(pool, dials))
        assert is_sound(pool)


def test_the_trial_of_a_black_hole_ends_when_its_connect_does() -> None:
    with (
        BlackHole() as hole,
        Pool(
            TcpConnection,
            {"host": hole.host, "port": hole.port, "connect_timeout": 0.05},
            breaker=1,
            backoff=LONG,
        ) as pool,
    ):
        assert isinstance(Attempt(pool.acquire, timeout=None).result(), TimeoutError)
        for _ in range(3):
            half_opens(pool)
            trial = Attempt(pool.acquire, timeout=None)
            broken(Attempt(pool.acquire, timeout=None))
            assert isinstance(trial.result(), TimeoutError)
            assert state(pool) == "open"
        assert pool.total == 0


def test_a_peer_that_accepts_and_says_nothing_is_given_one_dial_for_each_pause(proxy: Proxy) -> None:
    proxy.black_hole()
    with Pool(
        Greeting, {"host": "127.0.0.1", "port": proxy.port, "timeout": 0.02}, breaker=2, backoff=LONG, max_connecting=1
    ) as pool:
        results = [attempt.result() for attempt in [Attempt(pool.acquire, timeout=None) for _ in range(10)]]
        assert [type(result) for result in results] == [TimeoutError] * 2 + [BreakerOpenError] * 8
        for number in range(3):
            half_opens(pool)
            results = [attempt.result() for attempt in [Attempt(pool.acquire, timeout=None) for _ in range(10)]]
            assert [type(result) for result in results] == [TimeoutError] + [BreakerOpenError] * 9
            assert proxy.accepted == 3 + number
        proxy.forward()
        pool._options["timeout"] = BOUND
        half_opens(pool)
        pool.release(pool.acquire(timeout=BOUND))
        assert state(pool) == "closed"


def test_a_dial_that_began_before_and_hangs_does_not_stand_in_the_way_of_the_trial(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        hanging = Attempt(pool.acquire, timeout=None)
        failing = Attempt(pool.acquire, timeout=None)
        dials.wait(2)
        dials[1].go_on(REFUSED)
        assert failing.result() is REFUSED
        half_opens(pool)
        trial = Attempt(pool.acquire, timeout=None)
        gevent.sleep(0)
        try:
            assert len(dials) == 3, "there is no trial"
            dials[2].go_on()
            assert {hanging.result()} == {dials[2]}  # he was there first
        finally:
            for dial in dials:
                dial.go_on()
        assert isinstance(trial.result(), Held)
        assert state(pool) == "closed"


def test_a_slow_dial_that_began_before_and_succeeds_closes_it(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        slow = Attempt(pool.acquire, timeout=None)
        failing = Attempt(pool.acquire, timeout=None)
        dials.wait(2)
        dials[1].go_on(REFUSED)
        assert failing.result() is REFUSED
        dials[0].go_on()
        assert slow.result() is dials[0]
        assert state(pool) == "closed"
        assert serve(pool, dials) is dials[2]
        gevent.sleep(0)
        assert pool._upkeep.rest_of_break() == 0.0


def test_a_slow_dial_that_began_before_and_fails_later_changes_nothing(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=(100, 10_000)) as pool:
        slow = Attempt(pool.acquire, timeout=None)
        Attempt(pool.acquire, timeout=None)
        dials.wait(2)
        dials[1].go_on(REFUSED)
        until_when = pool._upkeep._trial_at
        dials[0].go_on(REFUSED)
        assert slow.result() is REFUSED
        assert (state(pool), pool._upkeep._trial_at) == ("open", until_when)


# Nobody waits for ever, whatever he says


WAYS: dict[str, dict[str, Any]] = {
    "the rule of 0.1.6": {},
    "retry=0": {"retry": 0},
    "retry=1": {"retry": 1},
    "timeout=0": {"timeout": 0},
    "timeout": {"timeout": 0.02},
    "for ever": {"timeout": None},
}


@pytest.mark.parametrize("way", WAYS)
def test_half_open_whoever_asks_may_be_the_trial(dials: Dials, way: str) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        fail(pool, dials)
        half_opens(pool)
        borrower = Attempt(pool.acquire, **WAYS[way])
        if way == "timeout=0":
            assert isinstance(borrower.result(), PoolExhaustedError)  # it never dials
            dials.wait(1)
            return
        dials.wait(2)
        if way == "timeout":
            assert type(borrower.result()) is PoolExhaustedError
        else:
            assert not borrower.ready()
        dials[1].go_on()
        if way != "timeout":
            assert borrower.result() is dials[1]
        assert state(pool) == "closed"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("half_open", [False, True])
def test_while_what_is_lent_does_not_come_back_nobody_waits_longer_than_he_said(
    dials: Dials, way: str, half_open: bool
) -> None:
    with dials.pool(breaker=1, backoff=LONG, max_connecting=2) as pool:
        connection = serve(pool, dials)
        fail(pool, dials)
        if half_open:
            half_opens(pool)
            Attempt(pool.acquire, timeout=None)  # he has the trial
            dials.wait(3)
        borrower = Attempt(pool.acquire, **WAYS[way])
        if way == "for ever":
            gevent.sleep(0.05)
            assert not borrower.ready()
        else:
            assert type(borrower.result()) is PoolExhaustedError
        for dial in dials[2:]:
            dial.go_on(REFUSED)
        pool.release(connection)
        if way == "for ever":
            assert borrower.result() is connection
        assert is_sound(pool)


def test_who_waited_for_his_dial_by_the_rule_of_016_has_a_limit_once_there_is_none(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG, max_connecting=1) as pool:
        connection = serve(pool, dials)
        first = Attempt(pool.acquire)
        lenient = Attempt(pool.acquire, retry=1)  # waits for his turn to dial, which has no limit
        dials.wait(2)
        gevent.sleep(0.15)
        assert not lenient.ready()
        dials[1].go_on(REFUSED)
        assert first.result() is REFUSED
        assert type(lenient.result()) is PoolExhaustedError
        pool.release(connection)


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_max_waiting_lets_the_trial_pass(dials: Dials, limit: int) -> None:
    with dials.pool(breaker=1, backoff=LONG, max_waiting=limit) as pool:
        fail(pool, dials)
        assert isinstance(Attempt(pool.acquire, timeout=None).result(), BreakerOpenError)
        half_opens(pool)
        assert serve(pool, dials) is dials[1]
        assert state(pool) == "closed"


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_while_connections_are_left_no_more_than_max_waiting_wait_for_them(dials: Dials, limit: int) -> None:
    with dials.pool(breaker=1, backoff=LONG, max_waiting=limit) as pool:
        connection = serve(pool, dials)
        fail(pool, dials)
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(limit)]
        assert type(Attempt(pool.acquire, timeout=None).result()) is PoolExhaustedError
        pool.release(connection)
        for waiter in waiters:
            assert waiter.result() is connection
            pool.release(connection)


# What else may happen meanwhile


def test_the_stock_tries_in_the_background(proxy: Proxy) -> None:
    proxy.refuse()
    with greeting_pool(proxy, breaker=2, min_idle=3, backoff=SHORT) as pool:
        until("it opens", lambda: state(pool) == "open")
        until("it was tried", lambda: pool.stats().open_failures >= 5)
        proxy.forward()
        pool.wait_ready(BOUND)
        assert (state(pool), pool.size) == ("closed", 3)
        assert is_sound(pool)


def test_half_open_the_stock_makes_one_dial(proxy: Proxy) -> None:
    proxy.reset()
    # A trial that takes longer than the second of these has another beside it.
    with greeting_pool(proxy, breaker=3, min_idle=3, max_connecting=3, backoff=(0.01, 60)) as pool:
        until("they failed", lambda: pool.stats().open_failures >= 3)
        assert proxy.most <= 3
        enough = pool.stats().open_failures + 4
        most = 0
        with gevent.Timeout(BOUND):
            while pool.stats().open_failures < enough:
                most = max(most, pool.stats().opening)
                gevent.sleep(0.0005)
        assert most <= 1
        proxy.forward()
        pool.clear()
        pool.wait_ready(BOUND)


def test_wait_ready_says_what_keeps_it() -> None:
    with Pool(
        TcpConnection, {"host": "127.0.0.1", "port": refused_port()}, min_idle=2, breaker=1, backoff=LONG
    ) as pool:
        until("it opens", lambda: state(pool) == "open")
        with pytest.raises(PoolExhaustedError) as caught:
            pool.wait_ready(0.01)
        assert isinstance(caught.value.last_error, ConnectionRefusedError)
        waiting = Attempt(pool.wait_ready)
        pool.close()
        assert isinstance(waiting.result(), PoolClosedError)


def test_clear_lets_a_dial_pass_at_once(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        fail(pool, dials)
        pool.clear()
        assert state(pool) == "half-open"
        pool.release(serve(pool, dials))
        assert state(pool) == "closed"


def test_clear_dials_for_who_waits(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        connection = serve(pool, dials)
        fail(pool, dials)
        waiter = Attempt(pool.acquire, timeout=None)
        pool.clear()
        dials.wait(3)
        dials[2].go_on()
        assert waiter.result() is dials[2]
        pool.release(connection)


@pytest.mark.parametrize("tick", [0.5, None])
def test_a_trial_that_clear_allowed_and_that_fails_is_followed_by_another(dials: Dials, tick: float | None) -> None:
    with dials.pool(breaker=1, backoff=(1, 1), check_after_idle=tick) as pool:
        fail(pool, dials)
        pool.clear()
        pool._upkeep.hurry(pool, 0.0)
        gevent.sleep(0)  # the upkeep looks
        gevent.sleep(0)
        fail(pool, dials)
        assert state(pool) != "closed"
        until("the breaker half-opens", lambda: state(pool) == "half-open")
        pool.release(serve(pool, dials))


def test_what_clear_interrupts_closes_the_breaker_all_the_same(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        fail(pool, dials)
        half_opens(pool)
        trial = Attempt(pool.acquire, timeout=None)
        dials.wait(2)
        pool.clear()  # what the trial opens is of the generation before
        dials[1].go_on()
        dials.wait(3)
        dials[2].go_on()
        assert trial.result() is dials[2]
        assert (state(pool), pool.stats().closed["cleared"]) == ("closed", 1)


def test_resize_dials_for_nobody_while_it_is_open(dials: Dials) -> None:
    with dials.pool(breaker=1, max_connections=2, backoff=LONG) as pool:
        connection = serve(pool, dials)
        fail(pool, dials)
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(2)]
        pool.resize(10)
        pool.resize(1)
        pool.resize(5)
        dials.wait(2)
        assert is_sound(pool)
        half_opens(pool)
        dials.wait(3)
        dials[2].go_on()
        dials.wait(4)
        dials[3].go_on()
        assert {waiter.result() for waiter in waiters} == set(dials[2:])
        pool.release(connection)


def test_paused_everybody_waits_and_at_its_end_learns_how_it_stands(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        fail(pool, dials)
        pool.pause()
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(3)]
        assert not any(waiter.ready() for waiter in waiters)
        assert is_sound(pool)
        pool.resume()
        for waiter in waiters:
            broken(waiter)


def test_a_pause_that_outlasts_the_breakers_ends_with_one_dial(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG) as pool:
        fail(pool, dials)
        pool.pause()
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(3)]
        half_opens(pool)
        dials.wait(1)
        pool.resume()
        dials.wait(2)
        for waiter in waiters[1:]:
            broken(waiter)
        dials[1].go_on()
        assert waiters[0].result() is dials[1]


def test_a_failure_during_a_pause_is_told_when_it_ends(dials: Dials) -> None:
    with dials.pool(breaker=1, backoff=LONG, max_connecting=1) as pool:
        first, second = (Attempt(pool.acquire, timeout=None) for _ in range(2))
        dials.wait(1)
        pool.pause()
        dials[0].go_on(REFUSED)
        assert first.result() is REFUSED
        assert not second.ready()
        pool.resume()
        broken(second)


@pytest.mark.parametrize("timeout", [None, 0, 0.05])
def test_close_ends_it_all(dials: Dials, timeout: float | None) -> None:
    pool = dials.pool(breaker=1, backoff=LONG)
    connection = serve(pool, dials)
    fail(pool, dials)
    waiter = Attempt(pool.acquire, timeout=None)
    pool.close(timeout)
    assert isinstance(waiter.result(), PoolClosedError)
    assert isinstance(Attempt(pool.acquire).result(), PoolClosedError)
    if timeout is None:
        pool.release(connection)
    until("all is closed", lambda: pool.total == 0)
    assert is_sound(pool)


def test_close_in_the_middle_of_a_trial(dials: Dials, logged: Logged) -> None:
    pool = dials.pool(breaker=1, backoff=LONG)
    fail(pool, dials)
    logged.take()
    half_opens(pool)
    trial = Attempt(pool.acquire, timeout=None)
    dials.wait(2)
    pool.close()
    assert isinstance(trial.result(), PoolClosedError)
    dials[1].go_on(REFUSED)
    until("all is closed", lambda: pool.total == 0)
    assert [record.getMessage() for record in logged.take() if "next one" in record.getMessage()] == []


def test_drop_expired_and_the_rest_go_on_as_ever(server: LineEchoServer) -> None:
    with greeting_pool(server) as pool:
        connection = pool.acquire()
        pool._options["port"] = refused_port()
        assert isinstance(Attempt(pool.acquire).result(), ConnectionRefusedError)
        pool.release(connection)
        pool.drop_expired()
        assert pool.idle == 1
        connection.expired = True
        pool.drop_expired()
        assert (pool.idle, pool.total) == (0, 0)
        broken(Attempt(pool.acquire))


def test_a_child_of_a_fork_begins_with_its_breaker_closed_and_opens_it_for_itself(tmp_path: Path) -> None:
    program = """
import logging, os, sys
import gevent
from gevent import socket
from gsocketpool import BreakerOpenError, Pool, TcpConnection

logging.getLogger("gsocketpool").addHandler(logging.NullHandler())
holder = socket.socket()
holder.bind(("127.0.0.1", 0))
pool = Pool(TcpConnection, dict(zip(("host", "port"), holder.getsockname())), breaker=1, backoff=(2, 2))

def attempt():
    try:
        pool.release(pool.acquire(timeout=5))
        return "served"
    except Exception as error:
        return type(error).__name__

assert attempt() == "ConnectionRefusedError"
assert pool.stats().breaker == "open"
pid = gevent.os.fork()
if pid:
    assert pool.stats().breaker == "open"
    assert os.waitstatus_to_exitcode(gevent.os.waitpid(pid, 0)[1]) == 0
    sys.exit()
assert pool.stats().breaker == "closed"
pool._upkeep.hurry(pool, 0.0)
gevent.sleep(0.05)
with gevent.Timeout(10):
    assert attempt() == "ConnectionRefusedError"
    assert attempt() == "BreakerOpenError"
    holder.listen()
    while (what := attempt()) != "served":
        assert what == "BreakerOpenError", what
        gevent.sleep(0.01)
os._exit(0)
"""
    path = tmp_path / "forks.py"
    path.write_text(program)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(path)],
        cwd=Path(gsocketpool.__file__).parent.parent,
        env={"PYTHONPATH": str(Path(gsocketpool.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("half_open", [False, True])
def test_g9_a_broken_pool_that_nobody_refers_to_is_collected(dials: Dials, half_open: bool) -> None:
    pool = dials.pool(breaker=1, backoff=LONG)
    fail(pool, dials)
    broken(Attempt(pool.acquire))
    if half_open:
        half_opens(pool)
    REFUSED.__traceback__ = None  # which has seen the pool
    ref = weakref.ref(pool)
    del pool
    until("it is collected", lambda: gc.collect() >= 0 and ref() is None)


# What is logged


def test_an_outage_is_logged_when_it_opens_and_not_for_each_who_is_refused(dials: Dials, logged: Logged) -> None:
    with dials.pool(name="store", breaker=3, backoff=LONG) as pool:
        fail(pool, dials, 2)
        assert logged.take() == []
        fail(pool, dials)
        (record,) = logged.take(1)
        assert "Pool 'store': 3 dials in a row have failed" in record.getMessage()
        assert repr(REFUSED) in record.getMessage()
        assert record.exc_info is None or record.exc_info[0] is None
        for _ in range(100):
            broken(Attempt(pool.acquire))
        assert logged.take() == []


def test_dials_that_fail_side_by_side_are_logged_once(dials: Dials, logged: Logged) -> None:
    with dials.pool(breaker=2, max_connecting=8, backoff=LONG) as pool:
        borrowers = [Attempt(pool.acquire) for _ in range(8)]
        dials.wait(8)
        for dial in dials:
            dial.go_on(REFUSED)
        for borrower in borrowers:
            borrower.result()
        logged.take(1)


def test_the_stock_does_not_say_it_a_second_time(logged: Logged) -> None:
    with Pool(
        TcpConnection, {"host": "127.0.0.1", "port": refused_port()}, min_idle=1, breaker=1, backoff=LONG
    ) as pool:
        until("it opens", lambda: state(pool) == "open")
        gevent.sleep(0)
        logged.take(1)


def test_it_is_said_when_an_outage_is_over(dials: Dials, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "gsocketpool"), dials.pool(breaker=1, backoff=LONG) as pool:
        for _ in range(3):
            fail(pool, dials)
            half_opens(pool)
        caplog.clear()
        pool.release(serve(pool, dials))
        (record,) = (record for record in caplog.records if record.name == "gsocketpool")
        assert "3 " in record.getMessage()


def test_who_dialled_in_vain_is_told_before_it_is_logged(dials: Dials) -> None:
    """A handler may wait, and the dial may be killed in it."""
    import logging

    writes = Event()

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            writes.set()
            gevent.sleep(BOUND)

    handler = Slow(logging.WARNING)
    logger = logging.getLogger("gsocketpool")
    logger.addHandler(handler)
    try:
        with dials.pool(breaker=1, max_connections=1, backoff=LONG) as pool:
            borrowers = [Attempt(pool.acquire, timeout=None) for _ in range(3)]
            dials.wait(1)
            (dial,) = pool._talking
            dials[0].go_on(REFUSED)
            assert writes.wait(BOUND)
            dial.kill()  # type: ignore[attr-defined]
            with gevent.Timeout(BOUND / 2, AssertionError("they wait for the log")):
                assert borrowers[0].result() is REFUSED
                for borrower in borrowers[1:]:
                    broken(borrower)
            assert is_sound(pool)
    finally:
        logger.removeHandler(handler)


# Kills


class KnifeGreeting(Greeting):
    """Its dial has switch points after the connect; the knife can be aimed at it."""

    world: Kills

    def open(self) -> None:
        if self.world.victim == "trial":
            self.world.knife.aim()
        super().open()
        gevent.sleep(0)


class Kills:
    """A pool at half-open, at a server that is back or is not, and a victim."""

    def __init__(self, knife: Knife, proxy: Proxy, victim: str) -> None:
        self.knife = knife
        self.victim = ""
        kind = type("KnifeGreeting", (KnifeGreeting,), {"world": self})
        self.pool: Pool[Any] = Pool(
            kind,
            {"host": "127.0.0.1", "port": proxy.port, "timeout": BOUND},
            breaker=1,
            max_connections=2,
            backoff=LONG,
            check_after_idle=None,
        )
        proxy.refuse()
        assert isinstance(Attempt(self.pool.acquire).result(), ConnectionRefusedError)
        self.victim = victim


def run_trial(knife: Knife, victim: str, succeeds: bool) -> None:
    with LineEchoServer() as server, Proxy("127.0.0.1", server.port) as proxy, knife:
        world = Kills(knife, proxy, victim)
        pool = world.pool
        if succeeds:
            proxy.forward()
        half_opens(pool)

        def borrow() -> None:
            with pool.connection(timeout=None) as connection:
                connection.ask("me")

        results: list[BaseException | None] = []

        def be_the_victim() -> None:
            try:
                borrow()
                results.append(None)
            except BaseException as error:
                results.append(error)

        first = gevent.Greenlet(be_the_victim)
        if victim == "borrower":
            knife.aim(first)
        first.start()
        others = [gevent.spawn(be_the_victim) for _ in range(3)]
        gevent.joinall([first, *others], timeout=3 * BOUND, raise_error=True)
        assert len(results) == 4, "somebody waits for ever"
        until("no dial is left", lambda: pool.total == pool.size)
        assert is_sound(pool)
        proxy.forward()
        if state(pool) == "open":
            half_opens(pool)
        with gevent.Timeout(BOUND, AssertionError("it serves nobody any more")):
            connections = [pool.acquire(timeout=None)]
            connections.append(pool.acquire(timeout=None))
        for connection in connections:
            connection.ask("still")
            pool.release(connection)
        assert state(pool) == "closed"
        assert is_sound(pool)
        assert server.most <= 2
        pool.close()
        proxy.wait_open(0)
        assert is_sound(pool)
        assert pool.total == 0


@pytest.mark.parametrize("victim", ["borrower", "trial"])
@pytest.mark.parametrize("succeeds", [True, False])
@pytest.mark.parametrize("thrown", [gevent.GreenletExit, gevent.Timeout])
@pytest.mark.parametrize("when", [ASLEEP, WAKING])
def test_g4_a_kill_at_any_switch_point_of_the_trial_loses_neither_slot_nor_trial(
    victim: str, succeeds: bool, thrown: type[BaseException], when: str
) -> None:
    count = Knife()
    run_trial(count, victim, succeeds)
    if not count.points:
        assert (victim, succeeds) == ("trial", False), "there is no switch point: it proves nothing"
        return
    for point in range(1, count.points + 1):
        knife = Knife(point, when, thrown)
        try:
            run_trial(knife, victim, succeeds)
        except BaseException as error:
            raise AssertionError(f"{thrown.__name__} at switch point {point} of {count.points}, {when}") from error


# At length


def test_g4_an_endpoint_that_comes_and_goes_under_load_costs_no_slot(
    proxy: Proxy, server: LineEchoServer, rng: random.Random, logged: Logged
) -> None:
    outcomes: dict[str, int] = {}
    cap = 6
    pool = Pool(
        Greeting,
        {"host": "127.0.0.1", "port": proxy.port, "timeout": 0.05},
        max_connections=cap,
        max_connecting=3,
        breaker=3,
        min_idle=1,
        backoff=(0.002, 0.01),
        check_after_idle=0.02,
    )
    done = False

    def enough() -> bool:
        return (
            sum(outcomes.values()) >= 4_000
            and outcomes.get("served", 0) > 200
            and outcomes.get("BreakerOpenError", 0) > 50
        )

    def use(number: int) -> None:
        turn = 0
        while not enough():
            turn += 1
            way: dict[str, Any] = rng.choice([{}, {"timeout": None}, {"timeout": 0.01}, {"timeout": 0}, {"retry": 0}])
            text = f"{number}.{turn}"
            try:
                with gevent.Timeout(rng.choice([0.005, 1, 5])):
                    connection = pool.acquire(**way)
                    try:
                        assert connection.ask(text) == text, "somebody else's reply"
                        gevent.sleep(rng.choice([0, 0.001, 0.002]))
                    finally:
                        pool.release(connection)
                outcome = "served"
            except (OSError, PoolExhaustedError, gevent.Timeout, EOFError) as error:
                outcome = type(error).__name__
                gevent.sleep(0.001 if isinstance(error, BreakerOpenError) else 0)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

    def flap() -> None:
        faults: list[Callable[[], object]] = [
            proxy.refuse,
            proxy.reset,
            lambda: proxy.black_hole("new"),
            pool.clear,
            lambda: pool.resize(rng.randint(1, cap)),
            pool.pause,
        ]
        while not done:
            rng.choice(faults)()
            gevent.sleep(rng.uniform(0.01, 0.1))
            proxy.forward()
            pool.resume()
            gevent.sleep(rng.uniform(0.01, 0.03))

    flapping = gevent.spawn(flap)
    users = [gevent.spawn(use, number) for number in range(12)]
    gevent.joinall(users, timeout=50, raise_error=True)
    assert all(user.ready() for user in users), f"{sum(not user.ready() for user in users)} wait for ever: {pool!r}"
    done = True
    flapping.get(timeout=BOUND)
    proxy.forward()
    pool.resize(cap)
    pool._options["timeout"] = BOUND
    # As long as something idles nobody needs a dial, and it may be half-open still.
    until("it has recovered", lambda: state(pool) != "open" and pool.idle)
    until("nothing is under way", lambda: pool.total == pool.size == pool.idle)
    assert is_sound(pool)
    lent = [pool.acquire(timeout=BOUND) for _ in range(cap)]
    assert len(set(map(id, lent))) == cap
    assert state(pool) == "closed"
    for connection in lent:
        pool.release(connection)
    assert proxy.most <= cap
    pool.close()
    proxy.wait_open(0)
    assert (pool.total, is_sound(pool)) == (0, True)
    logged.take()


# In a group


def test_in_a_group_an_endpoint_opens_its_breaker_after_five_failures(proxy: Proxy) -> None:
    proxy.reset()
    with PoolGroup(Greeting, backoff=LONG) as group:
        pool = group.pool(host="127.0.0.1", port=proxy.port)
        for _ in range(5):
            assert isinstance(Attempt(pool.acquire).result(), OSError)
        for _ in range(20):
            broken(Attempt(pool.acquire))
        assert proxy.accepted == 5
        (stats,) = group.stats().endpoints.values()
        assert stats.breaker == "open"


def test_one_endpoint_that_hangs_takes_nothing_from_the_others(dials: Dials, server: LineEchoServer) -> None:
    with PoolGroup(
        lambda hangs: Held(dials) if hangs else TcpConnection("127.0.0.1", server.port),
        max_connections=4,
        max_total=8,
        backoff=LONG,
        breaker=2,
        min_idle=0,
    ) as group:
        dead = group.pool(hangs=True)
        hanging = [Attempt(dead.acquire, timeout=None) for _ in range(20)]
        dials.wait(2)  # a quarter of max_total
        assert dead.stats().opening == 2
        served = 0

        def use() -> None:
            nonlocal served
            for _ in range(50):
                with group.connection(BOUND, hangs=False):
                    served += 1
                    gevent.sleep(0)

        gevent.joinall([gevent.spawn(use) for _ in range(4)], timeout=BOUND, raise_error=True)
        assert served == 200
        assert 0 < server.accepted <= 4
        assert not any(attempt.ready() for attempt in hanging)
        for dial in dials:  # a third one begins when the first one has failed
            dial.go_on(REFUSED)
            dials.wait(3)
        results = [attempt.result() for attempt in hanging]
        assert results[:3] == [REFUSED] * 3
        assert [type(result) for result in results[3:]] == [BreakerOpenError] * 17
        until("no dial is under way", lambda: group.stats().opening == 0)
        assert group.budget is not None
        assert group.budget.faults() == []
        assert group.budget.used == server.open <= 4


def test_a_broken_endpoint_claims_no_unit_and_half_open_no_more_than_one(dials: Dials, server: LineEchoServer) -> None:
    other = Dials(server)
    places = {"bad": dials, "good": other}
    with PoolGroup(
        lambda place: Held(places[place]), max_total=3, max_connections=3, max_connecting=3, breaker=1, backoff=LONG
    ) as group:
        bad, good = group.pool(place="bad"), group.pool(place="good")
        first = Attempt(bad.acquire, timeout=BOUND)
        dials.wait(1)
        dials[0].go_on()
        kept = first.result()
        fail(bad, dials)
        lent = [serve(good, other) for _ in range(2)]
        waiters = [Attempt(bad.acquire, timeout=None) for _ in range(3)]
        good.release(lent[0])
        assert good.idle == 1  # for them nothing is closed
        half_opens(bad)
        dials.wait(3)
        assert good.size == 1  # for the trial something is
        good.release(lent[1])
        assert good.idle == 1, "no more than that"
        dials[2].go_on(REFUSED)
        assert waiters[0].result() is REFUSED
        bad.release(kept)
        assert waiters[1].result() is kept
        bad.drop(kept)
        broken(waiters[2])
        assert group.budget is not None
        assert group.budget.faults() == []


def test_a_broken_endpoint_is_not_forgotten_before_its_pause_is_over(proxy: Proxy) -> None:
    proxy.refuse()
    with PoolGroup(Greeting, breaker=1, backoff=LONG, forget_after=0) as group:
        pool = group.pool(host="127.0.0.1", port=proxy.port)
        assert isinstance(Attempt(pool.acquire).result(), ConnectionRefusedError)
        gevent.sleep(0.02)
        for _ in range(3):
            with pytest.raises(BreakerOpenError), group.connection(host="127.0.0.1", port=proxy.port):
                pass
        assert group.pools == [pool]
        half_opens(pool)
        until("it is forgotten", lambda: group.pools == [])
        assert group.pool(host="127.0.0.1", port=proxy.port) is pool  # somebody refers to it
        assert state(pool) == "half-open"


def test_a_broken_endpoint_that_is_asked_for_on_and_on_keeps_its_count(proxy: Proxy) -> None:
    proxy.reset()
    with PoolGroup(Greeting, breaker=2, backoff=(0.01, 0.02), forget_after=3 * BOUND) as group:
        options = {"host": "127.0.0.1", "port": proxy.port}
        until("it was tried often", lambda: not lends(group.pool(**options)) and proxy.accepted >= 8)
        (pool,) = group.pools
        assert pool.stats().open_failures >= 8
        proxy.forward()
        until("it is served", lambda: lends(group.pool(**options)))
        assert group.pools == [pool]
        assert state(pool) == "closed"


def test_clear_of_a_group_lets_each_endpoint_try(proxy: Proxy) -> None:
    proxy.refuse()
    with PoolGroup(Greeting, breaker=1, backoff=LONG) as group:
        pools = [group.pool(host="127.0.0.1", port=port) for port in (proxy.port, refused_port())]
        for pool in pools:
            assert isinstance(Attempt(pool.acquire).result(), ConnectionRefusedError)
        group.clear()
        assert [state(pool) for pool in pools] == ["half-open"] * 2
        proxy.forward()
        pools[0].release(pools[0].acquire(timeout=BOUND))
        assert isinstance(Attempt(pools[1].acquire).result(), ConnectionRefusedError)
        assert [state(pool) for pool in pools] == ["closed", "open"]


def test_each_endpoint_of_a_group_half_opens_in_its_own_time() -> None:
    ports = [refused_port() for _ in range(5)]
    with PoolGroup(TcpConnection, breaker=1, backoff=SHORT, check_after_idle=None) as group:
        pools = [group.pool(host="127.0.0.1", port=port) for port in ports]
        for _ in range(3):
            for pool in pools:
                assert isinstance(Attempt(pool.acquire).result(), ConnectionRefusedError)
            until("all half-open", lambda: all(state(pool) == "half-open" for pool in pools))
