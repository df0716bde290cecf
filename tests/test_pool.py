"""Which connection is lent, checked or reaped, objects of any kind in a pool, and what the pool says of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent.event import Event

from gsocketpool import ConnectionNotFoundError, Pool, PoolError, PoolExhaustedError, wrap
from gsocketpool.core import REASONS
from tests.dials import BOUND, Attempt, Dials
from tests.lines import Line, borrow, give_back, line_pool
from tests.servers import LineEchoServer


@pytest.fixture
def server() -> Iterator[LineEchoServer]:
    with LineEchoServer() as server:
        yield server


# order


def test_what_was_used_last_is_lent_first(server: LineEchoServer) -> None:
    with line_pool(server) as pool:
        first, second, third = borrow(pool, 3)
        give_back(pool, [second, third, first])
        assert borrow(pool, 3) == [first, third, second]
        give_back(pool, [first, second, third])


def test_fifo_lends_first_what_idled_longest(server: LineEchoServer) -> None:
    with line_pool(server, order="fifo") as pool:
        first, second, third = borrow(pool, 3)
        give_back(pool, [second, third, first])
        assert borrow(pool, 3) == [second, third, first]
        give_back(pool, [first, second, third])


@pytest.mark.parametrize(("order", "expected"), [("lifo", [3, 2, 1, 0]), ("fifo", [0, 1, 2, 3])])
def test_the_tick_leaves_the_order_as_it_is(server: LineEchoServer, order: str, expected: list[int]) -> None:
    with line_pool(server, order=order) as pool:
        lines = borrow(pool, 4)
        give_back(pool, lines[:2])
        pool.cool(0.0)
        give_back(pool, lines[2:])
        pool.cool(0.0) if order == "fifo" else None
        assert borrow(pool, 4) == [lines[number] for number in expected]
        give_back(pool, lines)


@pytest.mark.parametrize(("order", "reused"), [("lifo", 1), ("fifo", 3)])
def test_with_one_borrower_lifo_uses_one_connection_and_fifo_all(
    server: LineEchoServer, order: str, reused: int
) -> None:
    with line_pool(server, initial_connections=3, order=order) as pool:
        used = []
        for _ in range(9):
            with pool.connection() as line:
                used.append(id(line))
        assert len(set(used)) == reused


# check_after_idle


def test_what_has_just_been_used_is_not_checked(server: LineEchoServer) -> None:
    with line_pool(server) as pool:
        for _ in range(5):
            with pool.connection() as line:
                pass
        assert line.checks == 0


@pytest.mark.parametrize("order", ["lifo", "fifo"])
def test_what_idled_since_the_last_tick_is_checked_once_and_what_was_used_since_is_not(
    server: LineEchoServer, order: str
) -> None:
    with line_pool(server, order=order) as pool:
        idled, used = borrow(pool, 2)
        pool.release(idled)
        pool.cool(0.0)
        pool.release(used)
        both = borrow(pool, 2)
        assert (idled.checks, used.checks) == (1, 0)
        give_back(pool, both)
        give_back(pool, borrow(pool, 2))
        assert (idled.checks, used.checks) == (1, 0)


@pytest.mark.parametrize("check_after_idle", [0, 0.0, 0.001])
def test_with_zero_every_connection_that_idled_at_all_is_checked(
    server: LineEchoServer, check_after_idle: float
) -> None:
    with line_pool(server, check_after_idle=check_after_idle) as pool:
        line = pool.acquire()
        assert line.checks == 0  # it is new
        pool.release(line)
        for _ in range(3):
            with pool.connection() as again:
                assert again is line
            give_back(pool, borrow(pool, 1))
        assert line.checks == 6


def test_with_none_no_connection_is_ever_checked(server: LineEchoServer) -> None:
    with line_pool(server, check_after_idle=None) as pool:
        with pool.connection() as line:
            line.healthy = False
        pool.cool(0.0)
        pool.drop_expired()
        pool.cool(0.0)
        with pool.connection() as again:
            assert again is line
        assert line.checks == 0


def test_what_is_handed_to_a_waiter_did_not_idle_and_is_not_checked(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1, check_after_idle=0) as pool:
        line = pool.acquire()
        waiter = Attempt(pool.acquire, timeout=None)
        pool.release(line)
        assert waiter.result() is line
        assert line.checks == 0
        pool.release(line)


def test_what_fails_its_check_is_closed_and_the_next_one_is_lent(server: LineEchoServer) -> None:
    with line_pool(server, check_after_idle=0) as pool:
        lines = borrow(pool, 3)
        give_back(pool, lines)
        lines[2].healthy = lines[1].healthy = False
        with pool.connection() as line:
            assert line is lines[0]
        server.wait_open(1)
        stats = pool.stats()
        assert (stats.closed["stale"], stats.size, stats.acquired) == (2, 1, 4)


def test_if_nothing_passes_its_check_a_new_connection_is_dialled(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=2, max_connections=2, check_after_idle=0) as pool:
        for line in (lines := borrow(pool, 2)):
            line.healthy = False
        give_back(pool, lines)
        with pool.connection(timeout=BOUND) as new:
            assert new not in lines
        assert (server.accepted, server.most) == (3, 2)


# drop_expired


@pytest.mark.parametrize("order", ["lifo", "fifo"])
@pytest.mark.parametrize("expired", [(), (0,), (1, 2), (4,), (0, 2, 4), (0, 1, 2, 3, 4)])
def test_drop_expired_closes_what_expired_and_leaves_the_others_in_order(
    server: LineEchoServer, order: str, expired: tuple[int, ...]
) -> None:
    with line_pool(server, order=order) as pool:
        lines = borrow(pool, 5)
        give_back(pool, lines[:3])
        pool.cool(0.0)
        give_back(pool, lines[3:])
        for number in expired:
            lines[number].expired = True
        pool.drop_expired()
        assert [line.expiries for line in lines] == [1] * 5
        assert [line.is_connected() for line in lines] == [number not in expired for number in range(5)]
        kept = [line for line in lines if not line.expired]
        assert (pool.size, pool.total, pool.stats().closed["expired"]) == (len(kept), len(kept), len(expired))
        assert borrow(pool, len(kept)) == (kept if order == "fifo" else kept[::-1])
        assert pool.stats().opened == 5
        give_back(pool, kept)


def test_drop_expired_does_not_ask_what_is_borrowed(server: LineEchoServer) -> None:
    with line_pool(server) as pool:
        line = pool.acquire()
        line.expired = True
        pool.drop_expired()
        assert (line.expiries, line.ask("still here")) == (0, "still here")
        pool.release(line)
        pool.drop_expired()
        assert not line.is_connected()


class SlowToSay(Line):
    """Says whether it has expired when its test lets it."""

    asked: Event
    may_say: Event

    def is_expired(self) -> bool:
        self.asked.set()
        self.may_say.wait(BOUND)
        return self.expired


def slow_to_say() -> type[SlowToSay]:
    class Fresh(SlowToSay):
        asked = Event()
        may_say = Event()

    return Fresh


@pytest.mark.parametrize("expired", [False, True])
def test_who_waits_while_the_reaper_looks_at_a_connection_is_served_after_it(
    server: LineEchoServer, expired: bool
) -> None:
    kind = slow_to_say()
    with line_pool(server, kind, max_connections=1, initial_connections=1) as pool:
        with pool.connection() as line:
            line.expired = expired
        reaper = Attempt(pool.drop_expired)
        assert kind.asked.is_set()
        assert (pool.idle, pool.size) == (0, 1)
        waiter = Attempt(pool.acquire, timeout=None)
        assert not waiter.ready()
        kind.may_say.set()
        assert (waiter.result() is not line) is expired
        reaper.result()
        pool.release(waiter.result())
        assert (server.accepted, server.most) == (2 if expired else 1, 1)


@pytest.mark.parametrize("expired", [False, True])
def test_what_is_dropped_while_the_reaper_looks_at_it_is_closed_once(server: LineEchoServer, expired: bool) -> None:
    kind = slow_to_say()
    with line_pool(server, kind, initial_connections=1) as pool:
        with pool.connection() as line:
            line.expired = expired
        reaper = Attempt(pool.drop_expired)
        pool.drop(line)
        kind.may_say.set()
        assert reaper.result() is None
        assert (pool.total, sum(pool.stats().closed.values())) == (0, 1)
        assert pool.faults() == []


def test_the_reaper_comes_every_interval_and_only_where_it_is_wanted(server: LineEchoServer) -> None:
    with (
        line_pool(server, initial_connections=1, reap_interval=0.01) as reaped,
        line_pool(server, initial_connections=1, reap_interval=0.01, reap_expired_connections=False) as left_alone,
    ):
        for pool in (reaped, left_alone):
            with pool.connection() as line:
                line.expired = True
        server.wait_accepted(2)
        server.wait_open(1)
        with reaped.connection() as again:
            again.expired = True
        server.wait_accepted(3)
        server.wait_open(1)
        assert reaped.stats().closed["expired"] == 2
        assert (left_alone.idle, line.expiries) == (1, 0)


# wrap


class Odd:
    """An object that equals everything and cannot be hashed, around a real socket."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, port: int) -> None:
        self.socket = gevent.socket.create_connection(("127.0.0.1", port))
        self.closes = 0

    def __eq__(self, other: object) -> bool:
        return True

    def close(self) -> None:
        self.closes += 1
        self.socket.close()


def test_objects_that_equal_everything_and_cannot_be_hashed_are_told_apart(server: LineEchoServer) -> None:
    with Pool(wrap(Odd), {"port": server.port}, max_connections=3) as pool:
        one, two, three = (pool.acquire() for _ in range(3))
        assert len({id(one), id(two), id(three)}) == 3
        waiter = Attempt(pool.acquire, timeout=None)
        pool.release(two)
        assert waiter.result() is two
        pool.drop(one)
        assert (one.closes, two.closes, three.closes) == (1, 0, 0)
        with pytest.raises(ConnectionNotFoundError):
            pool.release(one)
        pool.release(three)
        with pytest.raises(ConnectionNotFoundError):
            pool.release(three)
        with pool.connection() as again:
            assert again is three
        with pytest.raises(ValueError), pool.connection():
            raise ValueError
        pool.release(two)
        assert pool.faults() == []
    assert (one.closes, two.closes, three.closes) == (1, 1, 1)
    server.wait_open(0)


def test_the_functions_of_a_wrap_are_asked_when_the_methods_of_a_connection_would_be(server: LineEchoServer) -> None:
    calls: list[tuple[str, Odd]] = []

    def note(what: str, answer: object) -> Any:
        def noted(connection: Odd) -> object:
            calls.append((what, connection))
            return answer

        return noted

    def close(connection: Odd) -> None:
        calls.append(("close", connection))
        connection.close()

    def names() -> list[str]:
        taken = [what for what, _ in calls]
        calls.clear()
        return taken

    wrapped = wrap(Odd, close=close, check=note("check", 1), reset=note("reset", None))
    with Pool(wrapped, {"port": server.port}, check_after_idle=0) as pool:
        with pool.connection() as odd:
            assert names() == []
        assert names() == ["reset"]
        with pool.connection() as again:
            assert again is odd
        assert [connection is odd for _, connection in calls] == [True, True]
        assert names() == ["check", "reset"]
        pool.drop_expired()
        assert names() == []
        with pytest.raises(ValueError), pool.connection():
            raise ValueError
        while odd.closes == 0:
            gevent.sleep(0)
        assert names() == ["check", "close"]


def test_a_pool_says_its_name_and_hides_what_is_its_own(server: LineEchoServer) -> None:
    with line_pool(server, name="lines") as pool, line_pool(server) as other:
        assert (pool.name, other.name) == ("lines", None)
        assert {"acquire", "connection", "idle", "name", "stats", "waiting"} <= {*dir(pool)}
        assert {"take", "give", "opened", "failed", "retire", "total"}.isdisjoint(dir(pool))


def test_a_subclass_may_have_a_name_of_its_own(server: LineEchoServer) -> None:
    class Named(Pool[Line]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.name = "mine"

    with Named(Line, {"host": "127.0.0.1", "port": server.port}, name="lines") as pool:
        assert pool.name == "mine"
        assert repr(pool).startswith("<Named 'lines': ")


def test_a_wrapped_check_that_says_no_in_any_way_discards(server: LineEchoServer) -> None:
    answers: list[object] = [False, 0, "", []]
    with Pool(wrap(Odd, check=lambda odd: answers.pop()), {"port": server.port}, check_after_idle=0) as pool:
        while answers:
            with pool.connection():
                pass
        assert (pool.stats().closed["stale"], pool.stats().opened) == (4, 5)


def test_an_open_that_returns_none_is_an_error_and_costs_no_slot() -> None:
    with Pool(wrap(lambda: None), max_connections=1) as pool:
        for _ in range(3):
            with pytest.raises(TypeError, match="None"):
                pool.acquire()
        assert (pool.total, pool.stats().open_failures) == (0, 3)


# What the pool says


def test_stats_tell_the_whole_history(server: LineEchoServer) -> None:
    class Choosy(Line):
        refuse = False

        def open(self) -> None:
            if self.refuse:
                raise OSError("not now")
            super().open()

    with line_pool(server, Choosy, initial_connections=2, max_connections=3, check_after_idle=0) as pool:
        expected: dict[str, Any] = {
            "size": 2,
            "idle": 2,
            "in_use": 0,
            "opening": 0,
            "waiting": 0,
            "max_connections": 3,
            "acquired": 0,
            "opened": 2,
            "open_failures": 0,
            "exhausted": 0,
            "closed": dict.fromkeys(REASONS, 0),
            "breaker": "closed",
        }

        def now(**changed: Any) -> None:
            for reason, count in changed.pop("closed", {}).items():
                expected["closed"][reason] = count
            expected.update(changed)
            stats = pool.stats()
            assert {name: getattr(stats, name) for name in expected} == expected
            assert {field.name for field in dataclasses.fields(stats)} == set(expected)
            assert (pool.size, pool.idle, pool.in_use, pool.waiting) == (
                stats.size,
                stats.idle,
                stats.in_use,
                stats.waiting,
            )
            assert pool.faults() == []

        now()
        one = pool.acquire()
        now(acquired=1, idle=1, in_use=1)
        block = pool.connection()
        block.__enter__()
        now(acquired=2, idle=0, in_use=2)
        Choosy.refuse = True
        with pytest.raises(OSError, match="not now"):
            pool.acquire()
        now(open_failures=1)
        Choosy.refuse = False
        three = pool.acquire()
        now(acquired=3, opened=3, size=3, in_use=3)
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0)
        now(exhausted=1)
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0.001)
        now(exhausted=2)
        killed, waiter = Attempt(pool.acquire, timeout=None), Attempt(pool.acquire, timeout=None)
        now(waiting=2)
        killed.greenlet.kill()
        now(waiting=1)
        pool.release(one)
        now(waiting=0, acquired=4)  # granted, though he does not know yet
        assert waiter.result() is one
        now()
        pool.drop(one)
        now(size=2, in_use=2, closed={"dropped": 1})
        block.__exit__(ValueError, ValueError(), None)
        now(size=1, in_use=1, closed={"discarded": 1})
        server.wait_open(1)
        gevent.sleep(0)
        pool.release(three)
        now(idle=1, in_use=0)
        three.healthy = False
        four = pool.acquire()
        now(acquired=5, opened=4, idle=0, in_use=1, closed={"stale": 1})
        pool.release(four)
        four.expired = True
        pool.drop_expired()
        now(size=0, in_use=0, closed={"expired": 1})
        five = pool.acquire()
        six = pool.acquire()
        pool.release(five)
        now(acquired=7, opened=6, size=2, in_use=1, idle=1)
        pool.close()
        now(size=1, idle=0, closed={"closed": 1})
        pool.release(six)
        now(size=0, in_use=0, closed={"closed": 2})
        with pytest.raises(PoolError):
            pool.acquire()
        now()
    assert expected["opened"] == sum(expected["closed"].values()) == server.accepted


def test_stats_are_a_look_at_one_moment_that_nobody_can_change(server: LineEchoServer) -> None:
    with line_pool(server) as pool:
        before = pool.stats()
        with pool.connection():
            pass
        pool.drop(pool.acquire())
        assert (before.acquired, before.closed["dropped"]) == (0, 0)
        with pytest.raises(dataclasses.FrozenInstanceError):
            before.acquired = 5  # type: ignore[misc]
        assert list(before.closed) == list(REASONS)
        assert (pool.stats().acquired, pool.stats().closed["dropped"]) == (2, 1)


def test_the_figures_of_a_pool_count_dials_and_waiters(server: LineEchoServer) -> None:
    dials = Dials(server)
    with dials.pool(max_connections=1, name="orders") as pool:
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(3)]
        dials.wait(1)
        stats = pool.stats()
        assert (stats.size, stats.opening, stats.waiting) == (0, 1, 3)
        assert repr(pool) == "<Pool 'orders': 0 idle, 0 in use, 1 opening, 3 waiting, max 1>"
        dials[0].go_on()
        for waiter in waiters:
            pool.release(waiter.result())
        assert repr(pool) == "<Pool 'orders': 1 idle, 0 in use, 0 opening, 0 waiting, max 1>"


def test_the_repr_says_whose_pool_it_is_and_that_it_is_closed(server: LineEchoServer) -> None:
    class Special(Pool[Any]):
        pass

    for pool, name in (
        (line_pool(server), "Pool of Line"),
        (Special(Line, {"host": "127.0.0.1", "port": server.port}, name="orders"), "Special 'orders'"),
    ):
        with pool.connection():
            assert repr(pool) == f"<{name}: 0 idle, 1 in use, 0 opening, 0 waiting, max 200>"
        pool.close()
        assert repr(pool) == f"<{name}: 0 idle, 0 in use, 0 opening, 0 waiting, closed>"
