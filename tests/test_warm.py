"""A pool that keeps connections ready: `min_idle`, `wait_ready`, and dials in the background that spare the server."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest

from gsocketpool import Pool, PoolClosedError, PoolExhaustedError, TcpConnection
from gsocketpool.lifetime import full_jitter
from tests.conftest import Logged
from tests.dials import BOUND, Attempt, Dials, Held, nobody_else_runs
from tests.knife import ASLEEP, WAKING, Knife
from tests.lines import Line, borrow, give_back, line_pool
from tests.proxy import Proxy
from tests.servers import BlackHole, LineEchoServer, refused_port
from tests.test_kills import CAP, THROWN, SlowToOpen, World

#: `backoff` after which no test sees another dial in the background.
FOR_EVER = (1e6, 1e6)

#: `backoff` that ends at once.
HARDLY_ANY = (0.001, 0.002)


def until(what: str, happened: Callable[[], bool]) -> None:
    """Wait until something has happened, and let everybody else run meanwhile."""
    with gevent.Timeout(BOUND, AssertionError(f"{what}: it has not come to that in {BOUND:g} s")):
        while not happened():
            gevent.sleep(0.001)


@pytest.fixture
def server() -> Iterator[LineEchoServer]:
    with LineEchoServer() as server:
        yield server


@pytest.fixture
def proxy(server: LineEchoServer) -> Iterator[Proxy]:
    with Proxy(server.host, server.port) as proxy:
        yield proxy


@pytest.fixture
def dials(server: LineEchoServer) -> Dials:
    return Dials(server)


def is_stocked(pool: Pool[Any], count: int) -> Callable[[], bool]:
    return lambda: pool.idle == count and pool.total == pool.size


# min_idle


def test_connections_are_opened_before_anybody_asks(server: LineEchoServer) -> None:
    with line_pool(server, min_idle=3) as pool:
        server.wait_accepted(3)
        until("a stock of 3", is_stocked(pool, 3))
        with nobody_else_runs():
            lines = borrow(pool, 3)
        assert [line.ask("warm") for line in lines] == ["warm"] * 3
        give_back(pool, lines)


def test_what_is_lent_from_the_stock_is_made_up_for(server: LineEchoServer) -> None:
    with line_pool(server, min_idle=2) as pool:
        pool.wait_ready(BOUND)
        lines = borrow(pool, 2)
        until("another 2", is_stocked(pool, 2))
        lines += borrow(pool, 1)
        until("another 1", is_stocked(pool, 2))
        assert (pool.in_use, server.accepted) == (3, 5)
        give_back(pool, lines)
        assert (pool.idle, server.accepted) == (5, 5)


@pytest.mark.parametrize("how", ["hang_up", "reset"])
def test_what_the_server_hung_up_on_is_replaced_before_anybody_asks(server: LineEchoServer, how: str) -> None:
    with line_pool(server, min_idle=3, check_after_idle=0.04) as pool:
        for turn in range(1, 4):
            until("a stock of 3", is_stocked(pool, 3))
            server.wait_open(3)
            getattr(server, how)()
            server.wait_accepted(3 + 3 * turn)
        until("a stock of 3", is_stocked(pool, 3))
        assert pool.stats().closed["stale"] == 9
        assert pool.stats().acquired == 0
        with nobody_else_runs():
            lines = borrow(pool, 3)
        assert [line.ask("new") for line in lines] == ["new"] * 3
        give_back(pool, lines)


def test_what_is_dropped_or_discarded_is_replaced(server: LineEchoServer) -> None:
    with line_pool(server, min_idle=2) as pool:
        pool.wait_ready(BOUND)
        pool.drop(pool.acquire())
        until("a stock of 2", is_stocked(pool, 2))
        with pytest.raises(ValueError), pool.connection():
            raise ValueError
        until("a stock of 2", is_stocked(pool, 2))
        lines = borrow(pool, 2)
        give_back(pool, lines)  # what is lent when a tick comes would be made up for, too
        for line in lines:
            pool.drop(line)
        until("a stock of 2", is_stocked(pool, 2))
        server.wait_open(2)
        assert server.accepted == 6


def test_at_the_cap_nothing_is_dialled_for_the_stock(server: LineEchoServer) -> None:
    with line_pool(server, min_idle=2, max_connections=3) as pool:
        pool.wait_ready(BOUND)
        lines = borrow(pool, 2)
        until("the one for which there is room", is_stocked(pool, 1))
        lines += borrow(pool, 1)
        for _ in range(3):
            pool._start_dials()
        assert (pool.total, server.accepted) == (3, 3)
        give_back(pool, lines[:2])
        assert (pool.idle, pool.in_use, server.most) == (2, 1, 3)
        give_back(pool, lines[2:])


def test_a_stock_as_large_as_the_pool_is_kept_and_no_larger(server: LineEchoServer) -> None:
    with line_pool(server, min_idle=3, max_connections=3, max_connecting=2) as pool:
        pool.wait_ready(BOUND)
        pool.clear()
        until("a stock of 3", is_stocked(pool, 3))
        assert server.most == 3


def test_a_stock_larger_than_a_cap_that_was_lowered_is_as_large_as_the_cap(server: LineEchoServer) -> None:
    with line_pool(server, min_idle=3, max_connections=3) as pool:
        pool.wait_ready(BOUND)
        pool.resize(2)
        until("a stock of 2", is_stocked(pool, 2))
        pool.wait_ready(BOUND)
        pool.resize(5)
        until("a stock of 3", is_stocked(pool, 3))


@pytest.mark.parametrize(
    ("initial", "stock", "cap", "max_connecting"),
    [(3, 3, 200, 1), (20, 20, 200, 8), (3, 1, 200, 1), (3, 3, 3, 2), (1, 3, 200, 8), (2, 1, 2, 8), (5, 2, 5, 3)],
)
def test_initial_connections_are_part_of_the_stock(
    server: LineEchoServer, initial: int, stock: int, cap: int, max_connecting: int
) -> None:
    options: dict[str, Any] = {
        "initial_connections": initial,
        "min_idle": stock,
        "max_connections": cap,
        "max_connecting": max_connecting,
    }
    making = gevent.spawn(line_pool, server, **options)
    with making.get(timeout=BOUND) as pool:
        assert pool.idle >= initial
        until("a full stock", is_stocked(pool, max(initial, stock)))
        assert server.accepted == max(initial, stock)


def test_an_initial_dial_that_fails_leaves_no_stock_behind(proxy: Proxy) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        line_pool(proxy, initial_connections=2, min_idle=2)
    proxy.forward()
    proxy.wait_open(0)


def test_a_paused_pool_dials_nothing_for_its_stock(server: LineEchoServer) -> None:
    kept_alive = 0

    class Proven(Line):
        def keepalive(self) -> bool:
            nonlocal kept_alive
            kept_alive += 1
            return True

    with line_pool(server, Proven, min_idle=2, keepalive=0.02) as pool:
        until("a stock of 2", is_stocked(pool, 2))
        first, second = borrow(pool, 2)
        until("a stock of 2", is_stocked(pool, 2))
        server.wait_open(4)
        pool.pause()
        dialled = server.accepted
        pool.drop(first)
        pool.drop(next(m.connection for m in pool._members.values() if m.holder is None))
        before = kept_alive
        until("some upkeep", lambda: kept_alive >= before + 3)  # each time it looks whether the stock is short
        assert (pool.idle, server.accepted) == (1, dialled)
        pool.resume()
        until("a stock of 2", is_stocked(pool, 2))
        assert server.accepted == dialled + 1
        pool.release(second)


def test_a_closed_pool_dials_nothing_for_its_stock(server: LineEchoServer, dials: Dials) -> None:
    pool = dials.pool(min_idle=3, max_connecting=2)
    dials.wait(2)
    pool.close()
    dials[0].go_on()
    dials[1].go_on()
    server.wait_open(0)
    dials.wait(2)
    assert (pool.total, pool.stats().closed["closed"]) == (0, 2)


def test_a_factory_that_fails_is_logged_and_tried_again(server: LineEchoServer, logged: Logged) -> None:
    made = 0

    def factory() -> Line:
        nonlocal made
        made += 1
        if made <= 2:
            raise RuntimeError("out of order")
        return Line(server.host, server.port)

    with Pool(factory, min_idle=1, backoff=HARDLY_ANY) as pool:
        pool.wait_ready(BOUND)
        texts = [record.getMessage() for record in logged.take()]
        assert len(texts) == 2
        assert all("a dial for min_idle=1 failed; the next one in " in text for text in texts)
        assert all("out of order" in text for text in texts)
        stats = pool.stats()
        assert (stats.opened, stats.open_failures, made) == (1, 2, 3)


def test_a_factory_that_returns_no_connection_is_logged_and_a_borrower_is_told(logged: Logged) -> None:
    def factory() -> Any:
        return None

    with Pool(factory, min_idle=1, backoff=FOR_EVER) as pool:
        (record,) = logged.take(1)
        assert "which is no gsocketpool.Connection" in record.getMessage()
        with pytest.raises(TypeError):
            pool.acquire(timeout=BOUND)
        assert (pool.total, pool.faults()) == (0, [])


@pytest.mark.parametrize("asleep", [False, True])
def test_a_dial_for_the_stock_that_is_killed_is_made_up_for(server: LineEchoServer, asleep: bool, logged: Any) -> None:
    killed = False

    class Killed(Line):
        def open(self) -> None:
            nonlocal killed
            if not killed:
                killed = True
                if not asleep:
                    raise gevent.GreenletExit
                gevent.spawn(gevent.kill, gevent.getcurrent())
                gevent.sleep(BOUND)
            super().open()

    with line_pool(server, Killed, min_idle=2, backoff=HARDLY_ANY) as pool:
        until("a stock of 2", is_stocked(pool, 2))
        (record,) = logged.take(1)
        assert "a dial was killed" in record.getMessage()


def test_a_dial_for_the_stock_serves_whoever_waits(dials: Dials) -> None:
    with dials.pool(min_idle=1, max_connecting=1) as pool:
        dials.wait(1)
        waiter = Attempt(pool.acquire, timeout=None)
        dials[0].go_on()
        assert waiter.result() is dials[0]
        dials.wait(2)  # for the stock, since the first one was used up
        dials[1].go_on()
        until("a stock of 1", is_stocked(pool, 1))
        pool.release(dials[0])


def test_a_dial_for_the_stock_that_fails_is_not_told_to_a_borrower(dials: Dials, logged: Logged) -> None:
    with dials.pool(min_idle=1, max_connecting=2, backoff=FOR_EVER) as pool:
        dials.wait(1)
        waiter = Attempt(pool.acquire, timeout=None)
        dials.wait(2)
        dials[0].go_on(OSError("for the stock"))
        assert not waiter.ready()
        dials[1].go_on()
        assert waiter.result() is dials[1]
        dials.wait(3)  # a success ends the rest
        dials[2].go_on()
        pool.release(dials[1])
        logged.take(1)


# wait_ready


def test_wait_ready_returns_when_the_stock_is_open(dials: Dials) -> None:
    with dials.pool(min_idle=2) as pool:
        waiters = [Attempt(pool.wait_ready), Attempt(pool.wait_ready, BOUND), Attempt(pool.wait_ready, timeout=BOUND)]
        dials.wait(2)
        dials[1].go_on()
        gevent.sleep(0)
        assert not any(waiter.ready() for waiter in waiters)
        dials[0].go_on()
        assert [waiter.result() for waiter in waiters] == [None, None, None]
        with nobody_else_runs():
            pool.wait_ready()
            pool.wait_ready(0)


@pytest.mark.parametrize("timeout", [None, 0, 1])
def test_wait_ready_has_nothing_to_wait_for_without_a_stock(timeout: float | None) -> None:
    with Pool(TcpConnection, {"host": "127.0.0.1", "port": refused_port()}) as pool, nobody_else_runs():
        pool.wait_ready(timeout)


def test_wait_ready_counts_what_is_borrowed(server: LineEchoServer) -> None:
    with line_pool(server, min_idle=2, max_connections=2) as pool:
        pool.wait_ready(BOUND)
        lines = borrow(pool, 2)
        with nobody_else_runs():
            pool.wait_ready(BOUND)
        give_back(pool, lines)


def test_wait_ready_says_why_the_stock_is_not_open(logged: Logged) -> None:
    port = refused_port()
    with Pool(TcpConnection, {"host": "127.0.0.1", "port": port}, min_idle=2, backoff=FOR_EVER) as pool:
        until("the dials have failed", lambda: pool.stats().open_failures == 2)
        error = Attempt(pool.wait_ready, 0.05).result()
        assert 1 <= len(logged.take()) <= 2
        assert isinstance(error, PoolExhaustedError)
        assert isinstance(error.last_error, ConnectionRefusedError)
        assert error.waited >= 0.05
        assert error.stats is not None
        assert (error.stats.idle, error.stats.open_failures) == (0, 2)
        text = str(error)
        assert "0 of min_idle=2 " in text
        assert f"cannot connect to 127.0.0.1:{port}" in text
        assert "timeout=0" not in text  # advice for who acquires


def test_wait_ready_says_that_dials_are_under_way(logged: Logged) -> None:
    with BlackHole() as hole:
        options = {"host": hole.host, "port": hole.port, "connect_timeout": 0.2}
        with Pool(TcpConnection, options, min_idle=2, backoff=FOR_EVER) as pool:
            with pytest.raises(PoolExhaustedError, match="2 opening") as raised:
                pool.wait_ready(0.01)
            assert raised.value.last_error is None
            until("the dials have failed", lambda: pool.stats().open_failures == 2)
    assert 1 <= len(logged.take()) <= 2


def test_wait_ready_with_no_time_raises_at_once(dials: Dials) -> None:
    with dials.pool(min_idle=1) as pool:
        with nobody_else_runs(), pytest.raises(PoolExhaustedError, match="0 of min_idle=1 "):
            pool.wait_ready(0)
        dials.wait(1)
        dials[0].go_on()


def test_wait_ready_tells_of_a_pool_that_is_paused(server: LineEchoServer) -> None:
    with line_pool(server, min_idle=1) as pool:
        pool.pause()
        server.wait_accepted(1)  # it had begun
        until("a stock of 1", is_stocked(pool, 1))
        pool.drop(next(iter(pool._members.values())).connection)
        with pytest.raises(PoolExhaustedError, match="paused"):
            pool.wait_ready(0.02)
        waiter = Attempt(pool.wait_ready)
        pool.resume()
        assert waiter.result() is None


def test_wait_ready_ends_when_the_pool_is_closed(dials: Dials) -> None:
    pool = dials.pool(min_idle=2)
    waiters = [Attempt(pool.wait_ready), Attempt(pool.wait_ready, BOUND)]
    dials.wait(2)
    pool.close()
    assert [type(waiter.result()) for waiter in waiters] == [PoolClosedError, PoolClosedError]
    with nobody_else_runs(), pytest.raises(PoolClosedError):
        pool.wait_ready()
    for dial in dials:
        dial.go_on()


def test_wait_ready_ends_when_the_cap_no_longer_has_room_for_more(dials: Dials, logged: Logged) -> None:
    with dials.pool(min_idle=2, max_connections=2, backoff=FOR_EVER) as pool:
        waiter = Attempt(pool.wait_ready)
        dials.wait(2)
        dials[0].go_on()
        dials[1].go_on(OSError("no room"))
        logged.take(1)
        assert not waiter.ready()
        pool.resize(1)
        assert waiter.result() is None
        assert pool.size == 1


def test_one_who_waits_until_the_stock_is_open_can_be_killed_and_the_others_wait_on(dials: Dials) -> None:
    with dials.pool(min_idle=1) as pool:
        first, second, third = (Attempt(pool.wait_ready) for _ in range(3))
        dials.wait(1)
        second.greenlet.kill()
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
            pool.wait_ready()
        dials[0].go_on()
        assert (first.result(), third.result()) == (None, None)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", True])
def test_wait_ready_says_what_it_takes(server: LineEchoServer, timeout: Any) -> None:
    with line_pool(server, min_idle=1) as pool:
        with pytest.raises((TypeError, ValueError), match="timeout must be"):
            pool.wait_ready(timeout)
        pool.wait_ready(BOUND)


# Sparing the server


@pytest.mark.parametrize("setbacks", [1, 2, 3, 10, 64, 65, 1000, 10**6])
def test_full_jitter_is_anything_up_to_a_bound_that_doubles(setbacks: int, rng: random.Random) -> None:
    bound = min(30, 0.1 * 2 ** min(setbacks - 1, 20))
    assert full_jitter(setbacks, 0.1, 30, lambda: 0.0) == 0
    assert full_jitter(setbacks, 0.1, 30, lambda: 1.0) == pytest.approx(bound)
    assert full_jitter(setbacks, 0.1, 30, lambda: 0.5) == pytest.approx(bound / 2)
    delays = [full_jitter(setbacks, 0.1, 30, rng.random) for _ in range(1000)]
    assert all(0 <= delay <= bound for delay in delays)
    assert min(delays) < bound / 10
    assert max(delays) > bound * 9 / 10


def test_never_more_dials_at_once_than_may_be(dials: Dials) -> None:
    with dials.pool(min_idle=7, max_connecting=3) as pool:
        for done in range(7):
            dials.wait(min(7, 3 + done))
            assert pool.stats().opening == min(3, 7 - done)
            dials[done].go_on()
        until("a stock of 7", is_stocked(pool, 7))


def test_waiters_and_the_stock_together_dial_no_more_at_once_than_may_be(dials: Dials) -> None:
    with dials.pool(min_idle=2, max_connecting=3, max_connections=6) as pool:
        dials.wait(2)
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(4)]
        dials.wait(3)
        for done in range(6):
            assert pool.stats().opening <= 3
            dials.wait(min(6, 3 + done))
            dials[done].go_on()
        lent = [waiter.result() for waiter in waiters]
        assert lent == dials[:4]
        until("a stock of 2", is_stocked(pool, 2))
        for connection in lent:
            pool.release(connection)


def test_a_server_that_is_down_is_left_alone_and_borrowers_dial_without_delay(
    server: LineEchoServer, proxy: Proxy, logged: Logged
) -> None:
    proxy.refuse()
    with line_pool(proxy, min_idle=4, max_connecting=2, backoff=FOR_EVER) as pool:
        until("as many as may dial at once", lambda: pool.stats().open_failures == 2)  # then it rests
        assert 1 <= len(logged.take()) <= 2
        for dialled in range(3, 8):
            with pytest.raises(ConnectionRefusedError):
                pool.acquire(timeout=BOUND)
            assert pool.stats().open_failures == dialled
        pool._start_dials()
        assert pool.stats().opening == 0
        proxy.forward()
        with pool.connection(timeout=BOUND) as line:
            assert line.ask("back") == "back"
            until("a stock of 4", is_stocked(pool, 4))  # no rest is waited for after a success
        assert (pool.stats().open_failures, pool.stats().opened) == (7, 5)


def test_borrowers_dial_at_once_while_the_stock_rests(dials: Dials, logged: Logged) -> None:
    with dials.pool(min_idle=1, backoff=FOR_EVER) as pool:
        dials.wait(1)
        dials[0].go_on(OSError("down"))
        logged.take(1)
        for turn in range(1, 4):
            borrower = Attempt(pool.acquire, timeout=None)
            dials.wait(1 + turn)
            dials[turn].go_on(OSError(f"down {turn}"))
            assert str(borrower.result()) == f"down {turn}"


def test_a_server_that_comes_back_is_found_without_a_borrower(proxy: Proxy, logged: Logged) -> None:
    proxy.refuse()
    with line_pool(proxy, min_idle=3, backoff=HARDLY_ANY) as pool:
        until("a few more dials", lambda: pool.stats().open_failures >= 9)
        assert pool._setbacks >= 3
        proxy.forward()
        pool.wait_ready(BOUND)
        until("a stock of 3", is_stocked(pool, 3))
        assert pool._setbacks == 0
    assert logged.take() != []


def test_a_server_that_restarts_is_dialled_by_no_more_than_may_at_once_and_the_stock_is_as_before(
    server: LineEchoServer, proxy: Proxy, logged: Logged
) -> None:
    with line_pool(proxy, min_idle=4, max_connecting=2, check_after_idle=0.04, backoff=HARDLY_ANY) as pool:
        for turn in range(1, 4):
            until("a stock of 4", is_stocked(pool, 4))
            proxy.refuse()
            proxy.hang_up()
            until("all are missed", lambda turn=turn: pool.stats().closed["stale"] >= 4 * turn)  # type: ignore[misc]
            until("dials that fail", lambda turn=turn: pool.stats().open_failures >= 3 * turn)  # type: ignore[misc]
            assert pool.stats().opening <= 2
            proxy.forward()
        until("a stock of 4", is_stocked(pool, 4))
        assert proxy.most == 4  # while one is lent there may be one more: the stock is of idle ones
        with pool.connection(timeout=0) as line:
            assert line.ask("hello") == "hello"
        logged.take()


def test_a_dial_for_the_stock_that_hangs_delays_no_borrower(dials: Dials) -> None:
    with dials.pool(min_idle=1, max_connecting=2) as pool:
        dials.wait(1)
        borrower = Attempt(pool.acquire, timeout=BOUND)
        dials.wait(2)
        dials[1].go_on()
        assert borrower.result() is dials[1]
        pool.release(dials[1])
        assert pool.idle == 1
        dials[0].go_on()


# HikariCP's spike: fifty requests at once, five idle connections, a slow connect


def test_a_spike_is_served_by_what_comes_back_while_a_few_connections_are_being_opened(dials: Dials) -> None:
    with dials.pool(min_idle=5) as pool:
        dials.wait(5)
        for dial in dials[:5]:
            dial.go_on()
        pool.wait_ready(BOUND)
        used: list[Held] = []

        def request() -> None:
            with pool.connection(timeout=None) as connection:
                used.append(connection)
                gevent.sleep(0.002)

        requests = [gevent.spawn(request) for _ in range(50)]
        # No dial ends before all are served: a connect takes longer than all of the requests.
        gevent.joinall(requests, timeout=BOUND, raise_error=True)
        assert all(each.successful() for each in requests)
        assert set(used) <= set(dials[:5])
        assert len(dials) <= 5 + 8
        assert pool.stats().opening == len(dials) - 5
        for dial in dials[5:]:
            dial.go_on()
        until("no dial under way", is_stocked(pool, len(dials)))
        assert pool.faults() == []
        assert dials.server.most == len(dials)


def test_a_spike_on_a_server_that_is_slow_to_open_opens_few_at_once(server: LineEchoServer) -> None:
    dialling = most = 0

    class Slow(Line):
        def open(self) -> None:
            nonlocal dialling, most
            dialling += 1
            most = max(most, dialling)
            gevent.sleep(0.15)
            super().open()
            dialling -= 1

    with line_pool(server, Slow, min_idle=5, max_connecting=5) as pool:
        pool.wait_ready(BOUND)
        replies: list[str] = []

        def request(number: int) -> None:
            with pool.connection(timeout=BOUND) as line:
                replies.append(line.ask(str(number)))
                gevent.sleep(0.002)

        gevent.joinall([gevent.spawn(request, n) for n in range(50)], timeout=BOUND, raise_error=True)
        assert sorted(map(int, replies)) == list(range(50))
        assert most <= 5
        until("no dial under way", lambda: pool.total == pool.size)


def test_a_waiter_takes_what_is_given_back_or_newly_opened_whichever_comes_first(dials: Dials) -> None:
    with dials.pool(min_idle=1) as pool:
        dials.wait(1)
        dials[0].go_on()
        pool.wait_ready(BOUND)
        held = pool.acquire(timeout=0)
        first, second = Attempt(pool.acquire, timeout=None), Attempt(pool.acquire, timeout=None)
        dials.wait(4)  # one for each of the two, and one for the stock
        dials[3].go_on()
        assert first.result() is dials[3]
        pool.release(held)
        assert second.result() is held
        dials[1].go_on()
        dials[2].go_on()
        assert (pool.idle, pool.in_use) == (2, 2)
        pool.release(dials[3])
        pool.release(held)


# A kill at every switch point


def ready(world: World) -> None:
    world.pool.wait_ready(BOUND)
    world.borrow(timeout=BOUND)


def by_with(world: World) -> None:
    world.borrow(timeout=BOUND)


#: name -> what the victim does, who is the victim, the pool's options.
SCENARIOS: dict[str, tuple[Callable[[World], None], str, dict[str, Any]]] = {
    "whoever waits until the stock is open": (ready, "borrow", {"min_idle": 2}),
    "a borrower beside the stock": (by_with, "borrow", {"min_idle": 1}),
    "a borrower who waits for a dial for the stock": (by_with, "borrow", {"min_idle": 1, "max_connecting": 1}),
    "a dial for the stock": (ready, "open", {"min_idle": 1}),
    "a dial for the stock while another waits": (ready, "open", {"min_idle": 2, "max_connecting": 1}),
}


def run(knife: Knife, name: str) -> None:
    scenario, victim_does, options = SCENARIOS[name]
    with LineEchoServer() as server, knife:
        world = World(knife, server, SlowToOpen, victim_does, backoff=HARDLY_ANY, **options)
        others = world.bystanders(2)

        def be_the_victim() -> None:
            try:
                scenario(world)
            except AssertionError:
                raise  # a wrong reply
            except (Exception, gevent.GreenletExit, gevent.Timeout):
                assert knife.struck

        victim = gevent.Greenlet(be_the_victim)
        if victim_does == "borrow":
            knife.aim(victim)
        victim.start()
        gevent.joinall([victim, *others], timeout=BOUND, raise_error=True)
        assert all(greenlet.successful() for greenlet in [victim, *others]), "somebody was never served"

        pool = world.pool
        assert pool.faults() == []
        pool.wait_ready(BOUND)
        world.serves_everybody()
        until("a stock as before", lambda: pool.idle >= options["min_idle"])
        assert pool.faults() == []
        assert (pool._ready, pool.in_use, pool.waiting) == ([], 0, 0)
        assert server.most <= CAP
        pool.close()
        server.wait_open(0)
        assert (pool.total, pool.faults()) == (0, [])


def strike_everywhere(run: Callable[[Knife, str], None], name: str, thrown: str, when: str) -> int:
    """Run it unharmed, then strike at its first switch point, its second, and so on until it has no more. Answers how
    many there were."""
    run(Knife(), name)
    point = 0
    while True:
        point += 1
        knife = Knife(point, when, THROWN[thrown])
        try:
            run(knife, name)
        except BaseException as error:
            raise AssertionError(f"{name}: {thrown} at switch point {point}, {when}") from error
        if not knife.struck:
            break
    assert point > 1, "the scenario has no switch point: it proves nothing"
    return point - 1


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("thrown", THROWN)
@pytest.mark.parametrize("when", [ASLEEP, WAKING])
def test_g1_g4_a_kill_at_any_switch_point_leaves_the_stock_as_it_was(
    name: str, thrown: str, when: str, logged: Logged
) -> None:
    strikes = strike_everywhere(run, name, thrown, when)
    assert len(logged.take()) <= strikes
