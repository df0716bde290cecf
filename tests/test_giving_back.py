"""What becomes of a connection when its borrower is done with it: given back, reset, discarded or dropped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent.event import Event

from gsocketpool import ConnectionNotFoundError, Pool, PoolError, PoolExhaustedError
from tests.conftest import Crashed, Logged, shown
from tests.dials import BOUND, Attempt, nobody_else_runs
from tests.lines import Line, borrow, give_back, line_pool
from tests.servers import LineEchoServer


@pytest.fixture
def server() -> Iterator[LineEchoServer]:
    with LineEchoServer() as server:
        yield server


# discard_on


class Interruption(BaseException):
    """No :exc:`Exception`."""


KEPT: list[tuple[dict[str, Any], BaseException]] = [
    ({"discard_on": ()}, ValueError()),
    ({"discard_on": KeyError}, ValueError()),
    ({"discard_on": (KeyError, OSError)}, ValueError()),
    ({"discard_on": gevent.GreenletExit}, ValueError()),
    ({"discard_on": ()}, gevent.socket.timeout()),
]
DISCARDED: list[tuple[dict[str, Any], BaseException]] = [
    ({}, ValueError()),
    ({"discard_on": Exception}, ValueError()),
    ({"discard_on": LookupError}, KeyError()),
    ({"discard_on": (KeyError, OSError)}, ConnectionResetError()),
    *(
        ({"discard_on": discard_on}, error)
        for discard_on in ((), KeyError, Exception, BaseException)
        for error in (gevent.GreenletExit(), gevent.Timeout(), Interruption(), GeneratorExit(), KeyboardInterrupt())
    ),
]


@pytest.mark.parametrize(
    ("options", "error", "discarded"),
    [*((*case, False) for case in KEPT), *((*case, True) for case in DISCARDED)],
    ids=shown,
)
def test_what_leaves_the_block_discards_the_connection_or_does_not(
    server: LineEchoServer, options: dict[str, Any], error: BaseException, discarded: bool
) -> None:
    with line_pool(server, **options) as pool:
        with pytest.raises(type(error)) as raised, pool.connection() as line:
            raise error
        assert raised.value is error
        assert (pool.size, pool.stats().closed["discarded"]) == ((0, 1) if discarded else (1, 0))
        server.wait_open(0 if discarded else 1)
        with pool.connection() as again:
            assert (again is not line) is discarded


def test_a_timeout_around_the_block_that_raises_nothing_discards_all_the_same(server: LineEchoServer) -> None:
    with line_pool(server, discard_on=(), initial_connections=1) as pool:
        with gevent.Timeout(0.001, False), pool.connection():  # type: ignore[arg-type]
            gevent.sleep(BOUND)
        assert pool.stats().closed["discarded"] == 1


def test_an_error_that_the_block_handles_itself_discards_nothing(server: LineEchoServer) -> None:
    with line_pool(server) as pool:
        with pool.connection():
            try:
                raise ValueError
            except ValueError:
                pass
        try:
            raise gevent.GreenletExit
        except gevent.GreenletExit:
            with pool.connection():
                pass
        assert (pool.idle, pool.stats().closed["discarded"]) == (1, 0)


def test_a_block_may_be_left_by_return_break_and_continue(server: LineEchoServer) -> None:
    with line_pool(server) as pool:

        def leave() -> Line:
            with pool.connection() as line:
                return line

        line = leave()
        for turn in range(3):
            with pool.connection() as again:
                assert again is line
                if turn == 1:
                    continue
                if turn == 2:
                    break
        assert (pool.idle, pool.stats().opened, pool.stats().acquired) == (1, 1, 4)


def test_a_waiter_is_served_by_a_new_connection_after_a_discard(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1) as pool:
        block = pool.connection()
        line = block.__enter__()
        waiter = Attempt(pool.acquire, timeout=None)
        block.__exit__(ValueError, ValueError(), None)
        assert waiter.result() is not line
        assert (server.accepted, server.most) == (2, 1)
        pool.release(waiter.result())


# release by hand


@pytest.mark.parametrize("others_wait", [False, True])
@pytest.mark.parametrize("error", [gevent.GreenletExit(), gevent.Timeout(), Interruption()], ids=shown)
def test_g3_a_release_while_an_interruption_passes_through_discards(
    server: LineEchoServer, error: BaseException, others_wait: bool, crashed: Crashed
) -> None:
    with line_pool(server, max_connections=1) as pool:
        line = pool.acquire()

        def use() -> None:
            try:
                gevent.sleep(BOUND)
            finally:
                pool.release(line)

        borrower = gevent.spawn(use)
        gevent.sleep(0)
        waiter = Attempt(pool.acquire, timeout=None) if others_wait else None
        borrower.kill(error)
        assert crashed.take() in ([], [error])
        assert pool.stats().closed["discarded"] == 1
        server.wait_until(lambda: not line.is_connected())
        if waiter is not None:
            assert waiter.result() is not line
            pool.release(waiter.result())


@pytest.mark.parametrize("finally_", [False, True])
def test_a_release_by_hand_while_an_exception_is_handled_discards_what_discard_on_names(
    server: LineEchoServer, finally_: bool
) -> None:
    def fail(pool: Pool[Line], error: Exception) -> None:
        line = pool.acquire()
        if finally_:
            with pytest.raises(type(error)):
                try:
                    raise error
                finally:
                    pool.release(line)
        else:
            try:
                raise error
            except type(error):
                pool.release(line)

    with line_pool(server, discard_on=OSError) as pool:
        fail(pool, ValueError())
        assert (pool.idle, pool.stats().closed["discarded"]) == (1, 0)
        fail(pool, TimeoutError())
        assert (pool.idle, pool.stats().closed["discarded"]) == (0, 1)
    with line_pool(server) as pool:
        fail(pool, ValueError())
        assert (pool.idle, pool.stats().closed["discarded"]) == (0, 1)
        line = pool.acquire()
        try:
            pass
        finally:
            pool.release(line)
        assert pool.idle == 1


def test_an_interruption_of_another_greenlet_is_nobody_elses(server: LineEchoServer) -> None:
    with line_pool(server) as pool:
        line = pool.acquire()
        handling, may_end = Event(), Event()

        def handle() -> None:
            try:
                raise gevent.GreenletExit
            except gevent.GreenletExit:
                handling.set()
                may_end.wait(BOUND)

        other = gevent.spawn(handle)
        assert handling.wait(BOUND)
        pool.release(line)
        assert pool.idle == 1
        may_end.set()
        other.join(BOUND)


@pytest.mark.parametrize("what", ["idle", "closed", "another pool's", "nobody's", "granted"])
def test_what_is_not_borrowed_cannot_be_released_and_the_error_says_of_which_pool(
    server: LineEchoServer, what: str
) -> None:
    with line_pool(server, max_connections=1, name="orders") as pool, line_pool(server) as other:
        line, foreign = pool.acquire(), other.acquire()
        waiter = Attempt(pool.acquire, timeout=None) if what == "granted" else None
        pool.drop(line) if what == "closed" else pool.release(line)
        if what == "another pool's":
            line = foreign
        elif what == "nobody's":
            line = Line("127.0.0.1", server.port)
        before = pool.stats()
        with nobody_else_runs(), pytest.raises(ConnectionNotFoundError, match="'orders'.*Line") as raised:
            pool.release(line)
        assert isinstance(raised.value, PoolError)
        assert pool.stats() == before
        assert pool.faults() == []
        other.release(foreign)
        if waiter is not None:
            pool.release(waiter.result())


# Blocks that are misused


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_dropped_inside_the_block_is_left_alone_when_the_block_ends(
    server: LineEchoServer, fails: bool
) -> None:
    with line_pool(server) as pool:
        try:
            with pool.connection() as line:
                pool.drop(line)
                if fails:
                    raise ValueError
        except ValueError:
            pass
        assert (pool.idle, pool.in_use) == (0, 0)
        assert pool.stats().closed["discarded"] == 0
        assert pool.faults() == []


def test_g2_what_a_block_holds_cannot_be_released_from_under_it(server: LineEchoServer) -> None:
    """Not by the block itself, and not by the late second release of whoever had it before."""
    with line_pool(server, max_connections=1) as pool:
        before = pool.acquire()
        pool.release(before)
        with pool.connection() as line:
            assert line is before
            with pytest.raises(ConnectionNotFoundError, match="with block"):
                pool.release(before)
            assert pool.in_use == 1
            assert line.ask("mine") == "mine"
        assert pool.idle == 1


def test_a_block_can_be_used_again_once_it_was_left(server: LineEchoServer) -> None:
    with line_pool(server) as pool:
        block = pool.connection()
        for _ in range(3):
            with block as line:
                assert line.ask("again") == "again"
        with pytest.raises(ValueError), block:
            raise ValueError
        with block as line:
            assert line.ask("and again") == "and again"
        assert (pool.idle, pool.stats().acquired, pool.stats().opened) == (1, 5, 2)


def test_a_block_that_was_not_entered_borrows_nothing(server: LineEchoServer) -> None:
    with line_pool(server) as pool:
        pool.connection()
        pool.connection().__exit__(None, None, None)
        assert (pool.total, pool.stats().acquired) == (0, 0)


@pytest.mark.parametrize("full", [True, False])
def test_g4_a_block_that_two_greenlets_enter_at_once_loses_no_connection(server: LineEchoServer, full: bool) -> None:
    with line_pool(server, max_connections=2) as pool:
        held = borrow(pool, 2) if full else []
        block = pool.connection(timeout=BOUND)
        entered, may_end = Event(), Event()

        def use() -> None:
            with block as line:
                lines.append(line)
                entered.set()
                may_end.wait(BOUND)

        lines: list[Line] = []
        both = [Attempt(use), Attempt(use)]
        give_back(pool, held)
        assert entered.wait(BOUND)
        gevent.idle()
        may_end.set()
        for one in both:
            one.result()
        in_use = pool.in_use
        for line in lines if in_use else []:
            line.close()
        assert in_use == 0


# drop


def test_drop_closes_what_idles_before_it_returns(server: LineEchoServer) -> None:
    with line_pool(server) as pool:
        lines = borrow(pool, 3)
        give_back(pool, lines)
        pool.drop(lines[1])
        assert [line.is_connected() for line in lines] == [True, False, True]
        assert (pool.size, pool.total, pool.stats().closed["dropped"]) == (2, 2, 1)
        assert borrow(pool, 2) == [lines[2], lines[0]]
        give_back(pool, lines[::2])


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("order", ["lifo", "fifo"])
def test_drop_finds_what_idles_wherever_it_is_and_keeps_the_order(
    server: LineEchoServer, cold: bool, order: str
) -> None:
    with line_pool(server, order=order) as pool:
        lines = borrow(pool, 4)
        give_back(pool, lines[:2])
        pool.cool(0.0)
        give_back(pool, lines[2:])
        pool.drop(lines.pop(1 if cold else 2))
        assert borrow(pool, 3) == (lines if order == "fifo" else lines[::-1])
        assert pool.faults() == []
        give_back(pool, lines)


def test_drop_closes_what_is_borrowed_and_frees_its_slot(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1) as pool:
        line = pool.acquire()
        waiter = Attempt(pool.acquire, timeout=None)
        pool.drop(line)
        assert not line.is_connected()
        assert waiter.result() is not line
        with pytest.raises(ConnectionNotFoundError):
            pool.release(line)
        assert (server.accepted, server.most) == (2, 1)
        pool.release(waiter.result())


def test_drop_of_what_the_pool_does_not_have_is_an_error_that_says_of_which_pool(server: LineEchoServer) -> None:
    with line_pool(server, name="orders") as pool, line_pool(server) as other:
        line, foreign = pool.acquire(), other.acquire()
        pool.drop(line)
        for unknown in (line, foreign, Line("127.0.0.1", server.port)):
            with nobody_else_runs(), pytest.raises(ConnectionNotFoundError, match="'orders'.*Line"):
                pool.drop(unknown)
        assert foreign.ask("untouched") == "untouched"
        assert pool.stats().closed["dropped"] == 1
        other.release(foreign)


def test_dropping_what_a_waiter_was_granted_before_he_ran_gives_him_another_that_idles(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=2) as pool:
        granted, other = borrow(pool, 2)
        waiter = Attempt(pool.acquire, timeout=None)
        pool.release(granted)  # to him, who has not run yet
        pool.release(other)  # to nobody
        pool.drop(granted)
        assert waiter.result() is other
        assert pool.stats().acquired == 3
        pool.release(other)


def test_g5_dropping_what_a_waiter_was_granted_before_he_ran_leaves_him_first_in_the_queue(
    server: LineEchoServer,
) -> None:
    with line_pool(server, max_connections=2) as pool:
        granted, other = borrow(pool, 2)
        served: list[str] = []

        def use(name: str) -> None:
            with pool.connection(timeout=None) as line:
                served.append(name)
                line.ask(name)

        waiters = [Attempt(use, name) for name in ("first", "second", "third")]
        dropping = gevent.spawn(pool.drop, granted)  # runs before the first waiter, who is woken after it
        pool.release(granted)
        gevent.sleep(0)
        assert served == []
        pool.release(other)
        for waiter in waiters:
            waiter.result()
        dropping.get(timeout=BOUND)
        assert served == ["first", "second", "third"]
        assert (server.accepted, server.most) == (3, 2)
        assert pool.faults() == []


def test_dropping_what_a_waiter_was_granted_does_not_cost_him_his_time_limit(server: LineEchoServer) -> None:
    may_close = Event()

    class SlowToClose(Line):
        def close(self) -> None:
            may_close.wait(BOUND)
            super().close()

    with line_pool(server, SlowToClose, max_connections=1) as pool:
        line = pool.acquire()
        waiter = Attempt(pool.acquire, timeout=0.03)
        dropping = gevent.spawn(pool.drop, line)  # runs before the waiter, who is woken after it
        pool.release(line)
        error = waiter.result()
        assert isinstance(error, PoolExhaustedError)
        assert error.waited >= 0.03
        assert not dropping.ready()
        assert (pool.size, pool.total) == (0, 1)
        may_close.set()
        dropping.get(timeout=BOUND)
        assert pool.total == 0


# reset


class Resetting(Line):
    """Its reset waits until the test lets it go on."""

    resetting: Event
    may_end: Event

    def reset(self) -> None:
        self.resets += 1
        self.resetting.set()
        assert self.may_end.wait(BOUND)


@pytest.fixture
def resetting() -> type[Resetting]:
    return type("Resetting", (Resetting,), {"resetting": Event(), "may_end": Event()})


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("others_wait", [True, False])
def test_nobody_gets_a_connection_before_it_is_reset(
    server: LineEchoServer, resetting: type[Resetting], by_hand: bool, others_wait: bool
) -> None:
    with line_pool(server, resetting, max_connections=1) as pool:

        def use() -> Line:
            if by_hand:
                line = pool.acquire()
                pool.release(line)
            else:
                with pool.connection() as line:
                    pass
            return line

        borrower = Attempt(use)
        assert resetting.resetting.wait(BOUND)
        waiter = Attempt(pool.acquire, timeout=None) if others_wait else None
        with nobody_else_runs(), pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0)
        assert (pool.idle, pool.in_use) == (0, 1)
        assert waiter is None or not waiter.ready()
        resetting.may_end.set()
        line = borrower.result()
        again = waiter.result() if waiter else pool.acquire(timeout=0)
        assert (again, line.resets) == (line, 1)
        pool.release(again)
        assert line.resets == 2


def test_what_is_being_reset_cannot_be_released_again(server: LineEchoServer, resetting: type[Resetting]) -> None:
    with line_pool(server, resetting, max_connections=1) as pool:
        line = pool.acquire()
        releasing = Attempt(pool.release, line)
        with pytest.raises(ConnectionNotFoundError):
            pool.release(line)
        resetting.may_end.set()
        releasing.result()
        assert (pool.idle, line.resets) == (1, 1)


def test_what_is_dropped_while_it_is_reset_is_closed_once(server: LineEchoServer, resetting: type[Resetting]) -> None:
    with line_pool(server, resetting, max_connections=1) as pool:
        line = pool.acquire()
        releasing = Attempt(pool.release, line)
        pool.drop(line)
        resetting.may_end.set()
        assert releasing.result() is None
        assert (pool.total, sum(pool.stats().closed.values())) == (0, 1)
        assert pool.faults() == []


def test_what_is_not_given_back_is_not_reset(server: LineEchoServer, resetting: type[Resetting]) -> None:
    resetting.may_end.set()
    with line_pool(server, resetting) as pool:
        with pytest.raises(ValueError), pool.connection() as discarded:
            raise ValueError
        dropped, late = borrow(pool, 2)
        pool.drop(dropped)
        pool.close()
        pool.release(late)
        assert [line.resets for line in (discarded, dropped, late)] == [0, 0, 0]


def test_an_error_that_discards_nothing_is_followed_by_a_reset(
    server: LineEchoServer, resetting: type[Resetting]
) -> None:
    resetting.may_end.set()
    with line_pool(server, resetting, discard_on=()) as pool:
        with pytest.raises(ValueError), pool.connection() as line:
            raise ValueError
        assert (pool.idle, line.resets) == (1, 1)


@pytest.mark.parametrize("others_wait", [True, False])
def test_a_reset_that_raises_discards_the_connection_and_who_waits_gets_another(
    server: LineEchoServer, others_wait: bool, logged: Logged
) -> None:
    class Bad(Line):
        def reset(self) -> None:
            raise RuntimeError("cannot be reset")

    with line_pool(server, Bad, max_connections=1, name="orders") as pool:
        line = pool.acquire()
        waiter = Attempt(pool.acquire, timeout=None) if others_wait else None
        pool.release(line)
        [record] = logged.take(1)
        assert "'orders'" in record.getMessage()
        assert "cannot be reset" in record.getMessage()
        assert pool.stats().closed["discarded"] == 1
        if waiter is not None:
            assert waiter.result() is not line
            pool.drop(waiter.result())


@pytest.mark.parametrize("first", ["plain", "resetting"])
def test_types_with_and_without_a_reset_may_share_a_pool(
    server: LineEchoServer, resetting: type[Resetting], first: str
) -> None:
    resetting.may_end.set()
    kinds: list[type[Line]] = [Line, resetting] if first == "plain" else [resetting, Line]
    with Pool(lambda: kinds.pop(0)("127.0.0.1", server.port)) as pool:
        give_back(pool, borrow(pool, 1))
        lines = borrow(pool, 2)
        for _ in range(2):
            give_back(pool, lines)
            assert borrow(pool, 2) == lines[::-1]
        give_back(pool, lines)
        with pool.connection():
            pass
        counts = {type(line): line.resets for line in lines}
        assert counts[Line] == 0
        assert counts[resetting] == 3 + (first == "resetting") + isinstance(lines[1], resetting)
